"""Batches of every type are moved to a device. The meta device stands for a GPU."""

from __future__ import annotations

import array
import collections
import dataclasses
import types
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from dream_trainer.testing import TinyTrainer, tiny_config
from dream_trainer.trainer.device_transfer import moved_to

META = torch.device("meta")


def x() -> Tensor:
    return torch.ones(3)


class Pair(NamedTuple):
    text: str
    x: Tensor


@dataclasses.dataclass
class Plain:
    x: Tensor
    text: str = "a"
    derived: Any = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.derived = self.x * 2


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    text: str = "a"


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenWithSlots:
    x: Tensor
    text: str = "a"


class Vocabulary(dict[str, Any]):
    """A dict with an attribute."""

    size = 0


@dataclasses.dataclass
class Output(collections.OrderedDict[str, Any]):
    """Like the outputs of Hugging Face's models: items that are attributes too."""

    x: Tensor

    def __post_init__(self) -> None:
        self["x"] = self.x

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        super().__setattr__(name, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("update is refused")

    def __reduce__(self) -> Any:
        return type(self), (self.x,)


class Fixed(Mapping[str, Any]):
    """A mapping that can't be changed."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        self.items_by_name = dict(items)

    def __getitem__(self, name: str) -> Any:
        return self.items_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_by_name)

    def __len__(self) -> int:
        return len(self.items_by_name)


class Row(Sequence[Any]):
    """A sequence that can't be changed."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.all = tuple(items)

    def __getitem__(self, index: Any) -> Any:
        return self.all[index]

    def __len__(self) -> int:
        return len(self.all)


def devices(batch: Any) -> list[str]:
    """Device types of all tensors in a batch, found apart from the code that is tested."""
    if isinstance(batch, Tensor):
        return [batch.device.type]
    if isinstance(batch, Mapping):
        return [device for item in batch.values() for device in devices(item)]
    if isinstance(batch, (list, tuple, collections.deque, collections.UserList, Row)):
        return [device for item in batch for device in devices(item)]
    if isinstance(batch, types.SimpleNamespace):
        return devices(vars(batch))
    if dataclasses.is_dataclass(batch):
        return [
            device
            for field in dataclasses.fields(batch)
            for device in devices(getattr(batch, field.name))
        ]
    return []


@pytest.mark.parametrize(
    ("batch", "num_tensors"),
    [
        (x(), 1),
        ([x(), "text", 1, None], 1),
        ((x(), x()), 2),
        (Pair("text", x()), 1),
        ({"x": x(), "nested": {"y": [x()]}}, 2),
        (collections.OrderedDict(b=x(), a=x()), 2),
        (collections.UserDict({"x": x()}), 1),
        (collections.ChainMap({"x": x()}, {"y": x()}), 2),
        (collections.defaultdict(list, x=[x()]), 1),
        (Vocabulary(x=x()), 1),
        (Output(x()), 1),
        (types.MappingProxyType({"x": x()}), 1),
        (Fixed({"x": x()}), 1),
        (collections.deque([x(), x()], maxlen=2), 2),
        (collections.UserList([x()]), 1),
        (Row([x(), 1]), 1),
        (Plain(x()), 2),
        (types.SimpleNamespace(x=[x()], text="a"), 1),
        (Frozen(x()), 1),
        (FrozenWithSlots(x()), 1),
        ({"batches": [Frozen(x()), Pair("text", x())]}, 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_all_tensors_of_a_container_are_moved_and_its_type_is_kept(
    batch: Any, num_tensors: int
) -> None:
    moved = moved_to(META, batch)

    assert type(moved) is type(batch)
    assert devices(moved) == ["meta"] * num_tensors
    assert devices(batch) == ["cpu"] * num_tensors  # the loader's own isn't changed


def test_what_makes_a_container_more_than_its_items_is_kept() -> None:
    counts = collections.defaultdict(list, x=x())
    ordered = collections.OrderedDict(b=x(), a=1)
    last = collections.deque([x()], maxlen=1)
    vocabulary = Vocabulary(x=x())
    vocabulary.size = 7

    assert moved_to(META, counts).default_factory is list
    assert list(moved_to(META, ordered)) == ["b", "a"]
    assert moved_to(META, last).maxlen == 1
    assert moved_to(META, vocabulary).size == 7
    assert moved_to(META, Plain(x(), text="b")).text == "b"
    assert moved_to(META, Output(x())).x.device == META


@dataclasses.dataclass
class Unfilled:
    x: Tensor
    later: Tensor = dataclasses.field(init=False)


def test_a_field_without_a_value_stays_without_one() -> None:
    moved = moved_to(META, Unfilled(x()))

    assert moved.x.device == META
    assert not hasattr(moved, "later")


@pytest.mark.parametrize(
    "batch",
    [
        "text",
        b"bytes",
        7,
        None,
        range(3),
        memoryview(b"bytes"),
        array.array("d", [1.0]),
        {1, 2},
        object(),
        Tensor,
        Plain,
        torch.Size([2]),
        ["a", 1, (2.0, range(2))],
        {"a": {"b": 1}},
        Frozen("no tensor", "a"),  # type: ignore[arg-type]
        collections.defaultdict(list, a=[1]),
        Row([1, 2]),
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_what_holds_nothing_to_move_is_returned_itself(batch: Any) -> None:
    assert moved_to(META, batch) is batch


def test_items_that_stay_are_the_same_objects() -> None:
    names, targets = ["a", "b"], {"c": 1}

    moved = moved_to(META, {"names": names, "x": x(), "targets": targets})
    assert moved["names"] is names
    assert moved["targets"] is targets


def test_a_packed_sequence_keeps_its_sizes_on_the_host() -> None:
    packed = pack_sequence([torch.ones(3), torch.ones(2)])

    moved = moved_to(META, {"packed": packed})["packed"]
    assert isinstance(moved, PackedSequence)
    assert (moved.data.device.type, moved.batch_sizes.device.type) == ("meta", "cpu")
    assert moved.batch_sizes.tolist() == [2, 2, 1]


def test_a_jagged_tensor_keeps_its_layout() -> None:
    jagged = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged)

    moved = moved_to(META, [jagged])[0]
    assert (moved.device.type, moved.layout, moved.size(0)) == ("meta", torch.jagged, 2)


# Types that move themselves


class SizedDict(dict[str, Tensor]):
    """Like a TensorDict: a mapping with a batch size, which a copy of its items would lose."""

    def __init__(self, items: Mapping[str, Tensor], batch_size: list[int]) -> None:
        super().__init__(items)
        self.batch_size = batch_size
        self.moved_with: dict[str, Any] = {}

    def to(self, *args: Any, **kwargs: Any) -> SizedDict:
        moved = SizedDict({key: item.to(*args, **kwargs) for key, item in self.items()}, [])
        moved.batch_size, moved.moved_with = self.batch_size, kwargs
        return moved


class Encoding(collections.UserDict[str, Any]):
    """Like a BatchEncoding of Hugging Face before 2025: moves itself, and always waits."""

    def to(self, device: torch.device) -> Self:
        self.data = {key: item.to(device) for key, item in self.data.items()}
        return self


class Graph:
    """Moves itself in place and forgets to return itself."""

    def __init__(self) -> None:
        self.x = x()

    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        self.x = self.x.to(device, non_blocking=non_blocking)


def test_a_type_with_a_method_to_moves_itself_without_waiting_if_it_can() -> None:
    sized = moved_to(META, SizedDict({"x": x()}, batch_size=[3]))
    encoding = moved_to(META, Encoding({"ids": x()}))
    graph = Graph()

    assert (sized.batch_size, sized.moved_with) == ([3], {"non_blocking": True})
    assert sized["x"].device == META
    assert isinstance(encoding, Encoding)
    assert encoding["ids"].device == META
    assert moved_to(META, [graph])[0] is graph
    assert graph.x.device == META


class Edge(NamedTuple):
    start: Tensor
    to: Tensor


def test_an_item_named_to_is_moved_like_any_other() -> None:
    moved = moved_to(META, Edge(x(), to=x()))

    assert isinstance(moved, Edge)
    assert devices(moved) == ["meta", "meta"]


def test_the_trainer_moves_batches_to_its_device(tmp_path: Path) -> None:
    trainer = TinyTrainer(tiny_config(tmp_path))
    trainer.world.device = META

    batch = trainer.move_batch((Frozen(x()), {"y": x()}))
    assert devices(batch) == ["meta", "meta"]


class SharesItems(MutableMapping[str, Any]):
    """A mapping whose shallow copy has the same dict of items."""

    def __init__(self, **items: Any) -> None:
        self.items_by_key = items

    def __getitem__(self, key: str) -> Any:
        return self.items_by_key[key]

    def __setitem__(self, key: str, item: Any) -> None:
        self.items_by_key[key] = item

    def __delitem__(self, key: str) -> None:
        del self.items_by_key[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_by_key)

    def __len__(self) -> int:
        return len(self.items_by_key)


def test_a_batch_that_would_change_with_its_copy_is_refused_and_left_as_it_was() -> None:
    batch = SharesItems(x=x())

    with pytest.raises(TypeError, match="of a SharesItems shares its items"):
        moved_to(META, batch)
    assert batch["x"].device.type == "cpu"
