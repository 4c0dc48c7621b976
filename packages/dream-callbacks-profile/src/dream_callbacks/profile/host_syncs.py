"""FindHostSyncsCallback: which steps wait for the device, and in which line."""

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
    """Finds where the host waits for the device in some optimizer steps, everyone's hooks included.

    A host that waits can't queue the next operations, and the device runs dry. On CUDA the
    driver says when it waits. On the CPU, where nothing waits, the operations are found that
    would on a GPU, except copies; for these steps compiled models run uncompiled.

    Validation is left out. Global rank 0 writes the places to the file and logs a line, as a
    warning if there were any; the steps themselves are slower meanwhile. Each `fit` looks anew.
    The last in each hook, so that it sees what the others do.

    Args:
        log_file: Where to write; a relative path lies in the run directory.
        skip: Optimizer steps at the beginning of `fit` that are left out.
        num_steps: Optimizer steps to look at.

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
        self._is_wanted = False

    @property
    def syncs(self) -> Mapping[int, Sequence[HostSync]]:
        """What was found on this rank in the last `fit`: by step, numbered from 1."""
        return self._syncs

    @property
    def path(self) -> Path:
        """The file; it is there once the steps are done."""
        return self.trainer.run_dir / self.log_file

    def pre_fit(self) -> None:
        self._pause()
        self._syncs = {}
        self._is_wanted = True
        self._first_step = self.trainer.global_step

    def pre_train_epoch(self) -> None:
        self._watch_if_due()

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if not self._is_wanted or self.trainer.is_accumulating_gradients:
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
        num_done = self.trainer.global_step - self._first_step
        if self._is_wanted and self._watch is None and num_done >= self.skip:
            on_cuda = self.trainer.world.device.type == "cuda"
            self._watch = CudaWatch() if on_cuda else DispatchWatch()
            self._watch.start()

    def _pause(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.stop()

    def _finish(self) -> None:
        self._pause()
        if self._is_wanted and self._syncs and self.trainer.world.is_global_zero:
            self._report()
        self._is_wanted = False

    def _report(self) -> None:
        places = Counter((s.operation, s.place) for syncs in self._syncs.values() for s in syncs)
        waiting = [step for step, syncs in self._syncs.items() if syncs]
        summary = (
            f"the host waits for the device in {len(waiting)} of {len(self._syncs)} steps, "
            f"at {len(places)} place{'' if len(places) == 1 else 's'}"
        )
        lines = [f"# {self.trainer.experiment}: {summary}", f"steps that wait: {waiting}"]
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
