"""All private names of torch that this package uses, each behind a function that says what for.

None has a public counterpart in torch 2.11 to 2.13. Module hooks don't show what FSDP2 does: they
run again when activations are recomputed, and torch.compile would have to trace them. A custom
all-gather sees prefetches, and none for modules that are kept. `tests/test_torch_private.py` tests
each name, so a torch that renames or changes one fails there first.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Sequence
from typing import Any

from torch.distributed.fsdp import FSDPModule

FSDP_LOGGER = "torch.distributed.fsdp.fully_shard"
"""Where FSDP2 logs, at level DEBUG, that a module begins forward or backward."""

_MESSAGE = re.compile(
    r"FSDP::pre_(?P<pass>forward|backward)"
    r"(?: \((?P<name>[^)]*)\))?"  # none for a root
    r"(?: \[pg=.*\])?"  # one of several parameter groups
)

WRAPPED_MODULE_NAMES = ("_orig_mod", "_checkpoint_wrapped_module")
"""Attributes in which torch.compile and checkpoint wrappers hold the wrapped module."""

_MAX_FRAMES = 20
"""How far out on the stack the caller of the logger is searched; it is at about the fifth frame."""


def logged_pass(record: logging.LogRecord) -> tuple[str, list[str]] | None:
    """What a record of FSDP_LOGGER says.

    Returns:
        "forward" or "backward", and the names below the root of the modules that begin it, ""
        for a root; those that were sharded together are several. None for any other record.
    """
    match = _MESSAGE.match(record.getMessage())
    return None if match is None else (match["pass"], (match["name"] or "").split(", "))


def logging_module(candidates: Sequence[FSDPModule]) -> int | None:
    """Index of the module whose forward or backward calls the logger, found on the stack."""
    frame = inspect.currentframe()
    for _ in range(_MAX_FRAMES):
        frame = frame and frame.f_back  # this function's own frame has the candidates
        if frame is None:
            break
        for value in frame.f_locals.values():
            modules = getattr(value, "modules", None)  # of an FSDP parameter group, a tuple
            for index, candidate in enumerate(candidates):
                if value is candidate or (isinstance(modules, tuple) and candidate in modules):
                    return index
    return None


def is_in_backward() -> bool:
    """Whether autograd runs a backward in this thread."""
    from torch._C import _current_graph_task_id

    return _current_graph_task_id() != -1


def unshard_asynchronously(root: FSDPModule) -> None:
    """Let an all-gather on the CPU return before it is done, as it does on CUDA."""
    switch: Any = getattr(root, "_set_unshard_async_op", None)
    if switch is not None:
        switch(True)
