"""Exceptions that users may catch."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint couldn't be saved or loaded. Raised on all ranks."""


class DamagedCheckpointError(ValueError):
    """A checkpoint on disk is corrupt or incomplete."""


def error_text(error: BaseException) -> str:
    """Message of an error, with its type unless it is a CheckpointError or ValueError."""
    text = str(error)
    if isinstance(error, (CheckpointError, ValueError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
