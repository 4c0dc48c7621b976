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

    A signal that asks to stop is delivered once every watch has ended, to whoever handled it
    before: by default SIGTERM ends the process and SIGINT raises KeyboardInterrupt. A second SIGINT
    is delivered at once. Signals that were ignored stay ignored.

    Args:
        stop: Called in the main thread, with the signal's name, when one asks to stop.
    """

    def __init__(self, stop: Callable[[str], None]) -> None:
        self._stop = stop
        self._wants_save = False

    def begin(self) -> None:
        """Take over the signals. Without effect outside of the main thread, where Python can't."""
        if threading.current_thread() is not threading.main_thread():
            logger.info("not in the main thread, so signals don't save")
            return
        if not _watches:
            _take_over()
        _watches.append(self)

    def end(self) -> None:
        """Give the signals back, after the last watch. A second call does nothing."""
        if self in _watches:
            _watches.remove(self)
            if not _watches:
                _give_back()

    def deliver(self) -> None:
        """Send the process the signal that asked it to stop, if one did. After `end`.

        While another watch goes on, that is left to it.
        """
        if _watches or not _to_deliver:
            return
        number = _to_deliver.pop()
        # SIGTERM ends the process without emptying its buffers.
        sys.stdout.flush()
        sys.stderr.flush()
        signal.raise_signal(number)

    def take_save_request(self) -> bool:
        """Whether SIGUSR1 came since the last call."""
        wanted, self._wants_save = self._wants_save, False
        return wanted

    def note_stop(self, name: str) -> None:
        """A signal that asks to stop has come."""
        self._stop(name)

    def note_save(self) -> None:
        """A signal that asks to save has come."""
        self._wants_save = True


# Handlers belong to the process, so that several watches share them.

_watches: list[SignalWatch] = []
_handlers_before: dict[int, Any] = {}
_to_deliver: list[int] = []


def _take_over() -> None:
    _to_deliver.clear()
    for names, handler in ((_STOPPING, _on_stop), (_SAVING, _on_save)):
        for name in names:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                _handlers_before[number] = signal.signal(number, handler)


def _give_back() -> None:
    while _handlers_before:
        number, handler = _handlers_before.popitem()
        signal.signal(number, handler)


def _on_stop(number: int, frame: FrameType | None) -> None:
    if not _to_deliver:
        _to_deliver.append(number)
        for watch in tuple(_watches):
            watch.note_stop(signal.Signals(number).name)
    elif number == signal.SIGINT:
        _watches.clear()
        _to_deliver.clear()
        _give_back()
        signal.raise_signal(number)


def _on_save(number: int, frame: FrameType | None) -> None:
    for watch in tuple(_watches):
        watch.note_save()
