"""Signals in loader workers: only the main process decides when a run ends.

torchrun's agent, a scheduler, `docker stop` and a shell's Ctrl-C signal the whole process group. A
worker that dies makes the main process raise ("DataLoader worker is killed by signal") before it
has saved. So during a run, workers ignore the signals that core handles.

Workers are started with these signals blocked, which forked and spawned processes inherit, and
unblock them after setting handlers in the `worker_init_fn`. Ignoring or blocking the signals for
good would be inherited by programs that a worker starts, such as a video decoder.

A worker still exits when its main process is gone: torch's worker loop checks its parent every 5 s.
The parent of a worker from the forkserver is the server, which lives as long as any of its
children; there a thread checks the main process. After the run a worker exits on SIGTERM, by which
multiprocessing ends daemons.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import forkserver, resource_tracker, sharedctypes
from types import FrameType
from typing import Any

_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
_CHECK_EVERY_S = 5.0  # as torch's worker loop
_IN_FORKSERVER = "dream_trainer.world.worker_forkserver"

_ignores_signals = False
_inner_loaders: list[tuple[Any, Any]] = []
"""Loaders inside others, whose `worker_init_fn` is replaced until the run ends; and their own."""
_main_decides: Any = None
"""`_ignores_signals` in memory shared with workers; made when there are workers."""


def begin_ignoring_in_workers() -> None:
    """From now on, workers that `protected_workers` starts ignore the signals."""
    _set_ignoring(True)


def end_ignoring_in_workers() -> None:
    """From now on, workers exit on SIGTERM."""
    _set_ignoring(False)
    while _inner_loaders:
        loader, user_init = _inner_loaders.pop()
        loader.worker_init_fn = user_init


def _set_ignoring(value: bool) -> None:
    global _ignores_signals  # noqa: PLW0603  # signals belong to the process
    _ignores_signals = value
    if _main_decides is not None:
        _main_decides.value = value


def _shared_flag() -> Any:
    global _main_decides  # noqa: PLW0603
    if _main_decides is None:
        _main_decides = sharedctypes.RawValue(ctypes.c_bool, _ignores_signals)
    return _main_decides


@contextlib.contextmanager
def protected_workers(loader: Any) -> Iterator[None]:
    """Inside, `iter(loader)` starts workers that ignore SIGTERM, SIGINT and SIGUSR1 during a run.

    The loop does so for the loaders of the trainer. A callback with a loader of its own does it
    itself; otherwise a signal to the process group ends the workers, and with them the run.

    Has no effect on a loader without workers, or if no run handles the signals.

    Args:
        loader: A `torch.utils.data.DataLoader`, or an object with some among its attributes. Those
            start their workers at any time, and ignore signals once the workers have started.
    """
    if not _ignores_signals:
        yield
    elif _has_workers(loader):
        with _starting_with(loader, _WorkerInit(loader.worker_init_fn, _shared_flag())):
            # Otherwise the tracker would be started inside, and unblock signals (Python < 3.12).
            resource_tracker.ensure_running()
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            try:
                yield
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
    else:
        for inner in _loaders_inside(loader):
            if not isinstance(inner.worker_init_fn, _WorkerInit):
                _inner_loaders.append((inner, inner.worker_init_fn))
                inner.worker_init_fn = _WorkerInit(inner.worker_init_fn, _shared_flag())
        yield


def _has_workers(loader: Any) -> bool:
    from torch.utils.data import DataLoader

    return isinstance(loader, DataLoader) and loader.num_workers > 0


def _loaders_inside(wrapper: Any) -> Iterator[Any]:
    """Loaders with workers among the attributes of an object, also in lists and dicts."""
    for value in vars(wrapper).values() if hasattr(wrapper, "__dict__") else ():
        values = value.values() if isinstance(value, Mapping) else value
        parts = values if isinstance(value, (list, tuple, Mapping)) else (value,)
        yield from (part for part in parts if _has_workers(part))


@contextlib.contextmanager
def _starting_with(loader: Any, init: _WorkerInit) -> Iterator[None]:
    """Replace the loader's `worker_init_fn` inside."""
    context = loader.multiprocessing_context or multiprocessing
    if context.get_start_method() == "forkserver":
        _preload_into_forkserver(_IN_FORKSERVER)
    before = loader.worker_init_fn
    loader.worker_init_fn = init
    try:
        yield
    finally:
        loader.worker_init_fn = before


def _preload_into_forkserver(module: str) -> None:
    """Make the forkserver import a module when it starts; no effect if it is running."""
    # There is no public way to add to the modules that the user has set.
    server: Any = forkserver._forkserver  # noqa: SLF001
    modules: list[str] = server._preload_modules  # noqa: SLF001
    if module not in modules:
        forkserver.set_forkserver_preload([*modules, module])


class _WorkerInit:
    """The `worker_init_fn` of protected workers: sets handlers, then calls the user's.

    Args:
        user_init: The loader's own `worker_init_fn`, if any.
        main_decides: Flag shared with the main process.
    """

    def __init__(self, user_init: Callable[[int], object] | None, main_decides: Any) -> None:
        self._user_init = user_init
        self._main_decides = main_decides
        self._main_pid = os.getpid()

    def __call__(self, worker_id: int) -> None:
        if os.getppid() != self._main_pid:
            threading.Thread(target=self._end_with_main, daemon=True).start()
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        if self._user_init is not None:
            self._user_init(worker_id)

    def _end_with_main(self) -> None:
        while True:
            try:
                os.kill(self._main_pid, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(_CHECK_EVERY_S)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and not self._main_decides.value:
            os._exit(0)  # as torch's own handler in workers


def _after_fork() -> None:
    # A child that trains has workers of its own.
    global _ignores_signals, _main_decides
    _ignores_signals, _main_decides = False, None
    _inner_loaders.clear()


os.register_at_fork(after_in_child=_after_fork)
