"""A process group whose all-reduces complete no earlier than a fixed time after their start.

For benchmarks of the cost of latency. The all-reduces are real; they complete late on each rank, as
on a slow network, without using the CPU.
"""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Work

from dream_trainer.callbacks import Callback


class DelayedWork(Work):
    """A collective in flight that completes no earlier than `end_s`."""

    def __init__(self, work: Work, end_s: float, delays: DelayCollectives) -> None:
        super().__init__()
        self._work = work
        self._end_s = end_s
        self._delays = delays

    def is_completed(self) -> bool:
        return time.perf_counter() >= self._end_s and self._work.is_completed()

    def wait(self, timeout: Any = None) -> bool:
        start_s = time.perf_counter()
        self._work.wait()
        time.sleep(max(0.0, self._end_s - time.perf_counter()))
        self._delays.note_wait(time.perf_counter() - start_s)
        return True


class DelayedGroup(dist.ProcessGroup):
    """The all-reduces of another group, delayed; it has no other collectives."""

    def __init__(self, group: dist.ProcessGroup, delays: DelayCollectives) -> None:
        super().__init__(group.rank(), group.size())
        self._group = group
        self._delays = delays

    def allreduce(self, tensors: Any, options: Any) -> DelayedWork:
        self._delays.note_start()
        end_s = time.perf_counter() + self._delays.delay_s
        return DelayedWork(self._group.allreduce(tensors, options), end_s, self._delays)


class DelayCollectives(Callback[Any]):
    """Delays the all-reduces of one of the world's groups.

    Args:
        kind: Which group: `trainer.world.group(kind)`.
        delay_s: Least duration of an all-reduce.

    Attributes:
        steps: Batch indices in the last epoch with the start of an all-reduce or a wait for one.
        waits_s: Seconds that each wait took, by batch index.
    """

    def __init__(self, kind: str, delay_s: float) -> None:
        self.kind = kind
        self.delay_s = delay_s
        self.steps: set[int] = set()
        self.waits_s: list[tuple[int, float]] = []

    def pre_fit(self) -> None:
        group = self.trainer.world.group(self.kind)
        if not isinstance(group, DelayedGroup):
            groups = self.trainer.world._groups  # noqa: SLF001  # only a benchmark replaces one
            groups[self.kind] = DelayedGroup(group, self)

    def pre_train_epoch(self) -> None:
        self.steps, self.waits_s = set(), []

    def note_start(self) -> None:
        self.steps.add(self._batch_idx)

    def note_wait(self, duration_s: float) -> None:
        self.steps.add(self._batch_idx)
        self.waits_s.append((self._batch_idx, duration_s))

    @property
    def _batch_idx(self) -> int:
        """Index of the last batch of the loader; -1 before the first."""
        return len(self.trainer.loader.times_s) - 1
