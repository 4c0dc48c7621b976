"""WeightsSource: a callback that can load the weights of a saved step for an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable

from dream_trainer.interface.trainer import Counters

CheckpointChoice = str | int | Path
"""Which checkpoint: "best" or "last" of the run, that of a step, or that at a path."""


@runtime_checkable
class WeightsSource(Protocol):
    """What `trainer.validate(checkpoint=…)` asks of a callback, such as CheckpointCallback."""

    def load_for_evaluation(self, checkpoint: CheckpointChoice) -> Counters:
        """Load a checkpoint's weights, and no other state, into the models. Collective.

        It must not disturb a run that is training in the run directory.

        Returns:
            The counters that were saved with them.
        """
