"""Exceptions that users may catch, and texts in messages."""

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


def format_bytes(num_bytes: float) -> str:
    """Format a size, such as "1.9 GiB"."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while num_bytes >= 1024 and power + 1 < len(units):
        num_bytes, power = num_bytes / 1024, power + 1
    return f"{num_bytes:.{1 if power else 0}f} {units[power]}"
