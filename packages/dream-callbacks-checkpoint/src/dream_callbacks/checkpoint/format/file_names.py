"""Names of everything in a checkpoint directory. Pure: nothing is read or written here.

::

    checkpoints/
      run.lock                         who writes here
      step-0000000200/                 a checkpoint, complete: it got this name last
        MANIFEST.json                  what it is, with size and checksum of every other file
        state.json                     all that isn't a tensor
        rank-00000.json                what belongs to one rank alone
        index.json                     where in which file each piece of a tensor is
        __0_0.distcp                     tensors, as torch.distributed.checkpoint writes them
        .metadata                        its index: a pickle, for other tools; never read here
      metrics-0000000200.json          results of a validation that came after the save
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
    """Folder of the checkpoint of a step."""
    if step < 0:
        raise ValueError(f"step={step}: a checkpoint's step is at least 0")
    return f"step-{step:010d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's folder; None for any other name."""
    return _step_if(_STEP, name, checkpoint_name)


def metrics_name(step: int) -> str:
    """File beside a checkpoint with results that came after it."""
    return f"metrics-{step:010d}.json"


def step_of_metrics(name: str) -> int | None:
    """The step that a file of late results belongs to; None for any other name."""
    return _step_if(_METRICS, name, metrics_name)


def rank_name(rank: int) -> str:
    """File with what belongs to one rank alone."""
    return f"rank-{rank:05d}.json"


def temporary_name(step: int, unique: str) -> str:
    """Folder in which the checkpoint of a step is written."""
    return f".tmp-{checkpoint_name(step)}-{unique}"


def replaced_name(step: int, unique: str) -> str:
    """Folder that a checkpoint gets while another of the same step takes its place."""
    return f".old-{checkpoint_name(step)}-{unique}"


def step_of_replaced(name: str) -> int | None:
    """The step of a folder that was being replaced; None for any other name."""
    match = _REPLACED.fullmatch(name)
    return int(match[1]) if match else None


def trash_name(unique: str) -> str:
    """Folder that a checkpoint gets before it is deleted."""
    return f".trash-{unique}"


def probe_name(unique: str) -> str:
    """File that shows whether a directory can be written to."""
    return f".probe-{unique}"


def is_leftover(name: str) -> bool:
    """Whether a name is that of something unfinished, which the next run may delete."""
    return _LEFTOVER.fullmatch(name) is not None


def is_file_name(name: str) -> bool:
    """Whether a name can be that of a checkpoint's file: it can't lead anywhere else."""
    return _FILE.fullmatch(name) is not None and name not in (".", "..")


def _step_if(pattern: re.Pattern[str], name: str, spelled: Callable[[int], str]) -> int | None:
    match = pattern.fullmatch(name)
    if match is None:
        return None
    step = int(match[1])
    # One spelling per step: step-00000000200 would hide behind step-0000000200.
    return step if spelled(step) == name else None
