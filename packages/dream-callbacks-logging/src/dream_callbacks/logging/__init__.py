"""Logging for dream-trainer: what steps report, to JSON lines, TensorBoard and W&B."""

from dream_callbacks.logging.callback import LoggerCallback
from dream_callbacks.logging.history import read_jsonl, series
from dream_callbacks.logging.learning_rate import LRLoggerCallback
from dream_callbacks.logging.media import MediaLoggerCallback
from dream_callbacks.logging.metrics import MetricLoggerCallback
from dream_callbacks.logging.mixin import WandBLoggerMixin
from dream_callbacks.logging.model_watch import ModelWatchCallback
from dream_callbacks.logging.sinks import (
    BackgroundSink,
    DeferredSink,
    Histogram,
    JSONLinesSink,
    LoggedRun,
    OpenedSink,
    TensorBoardSink,
    WandBSink,
)

__all__ = [
    "BackgroundSink",
    "DeferredSink",
    "Histogram",
    "JSONLinesSink",
    "LRLoggerCallback",
    "LoggedRun",
    "LoggerCallback",
    "MediaLoggerCallback",
    "MetricLoggerCallback",
    "ModelWatchCallback",
    "OpenedSink",
    "TensorBoardSink",
    "WandBLoggerMixin",
    "WandBSink",
    "read_jsonl",
    "series",
]
