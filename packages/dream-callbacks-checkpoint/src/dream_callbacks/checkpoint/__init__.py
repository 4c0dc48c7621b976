"""Checkpoints: saved durably, resumed exactly, never unpickled."""

from dream_callbacks.checkpoint.async_callback import AsyncCheckpointCallback
from dream_callbacks.checkpoint.callback import CheckpointCallback
from dream_callbacks.checkpoint.config import CheckpointParameters
from dream_callbacks.checkpoint.errors import CheckpointError, DamagedCheckpointError
from dream_callbacks.checkpoint.export import ExportCallback
from dream_callbacks.checkpoint.partial import LoadPartialCheckpointCallback, PartialLoad

__all__ = [
    "AsyncCheckpointCallback",
    "CheckpointCallback",
    "CheckpointError",
    "CheckpointParameters",
    "DamagedCheckpointError",
    "ExportCallback",
    "LoadPartialCheckpointCallback",
    "PartialLoad",
]
