"""Checkpoints: saved durably, resumed exactly, never unpickled."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dream_callbacks.checkpoint.errors import CheckpointError, DamagedCheckpointError

if TYPE_CHECKING:
    from dream_callbacks.checkpoint.async_callback import AsyncCheckpointCallback
    from dream_callbacks.checkpoint.callback import CheckpointCallback
    from dream_callbacks.checkpoint.config import CheckpointParameters
    from dream_callbacks.checkpoint.module_weights import load_weights
    from dream_callbacks.checkpoint.weights import (
        ExportCallback,
        LoadPartialCheckpointCallback,
        PartialLoad,
    )

__all__ = [
    "AsyncCheckpointCallback",
    "CheckpointCallback",
    "CheckpointError",
    "CheckpointParameters",
    "DamagedCheckpointError",
    "ExportCallback",
    "LoadPartialCheckpointCallback",
    "PartialLoad",
    "load_weights",
]

_NEED_TORCH = {
    "AsyncCheckpointCallback": "async_callback",
    "CheckpointCallback": "callback",
    "CheckpointParameters": "config",
    "ExportCallback": "weights",
    "LoadPartialCheckpointCallback": "weights",
    "PartialLoad": "weights",
    "load_weights": "module_weights",
}
"""Imported on first access: `python -m dream_callbacks.checkpoint ls` needs no torch."""


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_NEED_TORCH[name]}")
    found = globals()[name] = getattr(module, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
