"""Exceptions that users may catch, and texts in messages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MAX_NAMES = 10
"""Names listed per kind in an error."""


class CheckpointError(RuntimeError):
    """A checkpoint couldn't be saved or loaded. Raised on all ranks."""


class DamagedCheckpointError(ValueError):
    """A checkpoint on disk is corrupt or incomplete."""


def listed(what: str, names: list[str]) -> Iterator[str]:
    """A line of names for an error; none without names."""
    if names:
        more = f" … and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        yield f"  {what}: {', '.join(names[:MAX_NAMES])}{more}"


def failed_save_text(
    error: BaseException, step: int, directory: str | Path, newest_step: int
) -> str:
    """Message about a failed save.

    Args:
        error: Why it failed.
        step: Step that couldn't be saved.
        directory: Checkpoint directory.
        newest_step: Step of the newest checkpoint; -1 if there is none.
    """
    newest = (
        f"the newest one is that of step {newest_step}" if newest_step > 0 else "there is none yet"
    )
    advice = (
        ""  # the error names the invalid value of the state
        if isinstance(error.__cause__, (TypeError, ValueError))
        else ". Check the free space (keep_last and keep_top_k limit the number of "
        "checkpoints) and that the directory is writable"
    )
    return (
        f"the checkpoint of step {step} couldn't be saved in {directory}: "
        f"{error_text(error)}; {newest}{advice}"
    )


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
