"""Sinks for logged values: JSON lines, TensorBoard, Weights & Biases."""

from dream_callbacks.logging.sinks.background import BackgroundSink
from dream_callbacks.logging.sinks.base import DeferredSink, Histogram, LoggedRun, OpenedSink
from dream_callbacks.logging.sinks.jsonl import JSONLinesSink
from dream_callbacks.logging.sinks.tensorboard import TensorBoardSink
from dream_callbacks.logging.sinks.wandb import WandBSink

__all__ = [
    "BackgroundSink",
    "DeferredSink",
    "Histogram",
    "JSONLinesSink",
    "LoggedRun",
    "OpenedSink",
    "TensorBoardSink",
    "WandBSink",
]
