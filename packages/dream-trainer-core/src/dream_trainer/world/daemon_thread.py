"""call_in_daemon_thread: call a function in a thread, in a process that may end without it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def call_in_daemon_thread(name: str, function: Callable[..., T], *args: object) -> Future[T]:
    """Call a function in a thread of its own, and return what will have become of it.

    Unlike those of a ThreadPoolExecutor, the thread isn't waited for when Python exits: a disk that
    doesn't answer must not keep a run from ending.

    Args:
        name: Of the thread.
        function: What to call.
        *args: With these.
    """
    future: Future[T] = Future()

    def call() -> None:
        try:
            result = function(*args)
        except BaseException as error:  # noqa: BLE001  # whoever asks for the result gets it
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=call, name=name, daemon=True).start()
    return future
