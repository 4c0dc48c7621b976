"""Runs for which the disk is full for some steps, and their log messages."""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny_runs import tiny

from dream_trainer.callbacks import Callback, Every


class Limit(Callback[Any]):
    """Limits the size of files from a step on, as a full disk does."""

    def __init__(self, step: int, num_bytes: int, until: int = 10**9) -> None:
        self.step = step
        self.num_bytes = num_bytes
        self.until = until

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.trainer.global_step in (self.step, self.until):
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()
        if self.trainer.global_step == self.step:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, most))
        if self.trainer.global_step == self.until:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@contextlib.contextmanager
def captured_messages(level: int) -> Iterator[list[str]]:
    """Log messages of at least a level that are logged inside."""
    messages: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dream_callbacks.checkpoint")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def full_disk(
    root: Path,
    limit: Callback[Any] | None = None,
    level: int = logging.WARNING,
    **fields: Any,
) -> list[str]:
    """Log messages of a run with a full disk from step 5 to 9. Needs a process of its own."""
    limit = limit or Limit(5, 20_000, until=9)
    fields = {"every": Every(steps=2), **fields}
    with captured_messages(level) as messages:
        tiny(root, limit, **fields).fit()
    return messages
