"""Errors that a user may want to catch."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint couldn't be saved or loaded. The same on all ranks."""


class DamagedCheckpointError(ValueError):
    """What is on disk isn't what was saved."""


def error_text(error: BaseException) -> str:
    """The message of an error, after its type where the message alone says too little."""
    text = str(error)
    if isinstance(error, (CheckpointError, ValueError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
