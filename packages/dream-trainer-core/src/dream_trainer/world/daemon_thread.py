"""Function calls in daemon threads, which don't delay the exit of the process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def call_in_daemon_thread(name: str, function: Callable[..., T], *args: object) -> Future[T]:
    """Call a function in a thread of its own and return a future of its result.

    Unlike the threads of a ThreadPoolExecutor, it isn't joined when Python exits: a disk that hangs
    must not block the exit.

    Args:
        name: Name of the thread.
        function: Called as `function(*args)`.
        *args: Positional arguments of the function.
    """
    future: Future[T] = Future()

    def call() -> None:
        try:
            result = function(*args)
        except BaseException as error:  # noqa: BLE001  # raised by future.result()
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=call, name=name, daemon=True).start()
    return future
