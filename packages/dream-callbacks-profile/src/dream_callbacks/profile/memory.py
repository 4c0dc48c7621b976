"""MemorySnapshotCallback: snapshots of CUDA memory for PyTorch's memory viewer."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from dream_trainer.callbacks import Callback

logger = logging.getLogger(__name__)


class MemorySnapshotCallback(Callback):
    """Records allocations of the CUDA device during some optimizer steps, with their stacks.

    The snapshot is written after these steps, at the end of `fit`, or when the device runs out of
    memory while recording; `num_steps=None` records until the end, so that the snapshot shows the
    cause. Costs some microseconds per allocation while it records. Each `fit` records again. On
    the CPU it only logs a warning.

    Open the file at https://pytorch.org/memory_viz, which doesn't upload it.

    Args:
        skip: Optimizer steps to skip at the beginning of `fit`.
        num_steps: Optimizer steps to record. None: until the end.
        ranks: Global ranks to record. None: all.
        output_dir: Directory for snapshots. Default: `memory` in the run directory.
        max_entries: Maximum number of allocations and frees to keep; older ones are dropped.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        skip: int = 3,
        *,
        num_steps: int | None = 2,
        ranks: Collection[int] | None = (0,),
        output_dir: str | Path | None = None,
        max_entries: int = 200_000,
    ) -> None:
        lowest = {"skip": (skip, 0), "num_steps": (num_steps, 1), "max_entries": (max_entries, 1)}
        for name, (value, minimum) in lowest.items():
            if value is not None and value < minimum:
                raise ValueError(f"{name}={value}: at least {minimum} is required")
        self.skip = skip
        self.num_steps = num_steps
        self.ranks = ranks
        self.output_dir = output_dir
        self.max_entries = max_entries
        self._is_recording = False
        self._is_enabled = False

    def pre_fit(self) -> None:
        self._stop()
        self._num_steps_done = 0
        self._is_enabled = self.ranks is None or self.trainer.world.rank in self.ranks
        device = self.trainer.world.device
        if self._is_enabled and device.type != "cuda":
            self._is_enabled = False
            logger.warning(
                "this run is on %s, but PyTorch only records allocations of CUDA devices: no "
                "memory snapshot is written; BenchmarkCallback reports the process's peak memory",
                device,
            )

    def pre_train_epoch(self) -> None:
        self._start_if_due()

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if not self._is_enabled or self.trainer.is_accumulating_gradients:
            return
        self._num_steps_done += 1
        if self.num_steps is not None and self._num_steps_done == self.skip + self.num_steps:
            self._write(f"step{self.trainer.global_step}")
            self._stop()
            self._is_enabled = False
        self._start_if_due()

    def on_exception(self, exception: BaseException) -> None:
        if isinstance(exception, torch.OutOfMemoryError):
            self._write(f"step{self.trainer.global_step}.out_of_memory")
            self._stop()

    def post_fit(self) -> None:
        self._write(f"step{self.trainer.global_step}")
        self._stop()
        self._is_enabled = False

    def _start_if_due(self) -> None:
        if self._is_enabled and not self._is_recording and self._num_steps_done >= self.skip:
            from torch.cuda.memory import _record_memory_history  # documented, but not public

            _record_memory_history(max_entries=self.max_entries)
            self._is_recording = True

    def _write(self, name: str) -> None:
        if not self._is_recording:
            return
        from torch.cuda.memory import _dump_snapshot  # documented, but not public

        folder = Path(self.output_dir or self.trainer.run_dir / "memory")
        path = folder / f"rank{self.trainer.world.rank}.{name}.pickle"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _dump_snapshot(str(path))
        except OSError as error:
            logger.error("a memory snapshot couldn't be written; the run continues: %s", error)
        else:
            logger.info("wrote %s; open it at https://pytorch.org/memory_viz", path)

    def _stop(self) -> None:
        if self._is_recording:
            from torch.cuda.memory import _record_memory_history

            _record_memory_history(enabled=None)
            self._is_recording = False

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_is_recording": False}
