"""Results of steps and their means."""

from __future__ import annotations

import math
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import RankError, run_on_ranks
from dream_trainer.trainer.results import EpochMeans, num_samples
from dream_trainer.world import World


def world() -> World:
    return World(DeviceParameters(device="cpu"))


def batch_of(num_samples: int) -> torch.Tensor:
    return torch.zeros(num_samples, 3)


def test_a_bare_tensor_is_the_loss() -> None:
    loss = torch.ones((), requires_grad=True) * 2

    report = EpochMeans("training_step").add(loss, batch_of(2))
    assert report == {"loss": torch.tensor(2.0)}
    assert not report["loss"].requires_grad


def test_keys_must_be_strings() -> None:
    with pytest.raises(TypeError, match="training_step returned a dict with the key 3; keys are"):
        EpochMeans("training_step").add({3: 1.0}, batch_of(2))


@dataclass
class Batch:
    tokens: torch.Tensor


Pair = namedtuple("Pair", "x y")  # noqa: PYI024  # loaders give plain named tuples


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.zeros(5, 2), 5),
        (torch.tensor(1.0), 1),
        ([torch.zeros(3), torch.zeros(9)], 3),
        (({"x": torch.zeros(4, 1)},), 4),
        (Pair(torch.zeros(6), None), 6),
        (Batch(torch.zeros(7, 3)), 7),
        ("text", 1),
        (["a", "b"], 1),
        (None, 1),
        ([], 1),
    ],
    ids=repr,
)
def test_samples_are_counted_in_dimension_0_of_the_first_tensor(batch: Any, expected: int) -> None:
    assert num_samples(batch) == expected


def test_means_are_weighted_by_samples() -> None:
    means = EpochMeans("training_step")
    means.add({"loss": torch.tensor(1.0), "lr": 0.5}, batch_of(1))
    means.add({"loss": torch.tensor(3.0), "lr": 0.1}, batch_of(3))

    assert means.reduce(world()) == {
        "loss": pytest.approx(2.5),
        "lr": pytest.approx(0.2),
    }


def test_means_over_many_batches_are_those_of_float64() -> None:
    means, generator = EpochMeans("training_step"), torch.Generator().manual_seed(0)
    values = torch.rand(1000, generator=generator)
    for index, value in enumerate(values):
        means.add({"loss": value}, batch_of(index + 1))

    weights = torch.arange(1, 1001, dtype=torch.float64)
    expected = (values.double() @ weights / weights.sum()).item()
    assert means.reduce(world())["loss"] == pytest.approx(expected, rel=1e-12)


