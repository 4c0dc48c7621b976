"""FindHostSyncsCallback: finds steps and lines that synchronize the host with the device."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from dream_callbacks.profile.sync_watch import CudaWatch, DispatchWatch, HostSync, SyncWatch
from dream_trainer.callbacks import Callback

logger = logging.getLogger(__name__)


class FindHostSyncsCallback(Callback):
    """Finds host–device syncs in some optimizer steps, including the hooks of other callbacks.

    During a sync the host can't queue operations, and the device idles. On CUDA, torch's sync
    debug mode reports syncs. On the CPU, where nothing waits, it finds the operations that would
    sync on a GPU, except copies; compiled models run uncompiled in these steps.

    Validation is excluded. Global rank 0 writes the places to the file and logs one line, as a
    warning if there were any; the watched steps are slower. Each `fit` watches again. Runs last in
    each hook, so that it sees the other callbacks.

    Args:
        log_file: File to write; a relative path is relative to the run directory.
        skip: Optimizer steps to skip at the beginning of `fit`.
        num_steps: Optimizer steps to watch.

    Raises:
        ValueError: If `skip` is below 0 or `num_steps` below 1.
    """

    after: ClassVar[set[type]] = {Callback}

    def __init__(
        self, log_file: str | Path = "host_syncs.log", *, skip: int = 5, num_steps: int = 10
    ) -> None:
        if skip < 0 or num_steps < 1:
            raise ValueError(
                f"skip={skip}, num_steps={num_steps}: at least 0 and at least 1 are required"
            )
        self.log_file = log_file
        self.skip = skip
        self.num_steps = num_steps
        self._syncs: dict[int, list[HostSync]] = {}
        self._watch: SyncWatch | None = None
        self._is_enabled = False

    @property
    def syncs(self) -> Mapping[int, Sequence[HostSync]]:
        """Syncs of this rank in the last `fit`, by step, numbered from 1."""
        return self._syncs

    @property
    def path(self) -> Path:
        """Path of the file, which is written after these steps."""
        return self.trainer.run_dir / self.log_file

    def pre_fit(self) -> None:
        self._pause()
        self._syncs = {}
        self._is_enabled = True
        self._first_step = self.trainer.global_step

    def pre_train_epoch(self) -> None:
        self._watch_if_due()

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if not self._is_enabled or self.trainer.is_accumulating_gradients:
            return
        step = self.trainer.global_step
        if self._watch is not None:
            self._syncs[step] = self._watch.take()
        if step - self._first_step == self.skip + self.num_steps:
            self._finish()
        self._watch_if_due()

    def pre_validation_epoch(self) -> None:
        self._pause()

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self._watch_if_due()

    def post_fit(self) -> None:
        self._finish()

    def _watch_if_due(self) -> None:
        if not self._is_enabled or self._watch is not None:
            return
        if self.trainer.global_step - self._first_step >= self.skip:
            on_cuda = self.trainer.world.device.type == "cuda"
            self._watch = CudaWatch() if on_cuda else DispatchWatch()
            self._watch.start()

    def _pause(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.stop()

    def _finish(self) -> None:
        self._pause()
        if self._is_enabled and self._syncs and self.trainer.world.is_global_zero:
            self._report()
        self._is_enabled = False

    def _report(self) -> None:
        places = Counter((s.operation, s.place) for syncs in self._syncs.values() for s in syncs)
        waiting = [step for step, syncs in self._syncs.items() if syncs]
        summary = (
            f"host–device syncs in {len(waiting)} of {len(self._syncs)} steps, "
            f"at {len(places)} place{'' if len(places) == 1 else 's'}"
        )
        lines = [f"# {self.trainer.experiment}: {summary}", f"steps with syncs: {waiting}"]
        lines += [
            f"{count:>6} ×  {operation}  at {place}"
            for (operation, place), count in places.most_common()
        ]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n".join([*lines, "", ""]))
        except OSError as error:
            logger.error("host syncs couldn't be written to %s: %s", self.path, error)
        level = logging.WARNING if places else logging.INFO
        logger.log(level, "%s; see %s", summary, self.path)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_watch": None}
