"""A callback that records every hook that is called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from dream_trainer.callbacks import Callback
from dream_trainer.callbacks.callback import CONTEXTS, HOOKS


def _hook(name: str) -> Any:
    def record(self: Any, *args: Any) -> None:
        self.record(name, args)

    return record


def _context(name: str) -> Any:
    @contextlib.contextmanager
    def record(self: Any) -> Iterator[None]:
        self.record(f"enter {name}", ())
        try:
            yield
        finally:
            self.record(f"exit {name}", ())

    return record


class Recorder(Callback[Any]):
    """Records the names of hooks in `events` and their arguments in `arguments`."""

    def __init__(self, *, fail_in: str | None = None, error: BaseException | None = None) -> None:
        self.events: list[str] = []
        self.arguments: dict[str, list[tuple[Any, ...]]] = {}
        self.fail_in = fail_in
        self.error = error or ValueError("planned")

    def record(self, name: str, args: tuple[Any, ...]) -> None:
        self.events.append(name)
        self.arguments.setdefault(name, []).append(args)
        if name == self.fail_in:
            self.fail_in = None
            raise self.error

    locals().update({name: _context(name) if name in CONTEXTS else _hook(name) for name in HOOKS})
