"""AsyncCheckpointCallback: training waits for a copy in memory, not for the disk."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dream_callbacks.checkpoint.callback import CheckpointCallback, Session
from dream_callbacks.checkpoint.config import CheckpointParameters
from dream_callbacks.checkpoint.errors import CheckpointError
from dream_callbacks.checkpoint.manager import Facts, Save, Store, coordination
from dream_trainer.world import Coordination

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.checkpoint.metadata import MetadataIndex

logger = logging.getLogger(__name__)

_PATIENCE_S = 60.0
"""How long a run that ends with an error waits for the save that is in flight."""

_STALL_S = 1.0
"""Who waits longer for the save before is told so."""


class AsyncCheckpointCallback(CheckpointCallback):
    """A CheckpointCallback that writes beside the training.

    A save copies this rank's part of the state to host memory; a thread writes and commits it.
    Never two are in flight: a save that is due earlier waits for the one before it. A checkpoint
    is called saved when it lasts, as with CheckpointCallback. A save that fails is reported at the
    next occasion on which all ranks meet, about a second later, and at the end. The end of the
    run, a signal and an error wait for the save in flight.

    Memory: one copy of this rank's part of the state on the host, kept for the next save; pinned
    where the model is on a CUDA device.

    Args:
        parameters: As for CheckpointCallback.
    """

    _flight: _Flight | None = None
    _background: Coordination | None = None

    def __init__(self, parameters: CheckpointParameters | None = None) -> None:
        super().__init__(parameters)
        self._buffers: dict[MetadataIndex, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_flight", "_background")
        state = {k: v for k, v in super().__getstate__().items() if k not in left_out}
        return {**state, "_buffers": {}}

    def on_exception(self, exception: BaseException) -> None:
        flight, session = self._flight, self._session
        if flight is not None and session is not None:
            flight.thread.join(_PATIENCE_S)
            if flight.error is not None:
                self._flight = None
                logger.warning("%s", self._give_up(flight))
            elif flight.thread.is_alive():
                step = flight.save.facts.step
                logger.warning("step %d isn't written after %.0f s: given up", step, _PATIENCE_S)
        super().on_exception(exception)

    def _new_session(self) -> Session:
        session = super()._new_session()
        self._background = coordination(self.trainer.world, "checkpoint-background")
        return session

    def _close(self) -> None:
        super()._close()
        self._flight = None
        self._buffers.clear()

    def _write(self, session: Session, facts: Facts) -> None:
        """Copy the state, and let a thread do the rest."""
        assert self._flight is None, "_save has settled it"
        began_s = time.monotonic()
        save = session.store.prepare(self.trainer.state_dict, facts)
        session.store.stage(save, self._buffers)
        assert self._background is not None
        self._flight = _Flight(session.store, save, self._background, self._saved_step, began_s)
        waited_s = time.monotonic() - began_s
        logger.debug("step %d is being saved; training waited %.3f s", facts.step, waited_s)
        self._flight.thread.start()

    def _has_failed(self) -> bool:
        return self._flight is not None and self._flight.error is not None

    def _settle(self, session: Session) -> None:
        flight = self._flight
        if flight is None:
            return
        began_s = time.monotonic()
        flight.thread.join()
        waited_s = time.monotonic() - began_s
        if waited_s > _STALL_S and self.trainer.world.is_global_zero:
            logger.info("waited %.1f s until step %d was written", waited_s, flight.save.facts.step)
        self._flight = None
        if flight.error is not None:
            self._report(self._give_up(flight), flight.error)

    def _give_up(self, flight: _Flight) -> str:
        """Let the step of a save that failed count as not saved; return what to say of it."""
        assert flight.error is not None
        self._saved_step = flight.saved_step_before
        return self._failure_text(flight.save.facts.step, flight.error)

    def _add_late_metrics(self, session: Session, step: int) -> None:
        flight = self._flight
        if flight is None or not flight.take_metrics(session.metrics):
            super()._add_late_metrics(session, step)


class _Flight:
    """A save that is being written by a thread."""

    def __init__(
        self, store: Store, save: Save, ranks: Coordination, saved_step_before: int, began_s: float
    ) -> None:
        self.save = save
        self.saved_step_before = saved_step_before
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._store = store
        self._ranks = ranks
        self._began_s = began_s
        self._changing = threading.Lock()
        self._late_metrics: dict[str, float] = {}
        self._is_committed = False

    def take_metrics(self, metrics: Mapping[str, float]) -> bool:
        """Keep results for the time when the checkpoint is there; False if it is there already."""
        with self._changing:
            if not self._is_committed:
                self._late_metrics.update(metrics)
            return not self._is_committed

    def _run(self) -> None:
        try:
            self._store.write(self.save, self._ranks)
            with self._changing:
                self._is_committed = True
            if self._ranks.is_global_zero:
                facts = self.save.facts
                self._store.finish(facts, self._late_metrics, time.monotonic() - self._began_s)
        except CheckpointError as error:
            self.error = error
        except BaseException as error:  # noqa: BLE001  # a thread has nobody to raise it to
            self.error = CheckpointError(f"{type(error).__name__}: {error}")
