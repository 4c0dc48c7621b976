"""The signals of a run: the only module that handles SIGTERM, SIGINT and SIGUSR1.

While a run trains, SIGTERM and SIGINT ask it to stop and SIGUSR1 asks it to save; handlers only set
flags. When the run has stopped and every callback has cleaned up, the signal takes the effect that
it would have had (`deliver`): by default SIGTERM ends the process and SIGINT raises
KeyboardInterrupt. A second SIGINT takes effect at once. Signals that were ignored stay ignored.

Before and after that, SIGTERM is what a launcher sends to a rank when another one has failed. By
default it would end this process before that has said why. So the thread of a watch decides what
it means; Python writes the signal's number to it (`signal.set_wakeup_fd`) even if the main thread
is stuck in C++ code.

SIGURG interrupts the main thread, and a system call that it waits for. Nobody else uses that
signal, and one that comes too late is ignored by default.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from dream_trainer.world.worker_signals import hold_workers, release_workers

if TYPE_CHECKING:
    from types import FrameType

logger = logging.getLogger(__name__)

RUN_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
"""Signals that ask a run to stop or to save; the reason for it is the name then."""

_DECIDES_S = 5.0
"""How long the main thread leaves it to a watch what SIGTERM means."""


class Watch(Protocol):
    """What is asked of a watch, in the main thread."""

    @property
    def has_failed(self) -> bool:
        """Whether a failure is known, so that this process cleans up and ends."""

    def interrupt(self) -> None:
        """Raise the failure, if that may be."""


class Run(Protocol):
    """What signals ask of a run, in a signal handler."""

    def stop(self, reason: str) -> None:
        """Stop after a step."""

    def request_save(self, reason: str) -> None:
        """Save after a step."""


_runs: list[Run] = []
"""Those that train now; there are several if a callback trains another trainer."""
_received: signal.Signals | None = None
"""What asked them to stop, and hasn't taken effect."""
_num_interrupts = 0
_handlers_before: dict[signal.Signals, Any] = {}
_watches: list[Watch] = []
_wakeup = -1
"""File descriptor that the numbers of signals are written to; of the first watch."""


# Of runs


@contextlib.contextmanager
def handled_by(run: Run) -> Iterator[None]:
    """Inside, signals ask a run to stop or to save.

    Without effect outside of the main thread, where Python can't handle signals.

    Args:
        run: Asked in the signal handler.
    """
    if threading.current_thread() is not threading.main_thread():
        logger.info("fit() isn't called in the main thread, so signals don't stop or save the run")
        yield
        return
    _begin_run(run)
    try:
        yield
    finally:
        _end_run(run)


def deliver() -> None:
    """Let the signal that stopped the run take effect. After `handled_by`.

    Does nothing if there was none, or while another run goes on, which is left to do it.
    """
    global _received  # signals belong to the process
    if _received is None or _runs:
        return
    number, _received = _received, None
    # SIGTERM ends the process without flushing them.
    sys.stdout.flush()
    sys.stderr.flush()
    signal.raise_signal(number)


def _begin_run(run: Run) -> None:
    global _received, _num_interrupts
    if not _runs:
        _received, _num_interrupts = None, 0
        for number in map(_number, RUN_SIGNALS):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                _take(number)
        hold_workers()
    _runs.append(run)


def _end_run(run: Run) -> None:
    if run in _runs:
        _runs.remove(run)
        if not _runs:
            _give_back_what_runs_took()


def _give_back_what_runs_took() -> None:
    release_workers()
    for number in map(_number, RUN_SIGNALS):
        if number != signal.SIGTERM or _wakeup == -1:
            _give_back(number)


def _number(name: str) -> signal.Signals:
    return signal.Signals[name]


def _take(number: signal.Signals) -> None:
    if signal.getsignal(number) is not _on_signal:
        _handlers_before[number] = signal.signal(number, _on_signal)


def _give_back(number: signal.Signals) -> None:
    before = _handlers_before.pop(number, None)
    if before is not None and signal.getsignal(number) is _on_signal:
        signal.signal(number, before)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if not _runs:
        _decide_on_termination()
    elif number == signal.SIGUSR1:
        for run in tuple(_runs):
            run.request_save(signal.Signals(number).name)
    else:
        _stop_runs(signal.Signals(number))


