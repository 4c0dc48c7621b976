"""SignalWatch: signals during training are noted, acted on between two steps, delivered after."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

_STOPPING = ("SIGTERM", "SIGINT")
_SAVING = ("SIGUSR1",)


class SignalWatch:
    """Handlers of SIGTERM, SIGINT and SIGUSR1 that do nothing but note what came.

    A signal that asks to stop is delivered once the watch has ended, to whoever handled it
    before: by default SIGTERM ends the process and SIGINT raises KeyboardInterrupt. A second SIGINT
    is delivered at once. Signals that were ignored stay ignored.

    Args:
        stop: Called in the main thread, with the signal's name, when one asks to stop.
    """

    def __init__(self, stop: Callable[[str], None]) -> None:
        self._stop = stop
        self._before: dict[int, Any] = {}
        self._stop_signal: int | None = None
        self._wants_save = False

    def begin(self) -> None:
        """Take over the signals. Without effect outside of the main thread, where Python can't."""
        if threading.current_thread() is not threading.main_thread():
            logger.info("not in the main thread, so signals don't save")
            return
        for names, handler in ((_STOPPING, self._on_stop), (_SAVING, self._on_save)):
            for name in names:
                number = getattr(signal, name, None)
                if number is None or signal.getsignal(number) in (signal.SIG_IGN, None):
                    continue
                self._before[number] = signal.signal(number, handler)

    def end(self) -> None:
        """Give the signals back. A second call does nothing."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def deliver(self) -> None:
        """Send the process the signal that asked it to stop, if one did. After `end`."""
        if self._stop_signal is not None:
            number, self._stop_signal = self._stop_signal, None
            # SIGTERM ends the process without emptying its buffers.
            sys.stdout.flush()
            sys.stderr.flush()
            signal.raise_signal(number)

    def take_save_request(self) -> bool:
        """Whether SIGUSR1 came since the last call."""
        wanted, self._wants_save = self._wants_save, False
        return wanted

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if self._stop_signal is None:
            self._stop_signal = number
            self._stop(signal.Signals(number).name)
        elif number == signal.SIGINT:
            self.end()
            self._stop_signal = None
            signal.raise_signal(number)

    def _on_save(self, number: int, frame: FrameType | None) -> None:
        self._wants_save = True
