"""Errors that a user may want to catch."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint couldn't be saved or loaded. The same on all ranks."""


class DamagedCheckpointError(ValueError):
    """What is on disk isn't what was saved."""
