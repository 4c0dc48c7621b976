"""Signals while ranks are watched: one gets the main thread out, one may be news of a failure.

SIGURG interrupts the main thread, and a system call that it waits for. Nobody else uses that
signal, and one that comes too late is ignored by default.

SIGTERM is what a launcher sends to a rank when another one has ended. By default it would end this
process before that has said why. So the thread of a watch decides what it means; Python writes the
signal's number to it (`signal.set_wakeup_fd`) even if the main thread is stuck in C++ code.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

if TYPE_CHECKING:
    from types import FrameType

_DECIDES_S = 5.0
"""How long the main thread leaves it to a watch what SIGTERM means."""


class Watch(Protocol):
    """What is asked of a watch, in the main thread."""

    @property
    def has_failed(self) -> bool:
        """Whether a failure is known, so that this process cleans up and ends."""

    def interrupt(self) -> None:
        """Raise the failure, if that may be."""


_watches: list[Watch] = []
_wakeup = -1
"""File descriptor that the numbers of signals are written to; of the first watch."""


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
    return signal.SIGTERM in numbers and signal.getsignal(signal.SIGTERM) is _on_termination


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
    global _wakeup  # noqa: PLW0603  # signals belong to the process
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    others = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    if others != -1:
        signal.set_wakeup_fd(others)
        return
    _wakeup = wakeup
    signal.signal(signal.SIGTERM, _on_termination)


def _give_termination_back() -> None:
    global _wakeup  # noqa: PLW0603
    if threading.current_thread() is not threading.main_thread():
        return
    others = signal.set_wakeup_fd(-1)
    if others != _wakeup:
        signal.set_wakeup_fd(others)
    _wakeup = -1
    if signal.getsignal(signal.SIGTERM) is _on_termination:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _on_urgent(number: int, frame: FrameType | None) -> None:
    for watch in tuple(_watches):
        watch.interrupt()


def _on_termination(number: int, frame: FrameType | None) -> None:
    give_up_s = time.monotonic() + _DECIDES_S
    while _wakeup != -1 and time.monotonic() < give_up_s:
        for watch in tuple(_watches):
            watch.interrupt()
            if watch.has_failed:
                return
        time.sleep(0.01)
    end_process_by(signal.SIGTERM)


def _after_fork() -> None:
    # What a child gets is not for its parent's watch.
    _watches.clear()
    if _wakeup != -1:
        _give_termination_back()


os.register_at_fork(after_in_child=_after_fork)
