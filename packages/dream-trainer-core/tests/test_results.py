"""Results of steps and their means."""

from __future__ import annotations

import logging
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import BlockingCopies, run_on_ranks
from dream_trainer.trainer.results import EpochMeans, WeightedMean, weights_of
from dream_trainer.world import World


def world() -> World:
    return World(DeviceParameters(device="cpu"))


def test_a_bare_tensor_is_the_loss() -> None:
    loss = torch.ones((), requires_grad=True) * 2

    report = EpochMeans("training_step").add(loss, 2)
    assert report == {"loss": torch.tensor(2.0)}
    assert not report["loss"].requires_grad


def test_keys_must_be_strings() -> None:
    with pytest.raises(TypeError, match="training_step returned a dict with the key 3; keys are"):
        EpochMeans("training_step").add({3: 1.0}, 2)


def test_means_are_weighted_by_samples() -> None:
    means = EpochMeans("training_step")
    means.add({"loss": torch.tensor(1.0), "lr": 0.5}, 1)
    means.add({"loss": torch.tensor(3.0), "lr": 0.1}, 3)

    assert means.reduce(world()) == {
        "loss": pytest.approx(2.5),
        "lr": pytest.approx(0.2),
    }


def test_means_over_many_batches_are_those_of_float64() -> None:
    means, generator = EpochMeans("training_step"), torch.Generator().manual_seed(0)
    values = torch.rand(1000, generator=generator)
    for index, value in enumerate(values):
        means.add({"loss": value}, index + 1)

    weights = torch.arange(1, 1001, dtype=torch.float64)
    expected = (values.double() @ weights / weights.sum()).item()
    assert means.reduce(world())["loss"] == pytest.approx(expected, rel=1e-12)


def test_a_key_of_some_batches_is_averaged_over_those() -> None:
    means = EpochMeans("training_step")
    means.add({"a": 1.0}, 2)
    means.add({"a": 2.0, "b": torch.tensor([4.0])}, 2)
    means.add({"b": torch.tensor([8.0]), "c": torch.zeros(3)}, 6)

    result = means.reduce(world())
    assert result.pop("c").shape == (3,)
    assert result == {"a": 1.5, "b": pytest.approx(7.0)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_are_kept(value: float) -> None:
    means = EpochMeans("training_step")
    means.add({"loss": torch.tensor(value)}, 1)

    found = means.reduce(world())["loss"]
    assert found == value or (math.isnan(found) and math.isnan(value))


@pytest.mark.parametrize(("value", "expected"), [(10**400, math.inf), (-(10**400), -math.inf)])
def test_an_integer_too_large_for_a_float_is_infinite(value: int, expected: float) -> None:
    means = EpochMeans("training_step")
    means.add({"loss": 1.0, "huge": value}, 1)
    means.add({"loss": 1.0, "huge": 2}, 1)

    assert means.reduce(world()) == {"loss": 1.0, "huge": expected}


def test_a_key_that_changes_its_type_is_refused() -> None:
    means = EpochMeans("training_step")
    means.add({"loss": torch.tensor(1.0)}, 1)

    with pytest.raises(
        TypeError,
        match=r"training_step reports 'loss' as a single number in some batches and as a tensor of "
        r"shape \(2,\) in this one; report one kind",
    ):
        means.add({"loss": torch.zeros(2)}, 1)


@pytest.mark.parametrize("key", ["tensors", "numbers"])
def test_numbers_and_tensors_may_take_turns_under_one_key(key: str) -> None:
    means = EpochMeans("training_step")
    means.add({"x": 1.0 if key == "numbers" else torch.tensor([1.0])}, 1)
    means.add({"x": torch.tensor(2.0, dtype=torch.bfloat16)}, 2)
    means.add({"x": 5}, 1)

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
    means.add({"loss": torch.tensor(1.0)}, 1)

    with Refuses(error), pytest.raises(type(error)) as caught:
        means.state_dict()
    assert caught.value is error


def test_the_host_never_waits_for_a_gpu_in_300_batches() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), BlockingCopies() as copies:
        means = EpochMeans("training_step")
        for index in range(300):
            loss = torch.empty((), device="cuda")
            scale = torch.empty(1, device="cuda") if index % 2 else 0.5
            weighted = WeightedMean(loss, torch.empty((), dtype=torch.int64, device="cuda"))
            cpu = WeightedMean(loss, torch.tensor(3))
            means.add(
                {"loss": loss, "scale": scale, "lr": 0.1, "token": weighted, "cpu": cpu}, index % 7
            )
        assert copies.found == []

        torch.ones(2).to("cuda:0")
        torch.empty(2, device="cuda").cpu()

    assert copies.found == ["cpu to cuda:0", "cuda:0 to cpu"]


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on MPS, which doesn't have it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "mps":
            assert result.dtype is not torch.float64, func
        return result


