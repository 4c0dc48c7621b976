"""Signal handling of a run: the only module that handles SIGTERM, SIGINT and SIGUSR1.

During training, SIGTERM and SIGINT stop the run and SIGUSR1 requests a save; handlers only set
flags. After the run has stopped and every callback has cleaned up, the signal is raised again with
its former handler: by default SIGTERM ends the process and SIGINT raises KeyboardInterrupt. A
second SIGINT takes effect at once. Signals that were ignored stay ignored.

Outside of training, a launcher sends SIGTERM to a rank when another rank has failed. By default it
would end this process before the failure is reported. So the thread of a FailureMonitor decides;
Python writes the signal number to its file descriptor (`signal.set_wakeup_fd`) even if the main
thread is in C++ code.

SIGURG interrupts the main thread and its system calls. Other code rarely uses it, and by default it
is ignored, so one that arrives late does no harm.
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

from dream_trainer.world.worker_signals import begin_ignoring_in_workers, end_ignoring_in_workers

if TYPE_CHECKING:
    from types import FrameType

logger = logging.getLogger(__name__)

RUN_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
"""Signals that stop or save a run; the signal's name is the reason given."""

_DECISION_TIMEOUT_S = 5.0
"""How long the main thread waits for a monitor to decide about SIGTERM."""


class Monitor(Protocol):
    """The part of FailureMonitor that the main thread calls."""

    @property
    def has_failed(self) -> bool:
        """Whether a failure is known, so that this process cleans up and exits."""

    def interrupt(self) -> None:
        """Raise the failure, unless the main thread is cleaning up."""


class Run(Protocol):
    """The part of a trainer that signal handlers call."""

    def stop(self, reason: str) -> None:
        """Stop after a step."""

    def request_save(self, reason: str) -> None:
        """Save after a step."""


_runs: list[Run] = []
"""Runs that are training; several if a callback trains another trainer."""
_received: signal.Signals | None = None
"""The signal that stopped them, until it is raised again."""
_num_interrupts = 0
_handlers_before: dict[signal.Signals, Any] = {}
"""Handlers that this module has replaced, also after it has restored them."""
_monitors: list[Monitor] = []
_wakeup = -1
"""File descriptor that signal numbers are written to; the first monitor's."""


# For the loop


@contextlib.contextmanager
def handled_by(run: Run) -> Iterator[None]:
    """Inside, signals stop or save a run.

    Has no effect outside the main thread, where Python can't handle signals.

    Args:
        run: Called in the signal handler.
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


def raise_received_signal() -> None:
    """Raise again the signal that stopped the run, with its former handler. After `handled_by`.

    Does nothing if there was none, or while another run is training, which does it later.
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
                _install_handler(number)
        begin_ignoring_in_workers()
    _runs.append(run)
    if _received is not None:
        run.stop(_received.name)


def _end_run(run: Run) -> None:
    if run in _runs:
        _runs.remove(run)
        if not _runs:
            _restore_run_handlers()


def _restore_run_handlers() -> None:
    end_ignoring_in_workers()
    for number in map(_number, RUN_SIGNALS):
        if number != signal.SIGTERM or _wakeup == -1:
            _restore_handler(number)


def _number(name: str) -> signal.Signals:
    return signal.Signals[name]


def _install_handler(number: signal.Signals) -> None:
    if signal.getsignal(number) is not _on_signal:
        _handlers_before[number] = signal.signal(number, _on_signal)


def _restore_handler(number: signal.Signals) -> None:
    before = _handlers_before.get(number)
    if before is not None and signal.getsignal(number) is _on_signal:
        signal.signal(number, before)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if not _runs:
        _handle_outside_of_runs(signal.Signals(number), frame)
    elif number == signal.SIGUSR1:
        for run in tuple(_runs):
            run.request_save(signal.Signals(number).name)
    else:
        _stop_runs(signal.Signals(number))


def _handle_outside_of_runs(number: signal.Signals, frame: FrameType | None) -> None:
    """Handle a signal just before or after a run, or if other code has restored this handler."""
    before = _handlers_before.get(number)
    if number == signal.SIGTERM and _wakeup != -1:
        _wait_for_sigterm_decision()
    elif callable(before):
        before(number, frame)
    elif before != signal.SIG_IGN:
        end_process_by(number)


