"""AsyncCheckpointCallback: training waits for a copy to host memory, not for the disk."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dream_callbacks.checkpoint.callback import CheckpointCallback, RunState
from dream_callbacks.checkpoint.config import CheckpointParameters
from dream_callbacks.checkpoint.errors import CheckpointError
from dream_callbacks.checkpoint.manager import CheckpointManager, PendingSave, coordination
from dream_callbacks.checkpoint.staging_memory import StagingMemory
from dream_trainer.world import Coordination

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import MetadataIndex

logger = logging.getLogger(__name__)

_PATIENCE_S = 60.0
"""How long a run that ends with an error waits for the save in flight."""

_STALL_S = 1.0
"""Longer waits for the previous save are logged."""


class AsyncCheckpointCallback(CheckpointCallback):
    """CheckpointCallback that writes in a background thread while training continues.

    A save copies this rank's shard of the state to host memory; a thread writes and commits it.
    At most one save is in flight: the next one waits for it. A step is reported as saved once its
    checkpoint is durable, as with CheckpointCallback. A failed save is reported when the ranks next
    exchange requests, about a second later, or at the end. The end of the run, a signal and an
    error wait for the save in flight.

    Memory: one copy of this rank's shard of the state on the host, reused by the next save and
    freed at the end of the run; pinned if the model is on a CUDA device.

    Args:
        parameters: Same as for CheckpointCallback.
    """

    _background_save: _BackgroundSave | None = None
    _background_ranks: Coordination | None = None

    def __init__(self, parameters: CheckpointParameters | None = None) -> None:
        super().__init__(parameters)
        self._memory: StagingMemory[MetadataIndex] = StagingMemory()

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_background_save", "_background_ranks")
        state = {k: v for k, v in super().__getstate__().items() if k not in left_out}
        return {**state, "_memory": StagingMemory()}

    def on_exception(self, exception: BaseException) -> None:
        background_save, run = self._background_save, self._run
        if background_save is not None and run is not None:
            background_save.thread.join(_PATIENCE_S)
            if background_save.error is not None:
                self._background_save = None
                logger.warning("%s", self._give_up(background_save))
            elif background_save.thread.is_alive():
                step = background_save.step
                logger.warning(
                    "step %d wasn't written within %.0f s; exiting without it", step, _PATIENCE_S
                )
        super().on_exception(exception)

    def _new_run(self) -> RunState:
        run = super()._new_run()
        self._background_ranks = coordination(self.trainer.world, "checkpoint-background")
        return run

    def _close(self) -> None:
        super()._close()
        self._background_save = None
        self._memory.release()

    def _write(self, run: RunState, reason: str) -> None:
        """Copy the state; a thread writes and commits it."""
        assert self._background_save is None, "_save has waited for it"
        began_s = time.monotonic()
        save = self._prepare(run, reason)
        run.manager.stage(save, self._memory)
        assert self._background_ranks is not None
        self._background_save = _BackgroundSave(
            run.manager, save, self._background_ranks, self._saved_step, began_s
        )
        waited_s = time.monotonic() - began_s
        logger.debug("step %d is being saved; training waited %.3f s", save.manifest.step, waited_s)
        self._background_save.thread.start()

    def _has_failed(self) -> bool:
        return self._background_save is not None and self._background_save.error is not None

    def _settle(self, run: RunState) -> None:
        background_save = self._background_save
        if background_save is None:
            return
        began_s = time.monotonic()
        background_save.thread.join()
        waited_s = time.monotonic() - began_s
        if waited_s > _STALL_S and self.trainer.world.is_global_zero:
            logger.info("waited %.1f s until step %d was written", waited_s, background_save.step)
        self._background_save = None
        if background_save.error is not None:
            self._report(self._give_up(background_save), background_save.error)

    def _give_up(self, background_save: _BackgroundSave) -> str:
        """Mark the step of a failed save as not saved; the message about it."""
        assert background_save.error is not None
        self._saved_step = background_save.saved_step_before
        return self._failure_text(background_save.step, background_save.error)

    def _add_late_metrics(self, run: RunState, step: int) -> None:
        background_save = self._background_save
        if background_save is None or not background_save.take_metrics(run.metrics):
            super()._add_late_metrics(run, step)


class _BackgroundSave:
    """A save written and committed by a thread."""

    def __init__(
        self,
        manager: CheckpointManager,
        save: PendingSave,
        ranks: Coordination,
        saved_step_before: int,
        began_s: float,
    ) -> None:
        self.step = save.manifest.step
        self.saved_step_before = saved_step_before
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._manager = manager
        self._save = save
        self._ranks = ranks
        self._began_s = began_s
        self._changing = threading.Lock()
        self._late_metrics: dict[str, float] = {}
        self._is_committed = False

    def take_metrics(self, metrics: Mapping[str, float]) -> bool:
        """Keep metrics until the checkpoint is committed; False if it already is."""
        with self._changing:
            if not self._is_committed:
                self._late_metrics.update(metrics)
            return not self._is_committed

    def _run(self) -> None:
        try:
            self._manager.world.use_device()
            self._manager.write(self._save, self._ranks)
            with self._changing:
                self._is_committed = True
            if self._ranks.is_global_zero:
                took_s = time.monotonic() - self._began_s
                self._manager.finish(self._save, self._late_metrics, took_s)
        except CheckpointError as error:
            self.error = error
        except BaseException as error:  # noqa: BLE001  # reported by the main thread
            self.error = CheckpointError(f"{type(error).__name__}: {error}")
