"""Encoding a state as JSON and tensors, and decoding it."""

from __future__ import annotations

import collections
import datetime
import json
import math
import pathlib
import random
import string
import sys
from typing import Any

import pytest
import torch

from dream_callbacks.checkpoint import DamagedCheckpointError
from dream_callbacks.checkpoint.format.state_codec import (
    decode,
    decode_plain,
    encode,
    encode_plain,
    tensor_names,
)
from dream_trainer.callbacks import RankLocal


def round_trip(state: Any) -> Any:
    parts = encode(state, rank=0)
    document = json.loads(json.dumps({"shared": parts.shared, "local": parts.local}))
    return decode(document["shared"], parts.tensors, document["local"])


PLAIN = {
    "none": None,
    "bools": [True, False],
    "ints": [0, -1, 2**63, 10**400],
    "floats": [0.1, -0.0, 1e-320, sys.float_info.max, math.inf, -math.inf],
    "complex": [1 + 2j, complex(math.inf, -0.0)],
    "text": ["", "é", "\x00", "\ud800", '"quoted"', "$tuple"],
    "bytes": [b"", bytes(range(256))],
    "containers": [(), (1, (2,)), [], [[]], set(), {1, "a", (2, 3)}, {}, {"a": {}}],
    "keys": {1: "int", "1": "text", None: 0, (1, 2): 0, True and 2.5: 0, b"x": 0},
    "dollar": {"$tuple": [1]},
    "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
    "counter": collections.Counter({"x": 3, 5: 1}),
    "torch": [torch.Size([1, 2]), torch.bfloat16, torch.device("cuda", 3)],
    "random": random.Random(0).getstate(),
}


@pytest.mark.parametrize("value", PLAIN.values(), ids=PLAIN)
def test_plain_data_round_trips(value: Any) -> None:
    found = round_trip(value)

    assert found == value
    assert types(found) == types(value)


def types(value: Any) -> Any:
    """Types in a structure: 1 == True == 1.0 would hide a difference."""
    if isinstance(value, dict):
        return type(value), [(types(k), types(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [types(item) for item in value]
    return type(value), math.copysign(1, value) if isinstance(value, float) else None


def test_nan_round_trips() -> None:
    assert math.isnan(round_trip({"loss": math.nan})["loss"])


def test_random_states_round_trip() -> None:
    draw = random.Random(0)
    for _ in range(300):
        state = random_value(draw, depth=5)

        assert round_trip(state) == state
        assert types(round_trip(state)) == types(state)


def random_value(draw: random.Random, depth: int) -> Any:
    kind = draw.randrange(10 if depth else 5)
    if kind < 5:
        text = "".join(draw.choices(string.printable + "$é", k=3))
        return draw.choice([None, True, draw.randrange(-9, 9), draw.random(), text, text.encode()])
    items = [random_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind < 9:
        keys = [draw.choice(["$", ""]) + str(draw.random()) for _ in items]
        return draw.choice([list(items), tuple(items), dict(zip(keys, items, strict=True))])
    return {draw.randrange(99): item for item in items}


def test_tensors_are_replaced_by_their_names_and_restored() -> None:
    weight, step = torch.randn(2, 3), torch.tensor(3.0)
    state = {"models": {"m": {"w": weight}}, "list": [step, (weight,)]}

    parts = encode(state, rank=0)

    assert set(parts.tensors) == {"models.m.w", "list.0", "list.1.0"}
    assert sorted(tensor_names(parts.shared)) == sorted(parts.tensors)
    assert decode(parts.shared, parts.tensors, {})["list"][1][0].data_ptr() == weight.data_ptr()


def test_rank_local_values_are_decoded_unwrapped() -> None:
    state = {"position": RankLocal({"at": 3, "noise": torch.ones(2)}), "epoch": 1}

    parts = encode(state, rank=12)
    found = decode(parts.shared, parts.tensors, parts.local)

    assert parts.local.keys() == {"position"}
    assert parts.tensors.keys() == {"rank-00012.position.noise"}
    assert found["position"]["at"] == 3
    assert found["position"]["noise"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "value",
    [
        object(),
        frozenset(),
        datetime.datetime(2026, 1, 1),
        pathlib.Path("x"),
        collections.deque(),
        collections.defaultdict(int),
        lambda: None,
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_values_are_refused_with_their_path(value: Any) -> None:
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\].*plain data"):
        encode({"a": [0, value]}, rank=0)


def test_two_tensors_with_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'a\.b'"):
        encode({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, rank=0)


@pytest.mark.parametrize(
    "document",
    [
        {"$tensor": "missing"},
        {"$rank_local": "missing"},
        {"$unknown": 1},
        {"$dtype": "load"},
        {"$dtype": "hub"},
        {"$bytes": "!"},
        {"$float": "x"},
        {"$set": [[1]]},
        {"$dict": [1]},
        {"$size": "x"},
        {"$device": "nowhere"},
    ],
    ids=str,
)
def test_a_malformed_document_is_refused(document: Any) -> None:
    with pytest.raises(DamagedCheckpointError):
        decode({"a": [document]}, {}, {})


def test_plain_data_has_no_tensors() -> None:
    assert decode_plain(encode_plain({"a": 1.5, "b": math.inf})) == {"a": 1.5, "b": math.inf}
    with pytest.raises(TypeError, match="tensor"):
        encode_plain({"a": torch.ones(1)})
