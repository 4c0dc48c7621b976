from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from dream_callbacks.logging import BackgroundSink, OpenedSink


class RecordingSink(OpenedSink):
    """Records its calls; can be made to wait or to fail."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.error: Exception | None = None
        self.ended_with: list[BaseException | None] = []

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        self.may_go_on.wait()
        if self.error is not None:
            raise self.error
        self.calls.append((dict(values), step))

    def log_images(self, name: str, images: Any, step: int, captions: Any = None) -> None:
        self.calls.append(images)

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self, error: BaseException | None = None) -> None:
        self.ended_with.append(error)


def test_calls_arrive_in_order_before_the_end():
    sink = RecordingSink()
    background = BackgroundSink("test", lambda: sink)
    for step in range(100):
        background.log_scalars({"loss": float(step)}, step)
    error = ValueError()
    background.close(error)

    assert sink.calls == [({"loss": float(step)}, step) for step in range(100)]
    assert sink.ended_with == [error]


def test_values_are_copied_when_they_are_logged():
    sink = RecordingSink()
    sink.may_go_on.clear()
    background = BackgroundSink("test", lambda: sink)
    values, image = {"loss": 1.0}, torch.zeros(1, 2, 2)
    background.log_scalars(values, 1)
    background.log_images("picture", image, 1)
    values["loss"] = 2.0
    image.fill_(1.0)
    sink.may_go_on.set()
    background.close()

    assert sink.calls[0] == ({"loss": 1.0}, 1)
    assert sink.calls[1][0].pixels == bytes(4)


def test_a_sink_that_hangs_delays_neither_the_caller_nor_the_end(caplog):
    sink = RecordingSink()
    sink.may_go_on.clear()
    background = BackgroundSink(
        "test", lambda: sink, abort=sink.may_go_on.set, stall_timeout_s=0.2, capacity=50
    )
    slowest_s = 0.0
    for step in range(200):
        began_s = time.perf_counter()
        background.log_scalars({"loss": 1.0}, step)
        slowest_s = max(slowest_s, time.perf_counter() - began_s)
    time.sleep(0.3)
    background.log_scalars({"loss": 1.0}, 200)
    began_s = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        background.close()

    assert slowest_s < 0.1
    assert time.perf_counter() - began_s < 1.0
    assert "hasn't responded" in caplog.text
    assert "was abandoned" in caplog.text
    assert sink.ended_with == []
    assert "200 calls were dropped" in caplog.text


def test_a_lost_connection_disables_the_sink_with_one_warning(caplog):
    sink = RecordingSink()
    sink.error = ConnectionResetError("gone")
    background = BackgroundSink("test", lambda: sink)
    for step in range(10):
        background.log_scalars({"loss": 1.0}, step)
        time.sleep(0.01)
    background.close()

    warnings = [record.getMessage() for record in caplog.records]
    assert warnings[0].startswith("test: failed and is disabled for the rest of the run")
    assert len(warnings) == 2, "one for the error, one for the number of dropped calls"


def test_a_value_that_fails_is_left_out_and_later_values_are_logged(caplog):
    sink = RecordingSink()
    background = BackgroundSink("test", lambda: sink)
    sink.error = TypeError("odd")
    background.log_scalars({"odd": 1.0}, 1)
    while not caplog.records:
        time.sleep(0.01)
    sink.error = None
    background.log_scalars({"loss": 1.0}, 2)
    background.close()

    assert sink.calls == [({"loss": 1.0}, 2)]
    assert "a value it can't log was left out" in caplog.text


def test_a_sink_that_cannot_be_opened_is_disabled(caplog):
    def fail() -> OpenedSink:
        raise RuntimeError("no server")

    background = BackgroundSink("test", fail)
    background.log_scalars({"loss": 1.0}, 1)
    background.close()

    assert "couldn't be opened" in caplog.text


def test_slow_opening_continues_in_the_background_and_loses_nothing():
    sink, may_open = RecordingSink(), threading.Event()

    def open_slowly() -> OpenedSink:
        may_open.wait()
        return sink

    began_s = time.perf_counter()
    background = BackgroundSink("test", open_slowly, start_timeout_s=0.1)
    waited_s = time.perf_counter() - began_s
    background.log_scalars({"loss": 1.0}, 1)
    may_open.set()
    background.close()

    assert waited_s < 1.0
    assert sink.calls == [({"loss": 1.0}, 1)]


def test_an_idle_sink_is_flushed():
    sink = RecordingSink()
    background = BackgroundSink("test", lambda: sink)
    time.sleep(1.3)
    background.close()

    assert sink.calls == ["flush"]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_neither_logs_nor_closes():
    sink = RecordingSink()
    background = BackgroundSink("test", lambda: sink)
    pid = os.fork()
    if pid == 0:
        background.log_scalars({"loss": 1.0}, 1)
        background.close()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    background.close()

    assert status == 0
    assert sink.calls == []


def test_closing_twice_closes_once():
    sink = RecordingSink()
    background = BackgroundSink("test", lambda: sink)
    background.close()
    background.close()

    assert sink.ended_with == [None]