def _stop_runs(number: signal.Signals) -> None:
    global _received, _num_interrupts  # noqa: PLW0603
    _num_interrupts += number == signal.SIGINT
    if _num_interrupts > 1:
        _received = None
        _runs.clear()
        _restore_run_handlers()
        signal.raise_signal(signal.SIGINT)
    else:
        _received = _received or number
        for run in tuple(_runs):
            run.stop(_received.name)


# For FailureMonitor


def attach_monitor(monitor: Monitor, wakeup: int) -> bool:
    """Let a monitor interrupt the main thread, and decide about SIGTERM if it has no handler yet.

    Args:
        monitor: Attached until `detach_monitor`.
        wakeup: A non-blocking file descriptor, to write signal numbers to.

    Returns:
        False outside the main thread, or if other code handles SIGURG.
    """
    handler: Any = signal.getsignal(signal.SIGURG)
    is_free = handler in (signal.SIG_DFL, signal.SIG_IGN, _on_sigurg)
    if threading.current_thread() is not threading.main_thread() or not is_free:
        return False
    if not _monitors:
        _take_over_sigterm(wakeup)
    _monitors.append(monitor)
    signal.signal(signal.SIGURG, _on_sigurg)
    return True


def detach_monitor(monitor: Monitor, wakeup: int) -> None:
    """Undo `attach_monitor`. A second call does nothing."""
    if monitor in _monitors:
        _monitors.remove(monitor)
        if wakeup == _wakeup:
            _restore_sigterm()


def interrupt_main_thread() -> None:
    """Call `interrupt` of the monitors there, as soon as it runs Python code."""
    ident = threading.main_thread().ident
    assert ident is not None, "it runs"
    signal.pthread_kill(ident, signal.SIGURG)


def has_undecided_sigterm(numbers: bytes) -> bool:
    """Whether signal numbers include a SIGTERM that a monitor must decide about."""
    is_ours = signal.getsignal(signal.SIGTERM) is _on_signal
    return signal.SIGTERM in numbers and is_ours and not _runs


def ignore(number: signal.Signals) -> None:
    """Ignore a signal from now on. In any thread; if called in the main one, until the exit."""
    # A child that has ended must still be waited for, as by default.
    action = signal.SIG_DFL if number == signal.SIGCHLD else signal.SIG_IGN
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, action)  # Python restores signals at its exit if it has a handler
    else:
        _set_action(number, action)


def end_process_by(number: signal.Signals) -> NoReturn:
    """End this process by a signal's default action. In any thread."""
    _set_action(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    while True:  # the signal may arrive after kill() returns
        time.sleep(1)


def _set_action(number: signal.Signals, action: signal.Handlers) -> None:
    ctypes.CDLL(None).signal(int(number), ctypes.c_void_p(int(action)))


def _take_over_sigterm(wakeup: int) -> None:
    global _wakeup  # noqa: PLW0603
    handler: Any = signal.getsignal(signal.SIGTERM)
    if handler not in (signal.SIG_DFL, _on_signal):
        return
    others = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    if others != -1:
        signal.set_wakeup_fd(others)
        return
    _wakeup = wakeup
    _install_handler(signal.SIGTERM)


def _restore_sigterm() -> None:
    global _wakeup  # noqa: PLW0603
    if threading.current_thread() is not threading.main_thread():
        return
    others = signal.set_wakeup_fd(-1)
    if others != _wakeup:
        signal.set_wakeup_fd(others)
    _wakeup = -1
    if not _runs:
        _restore_handler(signal.SIGTERM)


def _on_sigurg(number: int, frame: FrameType | None) -> None:
    for monitor in tuple(_monitors):
        monitor.interrupt()


def _wait_for_sigterm_decision() -> None:
    give_up_s = time.monotonic() + _DECISION_TIMEOUT_S
    while _wakeup != -1 and time.monotonic() < give_up_s:
        for monitor in tuple(_monitors):
            monitor.interrupt()
            if monitor.has_failed:
                return
        time.sleep(0.01)
    end_process_by(signal.SIGTERM)


def _after_fork() -> None:
    # A child's signals don't concern its parent's runs and monitors.
    _runs.clear()
    _monitors.clear()
    if _wakeup != -1:
        _restore_sigterm()
    for number in tuple(_handlers_before):
        _restore_handler(number)


os.register_at_fork(after_in_child=_after_fork)
