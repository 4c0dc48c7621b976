"""Part 6: batches of many types are moved to the device, and from pinned memory without a wait."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from dream_trainer.trainer.device_transfer import moved_to
from tools.gpu_parts.device_work import host_ms
from tools.gpu_parts.part import Part
from tools.gpu_parts.trainers import has_library

PROMPT_MS = 20.0


class Pair(NamedTuple):
    """A named tuple."""

    x: Tensor
    label: str


@dataclasses.dataclass
class Batch:
    """A dataclass."""

    x: Tensor
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A frozen dataclass."""

    x: Tensor


def batches() -> dict[str, Any]:
    """A batch of each type, on the CPU."""
    x = torch.arange(6.0)
    found: dict[str, Any] = {
        "tensor": x,
        "list": [x, 3, "text"],
        "tuple": (x, None),
        "dict": {"x": x, "name": "a"},
        "nested": {"images": [x, (x,)], "n": 2},
        "defaultdict": collections.defaultdict(list, x=x),
        "ordered dict": collections.OrderedDict(x=x),
        "deque": collections.deque([x]),
        "named tuple": Pair(x, "a"),
        "dataclass": Batch(x),
        "frozen dataclass": Frozen(x),
        "PackedSequence": pack_sequence([x, x[:2]]),
        "with a range": [range(3), x],
    }
    if has_library("tensordict"):
        from tensordict import TensorDict

        found["TensorDict"] = TensorDict({"x": x.view(3, 2)}, batch_size=[3])
    if has_library("transformers"):
        from transformers import BatchEncoding

        found["BatchEncoding"] = BatchEncoding({"input_ids": x})
    return found


def tensors(batch: Any) -> list[Tensor]:
    """The tensors in a batch."""
    if isinstance(batch, Tensor):
        return [batch]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [t for f in dataclasses.fields(batch) for t in tensors(getattr(batch, f.name))]
    if isinstance(batch, torch.nn.utils.rnn.PackedSequence):
        return [batch.data]
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):
        return [t for key in batch.keys() for t in tensors(batch[key])]  # noqa: SIM118  # TensorDict
    if isinstance(batch, (list, tuple, collections.deque)):
        return [t for each in batch for t in tensors(each)]
    return []


def run(part: Part) -> None:
    """Move each; on the CPU the meta device stands for the GPU."""
    device = torch.device("cuda", 0) if part.on_gpu else torch.device("meta")
    for name in ("tensordict", "transformers"):
        if not has_library(name):
            part.not_run(f"a batch of {name}", f"{name} isn't installed")
    for name, batch in batches().items():
        with part.attempt(name):
            moved, wanted = moved_to(device, batch), tensors(batches()[name])
            on_device = [tensor.device == device for tensor in tensors(moved)]
            is_equal = not part.on_gpu or all(
                a.cpu().equal(b) for a, b in zip(tensors(moved), wanted, strict=True)
            )
            is_whole = type(moved) is type(batch) and len(on_device) == len(wanted) > 0
            found = {"type": type(moved).__name__, "on the device": on_device, "equal": is_equal}
            expected = "same type, all tensors on the device, with equal values"
            part.expect(name, is_whole and all(on_device) and is_equal, found, expected)
    if part.needs_gpu("a batch of a loader with pin_memory is moved without a wait"):
        with part.attempt("a batch of a loader with pin_memory is moved without a wait"):
            data = [{"x": torch.ones(1 << 20), "y": torch.ones(())} for _ in range(16)]
            batch = next(iter(DataLoader(data, batch_size=16, pin_memory=True)))  # type: ignore[arg-type]  # a list is a dataset
            ms = host_ms(lambda: moved_to(device, batch))
            part.expect(
                "a batch of a loader with pin_memory is moved without a wait",
                ms <= PROMPT_MS,
                ms,
                f"at most {PROMPT_MS:g} ms of host time for 64 MiB with 200 ms queued",
            )
