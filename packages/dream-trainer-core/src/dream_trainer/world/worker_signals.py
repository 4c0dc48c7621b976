"""Signals in the worker processes of data loaders: the main process decides when a run ends.

torchrun's agent, a scheduler, `docker stop` and a shell's Ctrl-C signal the whole process group. A
worker that dies of it takes the main process with it ("DataLoader worker is killed by signal"),
before that has saved anything. So during a run, workers ignore the signals that core handles.

Workers are started with these signals blocked, which a forked and a spawned process inherits, and
unblock them once their handlers are set, in the `worker_init_fn`. They use handlers instead of
ignoring or blocking the signals for good: programs that a worker starts, a video decoder for
example, must not inherit that.

A worker still ends when its main process has gone, by any signal: torch's worker loop looks for its
parent every 5 s. The parent of a worker from the forkserver is that server, which lives as long as
one of its children; there a thread looks for the main process. After the run a worker ends on
SIGTERM, which is how multiprocessing ends daemons.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker, sharedctypes
from types import FrameType
from typing import Any

_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
_LOOK_EVERY_S = 5.0  # as torch's worker loop
_IN_FORKSERVER = "dream_trainer.world.worker_forkserver"

_is_held = False
_main_decides: Any = None
"""`_is_held` in memory that workers share with this process; made when there are workers."""


def hold_workers() -> None:
    """From now on, workers that `protected_workers` starts ignore the signals."""
    _set_held(True)


def release_workers() -> None:
    """From now on, they end on SIGTERM."""
    _set_held(False)


def _set_held(value: bool) -> None:
    global _is_held  # noqa: PLW0603  # signals belong to the process
    _is_held = value
    if _main_decides is not None:
        _main_decides.value = value


def _shared_flag() -> Any:
    global _main_decides  # noqa: PLW0603
    if _main_decides is None:
        _main_decides = sharedctypes.RawValue(ctypes.c_bool, _is_held)
    return _main_decides


@contextlib.contextmanager
def protected_workers(loader: Any) -> Iterator[None]:
    """Inside, `iter(loader)` starts workers that leave it to this process what signals mean.

    Nothing changes for a loader without worker processes, and where no run handles the signals.

    Args:
        loader: Workers are those of a `torch.utils.data.DataLoader`.
    """
    if not (_is_held and _has_workers(loader)):
        yield
        return
    with _starting_with(loader, _WorkerInit(loader.worker_init_fn, _shared_flag())):
        # Otherwise the tracker is started inside, and unblocks signals (Python < 3.12).
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _has_workers(loader: Any) -> bool:
    from torch.utils.data import DataLoader

    return isinstance(loader, DataLoader) and loader.num_workers > 0


@contextlib.contextmanager
def _starting_with(loader: Any, init: _WorkerInit) -> Iterator[None]:
    """Inside, the loader has another `worker_init_fn`."""
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
    """Let the forkserver import a module when it starts; without effect if it runs already."""
    # There is no public way to add to the modules that a user has chosen.
    server: Any = forkserver._forkserver  # noqa: SLF001
    modules: list[str] = server._preload_modules  # noqa: SLF001
    if module not in modules:
        forkserver.set_forkserver_preload([*modules, module])


class _WorkerInit:
    """The `worker_init_fn` of protected workers: sets handlers, then calls the user's.

    Args:
        user_init: The loader's own, if it has one.
        main_decides: Shared with the main process.
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
            time.sleep(_LOOK_EVERY_S)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and not self._main_decides.value:
            os._exit(0)  # as torch's own handler in workers
