"""Ranks: what the ranks do together for a checkpoint, so that an error of one is known to all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from dream_callbacks.checkpoint.beside import beside
from dream_callbacks.checkpoint.errors import CheckpointError
from dream_trainer.world import World

T = TypeVar("T")
R = TypeVar("R")

_BEAT_S = 1.0
"""How long a rank works before it tells the others that it still does."""


class Ranks:
    """The ranks of a run, on a CPU group of their own.

    Every method is collective. Where the world has no group, since there is nobody else to talk to,
    nothing is sent: in a world of one, and in a simulated one, whose other ranks do what this does.

    Args:
        world: Launched.
        kind: Name of the group. Two threads must not use the same one at once.
    """

    def __init__(self, world: World, kind: str) -> None:
        self.rank = world.rank
        self.size = world.world_size
        self._group: ProcessGroup | None = world.group(kind)

    @property
    def is_zero(self) -> bool:
        return self.rank == 0

    @property
    def _stands_for_zero(self) -> bool:
        return self.is_zero or self._group is None

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self._group is None:
            return [value] * self.size
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: T) -> T:
        """The value of rank 0."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, group=self._group)
        return box[0]

    def maximum(self, values: Sequence[int]) -> list[int]:
        """For each of some numbers, the largest that a rank has."""
        if self._group is None:
            return list(values)
        box = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self._group)
        return [int(value) for value in box.tolist()]

    def each(self, function: Callable[[], T]) -> T:
        """Call a function on each rank, and return what it returned on this one.

        Raises:
            CheckpointError: On all ranks, if it raised on one.
        """
        value, error = self._outcome(function)
        self._raise(error, self.all_gather(_text(error)))
        return value

    def each_slowly(self, function: Callable[[], T]) -> T:
        """As `each`, for what may take minutes: no rank waits longer than a collective may.

        The function runs in a thread; meanwhile the ranks tell each other that they live.
        """
        if self._group is None:
            return self.each(function)
        outcome: Future[tuple[T, _Failure | None]]
        outcome = beside("checkpoint-part", self._outcome, function)
        while True:
            wait([outcome], _BEAT_S)
            if all(self.all_gather(outcome.done())):
                break
        value, error = outcome.result()
        self._raise(error, self.all_gather(_text(error)))
        return value

    def gather(self, function: Callable[[], T]) -> list[T]:
        """Call a function on each rank, and return what it returned on all of them.

        Raises:
            CheckpointError: On all ranks, if it raised on one.
        """
        return self.all_gather(self.each(function))

    def on_zero(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0, and give all ranks what it returned.

        Raises:
            CheckpointError: On all ranks, if it raised.
        """
        value, error = self._outcome(function) if self._stands_for_zero else (None, None)
        value, text = self.broadcast((value, _text(error)))
        self._raise(error, [text])
        return value  # type: ignore[return-value]  # rank 0's

    def via_zero(self, value: T, function: Callable[[Sequence[T]], Sequence[R]]) -> R:
        """Gather a value of each rank on rank 0, and give each rank its part of the answer.

        Args:
            value: Picklable.
            function: Called on rank 0 with the values of all ranks; returns one for each.

        Raises:
            CheckpointError: On all ranks, if the function raised.
        """
        gathered: list[Any] = [value] * self.size
        if self._group is not None:
            gathered = [None] * self.size
            dist.gather_object(value, gathered if self.is_zero else None, dst=0, group=self._group)
        box: list[Any] = [None]
        error = None
        if self._stands_for_zero:
            answers, error = self._outcome(lambda: list(function(gathered)))
            text = _text(error)
            parts = [(None, text)] * self.size if error else [(part, None) for part in answers]
            box = [parts[self.rank]]
        if self._group is not None:
            parts_or_none = parts if self.is_zero else None
            dist.scatter_object_list(box, parts_or_none, src=0, group=self._group)
        answer, text = box[0]
        self._raise(error, [text])
        return answer  # type: ignore[no-any-return]  # what the function returned

    def _outcome(self, function: Callable[[], T]) -> tuple[T, _Failure | None]:
        try:
            return function(), None
        except Exception as error:  # noqa: BLE001  # raised on all ranks
            where = f"rank {self.rank}: " if self.size > 1 else ""
            # A failure of all ranks names its ranks already.
            text = str(error) if isinstance(error, RankFailure) else where + described(error)
            return None, _Failure(text, error)  # type: ignore[return-value]  # never read

    def _raise(self, own: _Failure | None, texts: Sequence[str | None]) -> None:
        found = list(dict.fromkeys(text for text in texts if text is not None))
        if found:
            more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
            cause = None if own is None else own.error
            raise RankFailure("; ".join(found[:4]) + more) from cause


class RankFailure(CheckpointError):
    """Some ranks failed; the message says how, and of several ranks which."""


class _Failure:
    def __init__(self, text: str, error: Exception) -> None:
        self.text = text
        self.error = error


def _text(failure: _Failure | None) -> str | None:
    return None if failure is None else failure.text


def described(error: BaseException) -> str:
    """An error in one line, with its kind where the text alone says too little."""
    text = str(error)
    if isinstance(error, (CheckpointError, ValueError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