def _stop_runs(number: signal.Signals) -> None:
    global _received, _num_interrupts  # noqa: PLW0603
    _num_interrupts += number == signal.SIGINT
    if _num_interrupts > 1:
        _received = None
        _runs.clear()
        _give_back_what_runs_took()
        signal.raise_signal(signal.SIGINT)
    elif _received is None:
        _received = number
        for run in tuple(_runs):
            run.stop(number.name)


# Of watches


def begin(watch: Watch, wakeup: int) -> bool:
    """Let a watch interrupt the main thread, and decide what SIGTERM means if that is free.

    Args:
        watch: Until `end`.
        wakeup: A file descriptor that doesn't block, to write the numbers of signals to.

    Returns:
        False outside of the main thread, or if somebody else uses SIGURG.
    """
    handler: Any = signal.getsignal(signal.SIGURG)
    is_free = handler in (signal.SIG_DFL, signal.SIG_IGN, _on_urgent)
    if threading.current_thread() is not threading.main_thread() or not is_free:
        return False
    if not _watches:
        _take_termination(wakeup)
    _watches.append(watch)
    signal.signal(signal.SIGURG, _on_urgent)
    return True


def end(watch: Watch, wakeup: int) -> None:
    """Take back what `begin` did. A second call does nothing."""
    if watch in _watches:
        _watches.remove(watch)
        if wakeup == _wakeup:
            _give_termination_back()


def interrupt_main_thread() -> None:
    """Call `interrupt` of the watches there, as soon as it runs Python code again."""
    ident = threading.main_thread().ident
    assert ident is not None, "it runs"
    signal.pthread_kill(ident, signal.SIGURG)


def is_termination(numbers: bytes) -> bool:
    """Whether a SIGTERM that a watch has to decide about is among the numbers of signals."""
    is_ours = signal.getsignal(signal.SIGTERM) is _on_signal
    return signal.SIGTERM in numbers and is_ours and not _runs


def ignore(number: signal.Signals) -> None:
    """Do nothing about a signal from here on, in any thread; in the main one, to the very end."""
    # A child that has ended must still be waited for, as by default.
    action = signal.SIG_DFL if number == signal.SIGCHLD else signal.SIG_IGN
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, action)  # Python gives signals back at its end if it has a handler
    else:
        _set_action(number, action)


def end_process_by(number: signal.Signals) -> NoReturn:
    """End this process as a signal does by default. In any thread."""
    _set_action(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    while True:  # another thread may be the one that the kernel ends first
        time.sleep(1)


def _set_action(number: signal.Signals, action: signal.Handlers) -> None:
    ctypes.CDLL(None).signal(int(number), ctypes.c_void_p(int(action)))


def _take_termination(wakeup: int) -> None:
    global _wakeup  # noqa: PLW0603
    handler: Any = signal.getsignal(signal.SIGTERM)
    if handler not in (signal.SIG_DFL, _on_signal):
        return
    others = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    if others != -1:
        signal.set_wakeup_fd(others)
        return
    _wakeup = wakeup
    _take(signal.SIGTERM)


def _give_termination_back() -> None:
    global _wakeup  # noqa: PLW0603
    if threading.current_thread() is not threading.main_thread():
        return
    others = signal.set_wakeup_fd(-1)
    if others != _wakeup:
        signal.set_wakeup_fd(others)
    _wakeup = -1
    if not _runs:
        _give_back(signal.SIGTERM)


def _on_urgent(number: int, frame: FrameType | None) -> None:
    for watch in tuple(_watches):
        watch.interrupt()


def _decide_on_termination() -> None:
    give_up_s = time.monotonic() + _DECIDES_S
    while _wakeup != -1 and time.monotonic() < give_up_s:
        for watch in tuple(_watches):
            watch.interrupt()
            if watch.has_failed:
                return
        time.sleep(0.01)
    end_process_by(signal.SIGTERM)


def _after_fork() -> None:
    # What a child gets is not for its parent's runs and watches.
    _runs.clear()
    _watches.clear()
    if _wakeup != -1:
        _give_termination_back()
    for number in tuple(_handlers_before):
        _give_back(number)


os.register_at_fork(after_in_child=_after_fork)
