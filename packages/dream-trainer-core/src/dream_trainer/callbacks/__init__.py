"""The callback system, and lazy imports of every built-in callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dream_trainer.callbacks.cadence import Cadence, Every
from dream_trainer.callbacks.callback import Callback, RankZeroCallback
from dream_trainer.callbacks.collection import CallbackCollection
from dream_trainer.callbacks.plain_data import RankLocal
from dream_trainer.interface.intersection import intersection

if TYPE_CHECKING:
    from dream_callbacks.checkpoint import AsyncCheckpointCallback as AsyncCheckpointCallback
    from dream_callbacks.checkpoint import CheckpointCallback as CheckpointCallback
    from dream_callbacks.checkpoint import CheckpointParameters as CheckpointParameters
    from dream_callbacks.checkpoint import ExportCallback as ExportCallback
    from dream_callbacks.checkpoint import (
        LoadPartialCheckpointCallback as LoadPartialCheckpointCallback,
    )
    from dream_callbacks.fsdp import OptimizeFSDP as OptimizeFSDP
    from dream_callbacks.logging import JSONLinesSink as JSONLinesSink
    from dream_callbacks.logging import LoggerCallback as LoggerCallback
    from dream_callbacks.logging import LRLoggerCallback as LRLoggerCallback
    from dream_callbacks.logging import MediaLoggerCallback as MediaLoggerCallback
    from dream_callbacks.logging import MetricLoggerCallback as MetricLoggerCallback
    from dream_callbacks.logging import ModelWatchCallback as ModelWatchCallback
    from dream_callbacks.logging import TensorBoardSink as TensorBoardSink
    from dream_callbacks.logging import WandBSink as WandBSink
    from dream_callbacks.profile import BenchmarkCallback as BenchmarkCallback
    from dream_callbacks.profile import FindGraphBreaksCallback as FindGraphBreaksCallback
    from dream_callbacks.profile import ProfileCallback as ProfileCallback
    from dream_callbacks.summary import ModelSummary as ModelSummary
    from dream_callbacks.summary import ProgressBar as ProgressBar
    from dream_callbacks.summary import TrainerSummary as TrainerSummary

__all__ = [
    "Cadence",
    "Callback",
    "CallbackCollection",
    "Every",
    "RankLocal",
    "RankZeroCallback",
    "intersection",
]


def __getattr__(name: str) -> Any:
    from dream_trainer.callbacks._aliases import resolve

    return resolve(__name__, name)


def __dir__() -> list[str]:
    from dream_trainer.callbacks._aliases import names_in

    return sorted({*globals(), *names_in(__name__)})
