"""Names of files and folders in a checkpoint directory. Pure.

::

    checkpoints/
      run.lock                         lock of the run that writes here
      step-0000000200/                 a complete checkpoint: renamed to this at the end
        MANIFEST.json                  description, with size and checksum of every other file
        state.json                     state without tensors
        rank-00000.json                rank-local state
        index.json                     location of each piece of a tensor
        __0_0.distcp                   tensors, as torch.distributed.checkpoint writes them
        .metadata                      its index: a pickle, for other tools; never read here
      metrics-0000000200.json          validation results reported after the save
      .tmp-step-0000000300-<run>/      being written
      .old-step-0000000300-<run>/      being replaced
      .trash-<unique>/                 being deleted
"""

from __future__ import annotations

import re
from collections.abc import Callable

LOCK = "run.lock"
MANIFEST = "MANIFEST.json"
STATE = "state.json"
INDEX = "index.json"

_STEP = re.compile(r"step-(\d{10,})", re.ASCII)
_METRICS = re.compile(r"metrics-(\d{10,})\.json", re.ASCII)
_REPLACED = re.compile(r"\.old-step-(\d{10,})-[0-9a-f]+", re.ASCII)
_LEFTOVER = re.compile(
    r"\.(tmp-step-\d{10,}|trash|probe)-[0-9a-f]+|metrics-\d{10,}\.json\.[0-9a-f]+\.tmp", re.ASCII
)
_FILE = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)


def checkpoint_name(step: int) -> str:
    """Folder of a step's checkpoint."""
    if step < 0:
        raise ValueError(f"step={step}: a checkpoint's step is at least 0")
    return f"step-{step:010d}"


def step_of(name: str) -> int | None:
    """Step of a checkpoint folder; None for other names."""
    return _step_if(_STEP, name, checkpoint_name)


def metrics_name(step: int) -> str:
    """File with metrics reported after a save."""
    return f"metrics-{step:010d}.json"


def step_of_metrics(name: str) -> int | None:
    """Step of a late metrics file; None for other names."""
    return _step_if(_METRICS, name, metrics_name)


def rank_name(rank: int) -> str:
    """File with the rank-local state of a rank."""
    return f"rank-{rank:05d}.json"


def temporary_name(step: int, unique: str) -> str:
    """Folder to which a step's checkpoint is written."""
    return f".tmp-{checkpoint_name(step)}-{unique}"


def replaced_name(step: int, unique: str) -> str:
    """Folder of a checkpoint while it is replaced by another of the same step."""
    return f".old-{checkpoint_name(step)}-{unique}"


def step_of_replaced(name: str) -> int | None:
    """Step of a folder that was being replaced; None for other names."""
    match = _REPLACED.fullmatch(name)
    return int(match[1]) if match else None


def trash_name(unique: str) -> str:
    """Folder of a checkpoint that is being deleted."""
    return f".trash-{unique}"


def probe_name(unique: str) -> str:
    """File that tests whether a directory is writable."""
    return f".probe-{unique}"


def is_leftover(name: str) -> bool:
    """Whether a name belongs to an interrupted save or deletion; the next run deletes it."""
    return _LEFTOVER.fullmatch(name) is not None


def is_file_name(name: str) -> bool:
    """Whether a name is a valid file name in a checkpoint, without any path components."""
    return _FILE.fullmatch(name) is not None and name not in (".", "..")


def _step_if(pattern: re.Pattern[str], name: str, spelled: Callable[[int], str]) -> int | None:
    match = pattern.fullmatch(name)
    if match is None:
        return None
    step = int(match[1])
    # One spelling per step: step-00000000200 would hide behind step-0000000200.
    return step if spelled(step) == name else None