def test_means_on_mps_need_no_float64() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), NoFloat64():
        means = EpochMeans("training_step")
        for index in range(150):
            loss = torch.empty((), device="mps")
            tokens = WeightedMean(loss, torch.empty((), dtype=torch.int64, device="mps"))
            cpu = WeightedMean(loss, torch.tensor(3))
            means.add({"loss": loss, "tokens": tokens, "cpu": cpu, "lr": 0.1}, index % 7)

        with pytest.raises(AssertionError):
            torch.empty((), device="mps").double()


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
            means.add({"loss": torch.tensor(0.1) * index}, 2)

    assert second.reduce(world()) == straight.reduce(world())


def test_only_scalars_of_earlier_batches_are_kept() -> None:
    import weakref

    means = EpochMeans("training_step")
    alive = []
    for _ in range(3):
        logits = torch.zeros(10)
        alive.append(weakref.ref(logits))
        means.add({"loss": torch.tensor(1.0), "logits": logits}, 1)
        del logits

    assert [ref() is not None for ref in alive] == [False, False, True]


def uneven_means() -> dict[str, Any]:
    world = World(DeviceParameters(device="cpu"))
    world.launch()
    means = EpochMeans("validation_step")
    for _ in range(world.rank + 1):
        means.add({"loss": torch.tensor(float(world.rank))}, 2)
    return means.reduce(world)


def test_means_are_over_the_samples_of_all_ranks() -> None:
    # Rank 1 has twice as many samples as rank 0, with the loss 1.
    assert run_on_ranks(uneven_means, 2) == [{"loss": pytest.approx(2 / 3)}] * 2


def report_by_rank() -> dict[str, Any]:
    """Rank 0 has two batches of task a; rank 1 has one of each task, and a rare value."""
    world = World(DeviceParameters(device="cpu"))
    world.launch()
    means = EpochMeans("training_step")
    if world.rank == 0:
        means.add({"loss": torch.tensor(1.0), "loss/a": torch.tensor(1.0)}, 2)
        means.add({"loss": torch.tensor(2.0), "loss/a": torch.tensor(2.0)}, 2)
    else:
        means.add({"loss": torch.tensor(4.0), "loss/a": torch.tensor(4.0)}, 4)
        means.add({"loss": torch.tensor(8.0), "loss/b": torch.tensor(8.0), "rare": Fraction(3)}, 2)
    return means.reduce(world)


def test_keys_of_some_ranks_are_averaged_over_the_batches_that_reported_them() -> None:
    expected = {"loss": 3.8, "loss/a": 2.75, "loss/b": 8.0, "rare": 3.0}
    assert run_on_ranks(report_by_rank, 2) == [pytest.approx(expected)] * 2


def report_nothing_on_rank_1() -> dict[str, Any]:
    world = World(DeviceParameters(device="cpu"))
    world.launch()
    means = EpochMeans("validation_step")
    if world.rank == 0:
        means.add({"val_loss": torch.tensor(2.0), "pred": torch.zeros(3)}, 4)
    return means.reduce(world)


def test_a_rank_without_batches_gets_the_means_of_the_others() -> None:
    first, second = run_on_ranks(report_nothing_on_rank_1, 2)

    assert first.pop("pred").shape == (3,)
    assert first == second == {"val_loss": 2.0}


def weigh_tokens_of_ranks() -> dict[str, Any]:
    world = World(DeviceParameters(device="cpu"))
    world.launch()
    means = EpochMeans("training_step")
    tokens = torch.tensor([6, 2][world.rank])
    means.add({"loss": WeightedMean(torch.tensor(1.0 + world.rank), tokens)}, 1)
    return means.reduce(world)


def test_weights_count_over_ranks() -> None:
    assert run_on_ranks(weigh_tokens_of_ranks, 2) == [{"loss": 1.25}] * 2


def full_values_of_dtensors() -> list[Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    world = World(DeviceParameters(device="cpu"))
    world.launch()
    mesh = init_device_mesh("cpu", (2,))
    partial = DTensor.from_local(torch.tensor(world.rank + 1.0), mesh, [Partial()])
    replicated = DTensor.from_local(
        torch.tensor(5.0, requires_grad=True) * 1, mesh, [Replicate()], run_check=False
    )
    local = torch.full((1,), 7.0) if world.rank == 0 else torch.zeros(0)
    sharded = DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size([1]), stride=(1,))
    values = {"partial": partial, "replicated": replicated, "sharded": sharded}
    values |= {"weighted": WeightedMean(partial, replicated)}
    means = EpochMeans("training_step")
    report = means.add(values, 1)
    plain = [type(value) is torch.Tensor for value in report.values()]
    return [plain, {k: float(v) for k, v in report.items()}, means.reduce(world)]


def test_a_dtensor_is_reported_as_its_full_value() -> None:
    expected = {"partial": 3.0, "replicated": 5.0, "sharded": 7.0, "weighted": 3.0}
    assert run_on_ranks(full_values_of_dtensors, 2) == [[[True] * 4, expected, expected]] * 2


