from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dream_callbacks.logging import (
    JSONLinesSink,
    LoggerCallback,
    LRLoggerCallback,
    MediaLoggerCallback,
    MetricLoggerCallback,
    ModelWatchCallback,
    TensorBoardSink,
)
from dream_trainer.callbacks import Callback
from dream_trainer.testing.conformance import CHECKS, Check

MAKERS: dict[str, Callable[[], Callback[Any]]] = {
    "logger": LoggerCallback,
    "learning rate": LRLoggerCallback,
    "metrics": MetricLoggerCallback,
    "media": MediaLoggerCallback,
    "watch": functools.partial(ModelWatchCallback, "all", 2),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_each_callback_conforms(check: Check, make: Callable[[], Any], tmp_path: Path):
    check(make, tmp_path)


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_a_logger_with_a_background_sink_conforms(check: Check, tmp_path: Path):
    pytest.importorskip("tensorboard")

    check(lambda: LoggerCallback(2, 1, sinks=[JSONLinesSink(), TensorBoardSink()]), tmp_path)
