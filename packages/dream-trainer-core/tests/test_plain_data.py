"""Plain data is exactly what torch.load(weights_only=True) loads."""

from __future__ import annotations

import collections
import datetime
import enum
import io
import pathlib
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dream_trainer.callbacks import RankLocal
from dream_trainer.callbacks.plain_data import values_not_plain, without_rank_local


class Color(enum.Enum):
    RED = 1


class Point(collections.namedtuple("Point", "x y")): ...  # noqa: PYI024  # plain ones count too


class MyTensor(torch.Tensor): ...


class MyDict(dict[str, int]): ...


VALUES: dict[str, Any] = {
    "none": None,
    "bool": True,
    "int": 10**40,
    "float": float("nan"),
    "complex": 1j,
    "str": "ä",
    "bytes": b"x",
    "bytearray": bytearray(b"x"),
    "size": torch.Size([2]),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "tensor": torch.ones(2),
    "parameter": nn.Parameter(torch.ones(2)),
    "buffer": nn.Buffer(torch.ones(2)),
    "list": [1, [2]],
    "tuple": (1, (2,)),
    "set": {1, "a"},
    "dict": {"a": {1: 2.0}, None: 1, (1, "x"): 2},
    "ordered_dict": collections.OrderedDict(a=1),
    "counter": collections.Counter("aab"),
    "default_dict": collections.defaultdict(int, a=1),
    "my_dict": MyDict(a=1),
    "deque": collections.deque([1]),
    "frozenset": frozenset({1}),
    "numpy_scalar": np.float32(1),
    "numpy_array": np.ones(2),
    "path": pathlib.PurePosixPath("x"),
    "datetime": datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC),
    "enum": Color.RED,
    "named_tuple": Point(1, 2),
    "range": range(3),
    "class": int,
    "my_tensor": torch.ones(2).as_subclass(MyTensor),
    "nested": [{"a": Color.RED}],
    "key": {Color.RED: 1},
    "key_in_tuple": {(1, Color.RED): 1},
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_plain_data_is_what_weights_only_loads(value: Any) -> None:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
        is_safe = True
    except pickle.UnpicklingError:
        is_safe = False

    assert (not list(values_not_plain(value))) == is_safe


def test_the_path_of_each_foreign_value_is_given() -> None:
    state = {"a": [1, Color.RED], "b": (RankLocal({"c": Color.RED}),), Color.RED: 1}

    assert [path for path, _ in values_not_plain(state)] == [
        "['a'][1]",
        "['b'][0]['c']",
        " (the key <Color.RED: 1>)",
    ]


def test_sharded_tensors_are_plain(tmp_path: pathlib.Path) -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
        assert not list(values_not_plain({"weight": sharded, "p": nn.Parameter(sharded)}))
    finally:
        destroy_process_group()


def test_rank_local_values_are_unwrapped_at_any_depth() -> None:
    counter = collections.Counter(a=2)
    state = {
        "n": RankLocal(1),
        "list": [RankLocal([RankLocal(2)]), 3],
        "tuple": (RankLocal(4),),
        "ordered": collections.OrderedDict(x=RankLocal(5)),
        "counter": counter,
        "set": {6},
    }

    assert without_rank_local(state) == {
        "n": 1,
        "list": [[2], 3],
        "tuple": (4,),
        "ordered": collections.OrderedDict(x=5),
        "counter": counter,
        "set": {6},
    }
    assert type(without_rank_local(state)["counter"]) is collections.Counter


def test_rank_local_shows_its_value() -> None:
    assert repr(RankLocal({"n": 1})) == "RankLocal({'n': 1})"
