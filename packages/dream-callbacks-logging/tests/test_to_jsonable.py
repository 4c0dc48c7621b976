from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dream_callbacks.logging import JSONLinesSink, LoggerCallback
from dream_callbacks.logging.to_jsonable import as_number, encode_non_finite, to_jsonable
from dream_trainer.callbacks import CallbackCollection
from dream_trainer.testing import tiny_config


class Color(enum.Enum):
    RED = 1


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Inner:
    path: Path
    dtype: torch.dtype


class Plain:
    def __init__(self, size: int) -> None:
        self.size = size


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Inner(Path("a/b"), torch.bfloat16), {"path": "a/b", "dtype": "torch.bfloat16"}),
        ({1: (2, {3})}, {"1": [2, [3]]}),
        (Color.RED, "RED"),
        (Point(1, 2), {"x": 1, "y": 2}),
        (torch.nn.Linear(2, 2), "Linear"),
        (torch.device("cpu"), "cpu"),
        (torch.zeros(2, 3), "tensor((2, 3), torch.float32)"),
        (math.sqrt, "math.sqrt"),
        (
            functools.partial(math.pow, 2),
            {"function": "math.pow", "args": [2], "keywords": {}},
        ),
        (Plain(3), {"class": "Plain", "size": 3}),
        (b"\x00", "b'\\x00'"),
        ("x" * 20_000, "x" * 10_000 + "…"),
        (range(3), "range(0, 3)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_converted_by_its_type(value, expected):
    assert to_jsonable(value) == expected


def test_cycles_end():
    loop: dict[str, Any] = {}
    loop["self"] = loop

    assert to_jsonable(loop) == {"self": "…"}


def test_a_config_with_callbacks_becomes_json(tmp_path):
    logger = LoggerCallback(20, sinks=[JSONLinesSink("a.jsonl")])
    config = tiny_config(tmp_path, CallbackCollection({"log": logger}), max_steps=3)

    text = json.dumps(encode_non_finite(to_jsonable(config)), allow_nan=False)

    read = json.loads(text)
    assert read["training_parameters"]["max_steps"] == 3
    assert read["callbacks"]["log"] == {
        "class": "LoggerCallback",
        "log_every_n_train_batches": 20,
        "log_every_n_val_batches": None,
        "code_dir": None,
        "sinks": [{"class": "JSONLinesSink", "path": "a.jsonl"}],
        "reduce": "mean",
    }


def test_a_value_whose_repr_raises_is_named_by_its_class():
    class Hostile:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    assert to_jsonable({"a": Hostile(), "b": 1}) == {
        "a": "<Hostile that can't be converted: RuntimeError>",
        "b": 1,
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, 1.0),
        (3, 3),
        (10**400, math.inf),
        (-(10**400), -math.inf),
        (torch.tensor([2.0]), 2.0),
        ("x", None),
        (1j, None),
        (None, None),
        (torch.zeros(2), None),
    ],
    ids=str,
)
def test_anything_that_float_accepts_becomes_a_number(value, expected):
    assert as_number(value) == expected