def test_values_of_a_weighted_mean_have_their_own_weights() -> None:
    means = EpochMeans("training_step")
    report = means.add({"loss": WeightedMean(torch.tensor([2.0]), 3), "lr": 0.5}, 8)
    means.add({"loss": WeightedMean(4, torch.tensor(1)), "lr": 0.1}, 8)

    assert report == {"loss": torch.tensor([2.0]), "lr": 0.5}
    assert weights_of(report) == {"loss": 3}
    assert means.reduce(world()) == {"loss": 2.5, "lr": pytest.approx(0.3)}


def test_a_bare_weighted_mean_is_the_loss() -> None:
    means = EpochMeans("training_step")
    means.add(WeightedMean(torch.tensor(1.0, requires_grad=True) * 2, 3), 8)

    assert means.reduce(world()) == {"loss": 2.0}


@pytest.mark.parametrize("weight", [0, 0.0, torch.tensor(0)], ids=repr)
def test_a_value_with_weight_0_is_not_counted_even_if_it_is_nan(weight: Any) -> None:
    means = EpochMeans("training_step")
    means.add({"loss": WeightedMean(math.nan, weight)}, 8)
    means.add({"loss": WeightedMean(torch.tensor(math.nan), weight)}, 8)
    means.add({"loss": WeightedMean(2.0, 5)}, 8)

    assert means.reduce(world()) == {"loss": 2.0}


def test_a_key_whose_weights_are_all_0_is_nan() -> None:
    means = EpochMeans("training_step")
    means.add({"loss": WeightedMean(1.0, 0)}, 8)

    assert math.isnan(means.reduce(world())["loss"])


@pytest.mark.parametrize(
    ("value", "weight", "error", "message"),
    [
        (torch.zeros(2), 1, TypeError, r"WeightedMean of a tensor of shape \(2,\); a mean is one"),
        (1.0, "3", TypeError, r"the weight of a WeightedMean is a str \('3'\); one number, at"),
        (1.0, -1, ValueError, r"the weight of a WeightedMean is -1; a finite number, at least 0"),
        (1.0, math.nan, ValueError, r"is nan; a finite number"),
    ],
    ids=["vector", "text", "negative", "nan"],
)
def test_a_weighted_mean_of_something_else_is_refused(
    value: Any, weight: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        WeightedMean(value, weight)


@pytest.mark.parametrize(
    "count", [3.0, Fraction(3), torch.tensor(3), torch.tensor([3.0])], ids=repr
)
def test_num_samples_may_be_any_number(count: Any) -> None:
    means = EpochMeans("training_step")
    means.add({"loss": torch.tensor(1.0), "lr": 1}, count)
    means.add({"loss": torch.tensor(5.0), "lr": 5}, 1)

    assert means.reduce(world()) == {"loss": 2.0, "lr": 2.0}


def test_num_samples_that_is_no_number_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"num_samples\(batch\) is None; one number, at least 0, is"
    ):
        EpochMeans("training_step").add({"loss": 1.0}, None)


def test_none_is_not_counted() -> None:
    means = EpochMeans("training_step")
    reports = [
        means.add({"a": None, "b": 1.0, "pred": torch.zeros(3)}, 1),
        means.add({"a": 3.0, "b": None, "pred": None}, 1),
    ]

    result = means.reduce(world())
    assert reports[0]["a"] is None
    assert result.pop("pred").shape == (3,)
    assert result == {"b": 1.0, "a": 3.0}


def test_values_that_are_no_numbers_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    named: set[str] = set()
    for _ in range(2):
        means = EpochMeans("validation_step", named)
        means.add({"loss": 1.0, "logits": torch.zeros(4, 2), "phase": 1j}, 4)
        result = means.reduce(world())

    assert result["phase"] == 1j
    assert sorted((record.levelname, record.message) for record in caplog.records) == [
        (
            level,
            (
                f"validation_step reports '{key}' as {what}, which isn't a real number, so it has "
                "no mean: the epoch's result has the last batch's"
            ),
        )
        for level, key, what in (
            ("INFO", "logits", "a tensor of shape (4, 2)"),
            ("WARNING", "phase", "a complex (1j)"),
        )
    ]


def test_dtypes_may_change_between_batches() -> None:
    means = EpochMeans("training_step")
    for dtype in (torch.float32, torch.bool, torch.float8_e4m3fn, torch.int64, torch.bfloat16):
        means.add({"x": torch.ones((), dtype=dtype)}, 1)

    assert means.reduce(world()) == {"x": 1.0}


def test_weighted_means_go_on_from_a_saved_state() -> None:
    first, second = EpochMeans("training_step"), EpochMeans("training_step")
    first.add({"loss": WeightedMean(torch.tensor(1.0), torch.tensor(3))}, 8)
    second.load_state_dict(first.state_dict())
    second.add({"loss": WeightedMean(torch.tensor(5.0), 1)}, 8)

    assert first.state_dict() == {"loss": [3.0, 3.0]}
    assert second.reduce(world()) == {"loss": 2.0}