def test_a_key_of_some_batches_is_averaged_over_those() -> None:
    means = EpochMeans("training_step")
    means.add({"a": 1.0}, batch_of(2))
    means.add({"a": 2.0, "b": torch.tensor([4.0])}, batch_of(2))
    means.add({"b": torch.tensor([8.0]), "c": torch.zeros(3)}, batch_of(6))

    result = means.reduce(world())
    assert result.pop("c").shape == (3,)
    assert result == {"a": 1.5, "b": pytest.approx(7.0)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_kept(value: float) -> None:
    means = EpochMeans("training_step")
    means.add({"loss": torch.tensor(value)}, batch_of(1))

    found = means.reduce(world())["loss"]
    assert found == value or (math.isnan(found) and math.isnan(value))


@pytest.mark.parametrize(("value", "expected"), [(10**400, math.inf), (-(10**400), -math.inf)])
def test_an_integer_too_large_for_a_float_is_infinite(value: int, expected: float) -> None:
    means = EpochMeans("training_step")
    means.add({"loss": 1.0, "huge": value}, batch_of(1))
    means.add({"loss": 1.0, "huge": 2}, batch_of(1))

    assert means.reduce(world()) == {"loss": 1.0, "huge": expected}


def test_a_key_that_changes_its_type_is_refused() -> None:
    means = EpochMeans("training_step")
    means.add({"loss": torch.tensor(1.0)}, batch_of(1))

    with pytest.raises(
        TypeError,
        match=r"training_step reports 'loss' as a single number in some batches and as a tensor of "
        r"shape \(2,\) in this one; report one kind",
    ):
        means.add({"loss": torch.zeros(2)}, batch_of(1))


@pytest.mark.parametrize("key", ["tensors", "numbers"])
def test_numbers_and_tensors_may_take_turns_under_one_key(key: str) -> None:
    means = EpochMeans("training_step")
    means.add({"x": 1.0 if key == "numbers" else torch.tensor([1.0])}, batch_of(1))
    means.add({"x": torch.tensor(2.0, dtype=torch.bfloat16)}, batch_of(2))
    means.add({"x": 5}, batch_of(1))

    assert means.reduce(world()) == {"x": 2.5}


class Refuses(TorchDispatchMode):
    """Raises an error in the operation that sums, as CUDA does where it reports an earlier one."""

    def __init__(self, error: RuntimeError) -> None:
        super().__init__()
        self.error = error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("stack", "cat"):
            raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        RuntimeError("accessing tensor output of CUDAGraphs that has been overwritten"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_device_keeps_its_kind(error: RuntimeError) -> None:
    means = EpochMeans("training_step")
    means.add({"loss": torch.tensor(1.0)}, batch_of(1))

    with Refuses(error), pytest.raises(type(error)) as caught:
        means.state_dict()
    assert caught.value is error


class BlockingCopies(TorchDispatchMode):
    """Records copies between devices that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "_to_copy" and not kwargs.get("non_blocking"):
            if result.device != args[0].device:
                self.found.append(f"{args[0].device} to {result.device}")
        return result


def test_the_host_never_waits_for_a_gpu_in_300_batches() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), BlockingCopies() as copies:
        means = EpochMeans("training_step")
        for index in range(300):
            batch = torch.empty(index % 7, 3, device="cuda")
            loss = torch.empty((), device="cuda")
            scale = torch.empty(1, device="cuda") if index % 2 else 0.5
            means.add({"loss": loss, "scale": scale, "lr": 0.1}, batch)
        assert copies.found == []

        torch.ones(2).to("cuda:0")
        torch.empty(2, device="cuda").cpu()

    assert copies.found == ["cpu to cuda:0", "cuda:0 to cpu"]


def test_means_continue_from_a_saved_state() -> None:
    straight, first, second = (
        EpochMeans("training_step"),
        EpochMeans("training_step"),
        EpochMeans("training_step"),
    )
    for index in range(10):
        for means in (straight, first if index < 4 else second):
            if index == 4 and means is second:
                second.load_state_dict(first.state_dict())
            means.add({"loss": torch.tensor(0.1) * index}, batch_of(2))

    assert second.reduce(world()) == straight.reduce(world())


def test_only_scalars_of_earlier_batches_are_kept() -> None:
    import weakref

    means = EpochMeans("training_step")
    alive = []
    for _ in range(3):
        logits = torch.zeros(10)
        alive.append(weakref.ref(logits))
        means.add({"loss": torch.tensor(1.0), "logits": logits}, batch_of(1))
        del logits

    assert [ref() is not None for ref in alive] == [False, False, True]


def uneven_means() -> dict[str, Any]:
    world = World(DeviceParameters(device="cpu"))
    world.launch()
    means = EpochMeans("validation_step")
    for _ in range(world.rank + 1):
        means.add({"loss": torch.tensor(float(world.rank))}, batch_of(2))
    return means.reduce(world)


def test_means_are_over_the_samples_of_all_ranks() -> None:
    # Rank 1 has twice as many samples as rank 0, with the loss 1.
    assert run_on_ranks(uneven_means, 2) == [{"loss": pytest.approx(2 / 3)}] * 2


def other_keys() -> None:
    world = World(DeviceParameters(device="cpu"))
    world.launch()
    means = EpochMeans("validation_step")
    means.add({f"loss_{world.rank}": torch.tensor(1.0)}, batch_of(2))
    means.reduce(world)


def test_different_keys_on_ranks_are_an_error_on_all() -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(other_keys, 2)

    assert sorted(caught.value.tracebacks) == [0, 1]
    for text in caught.value.tracebacks.values():
        assert "ranks disagree on the scalars that validation_step reports" in text
        assert "rank 1: ['loss_1']" in text
