"""Coordination of the ranks of a checkpoint: an error of one is a CheckpointError on all."""

from __future__ import annotations

from dream_callbacks.checkpoint.errors import CheckpointError, error_text
from dream_trainer.world import Coordination, RankFailure, World


class RankCheckpointError(CheckpointError, RankFailure):
    """A checkpoint couldn't be saved or loaded on some ranks; the message says on which."""


def coordination(world: World, kind: str = "checkpoint") -> Coordination:
    """The ranks of a run on the group `kind`. Collective the first time.

    Args:
        world: Launched.
        kind: Name of the group; each thread needs its own.
    """
    return Coordination(world, kind, raises=RankCheckpointError, describe=error_text)
