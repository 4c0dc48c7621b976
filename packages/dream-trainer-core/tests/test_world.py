"""A world of one and of several gloo ranks."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import RankError, TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.world import World
from dream_trainer.world.mesh import coordinates


def world_of_one() -> World:
    return World(DeviceParameters(device="cpu"))


def launched(parameters: DeviceParameters | None = None) -> World:
    world = World(parameters or DeviceParameters(device="cpu"))
    world.launch()
    return world


def test_one_process_has_no_process_group_and_everything_works() -> None:
    world = world_of_one()
    world.launch()

    assert not dist.is_initialized()
    assert (world.rank, world.local_rank, world.world_size) == (0, 0, 1)
    assert world.is_global_zero
    assert world.is_local_zero
    assert (world.dp_rank, world.dp_size, world.tp_rank, world.tp_size) == (0, 1, 0, 1)
    assert torch.equal(world.all_reduce(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
    assert world.all_reduce(3) == 3.0
    assert world.all_reduce({"a": 1, "b": 2.5}, "sum") == {"a": 1, "b": 2.5}
    assert world.all_gather(torch.ones(2)).shape == (1, 2)
    assert world.all_gather("x") == ["x"]
    assert torch.equal(world.broadcast(torch.ones(1)), torch.ones(1))
    assert world.broadcast_object("x") == "x"
    assert world.agree([1]) == [1]
    assert world.all_ranks(torch.tensor([True, False])) is False
    assert world.any_rank(torch.tensor(True)) is True
    assert world.group() is None
    world.barrier()
    world.tighten_timeouts()
    world.shutdown()
    with pytest.raises(RuntimeError, match="a world of one process has no mesh"):
        world.get_mesh("tp")


def test_reductions_do_not_change_their_argument() -> None:
    value = torch.tensor([1.0])
    result = world_of_one().all_reduce(value, "sum")
    result += 1

    assert value.item() == 1.0


def test_values_that_cannot_be_reduced_are_refused() -> None:
    with pytest.raises(TypeError, match="a str can't be reduced over ranks"):
        world_of_one().all_reduce("text")
    with pytest.raises(ValueError, match="op='product': one of 'mean', 'sum', 'min', 'max'"):
        world_of_one().all_reduce(1, "product")  # type: ignore[arg-type]


def reductions() -> dict[str, Any]:
    world = launched()
    rank = world.rank
    return {
        "mean": world.all_reduce(torch.tensor([float(rank)])).tolist(),
        "int_tensor_mean": world.all_reduce(torch.tensor(rank)).item(),
        "sum": world.all_reduce(rank + 1, "sum"),
        "min": world.all_reduce(float(rank), "min"),
        "max": world.all_reduce({"a": rank, "b": torch.tensor(rank)}, "max"),
        "bool": world.all_reduce(torch.tensor([rank == 0, True]), "min").tolist(),
        "all": (world.all_ranks(rank < 9), world.all_ranks(rank == 0)),
        "any": (world.any_rank(rank == 0), world.any_rank(rank > 9)),
        "gather": world.all_gather(torch.tensor([rank])).tolist(),
        "objects": world.all_gather({"rank": rank}),
        "broadcast": world.broadcast(torch.tensor(rank), src=1).item(),
        "object": world.broadcast_object(f"from {rank}", src=1),
        "seed": world.seed(None),
    }


def test_reductions_on_two_ranks() -> None:
    first, second = run_on_ranks(reductions, 2)

    assert first == second
    seed = first.pop("seed")
    assert 0 <= seed < 2**31
    assert first == {
        "mean": [0.5],
        "int_tensor_mean": 0.5,
        "sum": 3,
        "min": 0.0,
        "max": {"a": 1, "b": torch.tensor(1)},
        "bool": [False, True],
        "all": (True, False),
        "any": (True, False),
        "gather": [[0], [1]],
        "objects": [{"rank": 0}, {"rank": 1}],
        "broadcast": 1,
        "object": "from 1",
    }


def gather_what_differs(kind: str) -> Any:
    world = launched()
    value: Any = {
        "shape": torch.zeros(2 + world.rank, 3),
        "dtype": torch.zeros(2, dtype=[torch.float32, torch.int64][world.rank]),
        "kind": torch.zeros(2) if world.rank else "nothing",
    }[kind]
    if kind == "shape":
        parts = world.all_gather([value])
        assert [len(part) for (part,) in parts] == [2, 3]
    return world.all_gather(value)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("shape", [r"float32 \(2, 3\)", r"float32 \(3, 3\)"]),
        ("dtype", [r"float32 \(2,\)", r"int64 \(2,\)"]),
        ("kind", ["an object", r"float32 \(2,\)"]),
    ],
    ids=["shape", "dtype", "kind"],
)
def test_gathering_tensors_that_differ_is_an_error_on_all_ranks(kind: str, said: list[str]) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(gather_what_differs, 2, kind)

    assert sorted(caught.value.tracebacks) == [0, 1]
    for text in caught.value.tracebacks.values():
        assert "ranks disagree on what is gathered" in text
        for rank, value in enumerate(said):
            assert re.search(f"rank {rank}: .*{value}", text)


def mixed_numbers() -> tuple[Any, ...]:
    """Rank 0 has integers where rank 1 has floats."""
    world = launched()
    value = 0 if world.rank == 0 else 0.5
    results = [world.all_reduce(value, op) for op in ("mean", "sum", "min", "max")]
    return *results, *(world.all_reduce(-3 - world.rank, op) for op in ("sum", "min", "max"))


def test_integers_and_floats_reduce_together() -> None:
    for results in run_on_ranks(mixed_numbers, 2):
        assert results == (0.25, 0.5, 0.0, 0.5, -7, -4, -3)
        assert [type(result) for result in results] == [float] * 4 + [int] * 3


def test_an_integer_that_would_be_rounded_is_refused() -> None:
    assert world_of_one().all_reduce(2**53, "max") == 2**53
    with pytest.raises(ValueError, match=r"up to 2\*\*53 are required; give a tensor"):
        world_of_one().all_reduce(2**53 + 1, "max")


def dicts_in_another_order() -> dict[str, Any]:
    world = launched()
    keys = ["loss", "accuracy"][:: -1 if world.rank else 1]
    found: dict[str, Any] = world.all_reduce(
        {key: {"loss": 1.0, "accuracy": 10}[key] + world.rank for key in keys}, "sum"
    )
    assert list(found) == keys
    return found


def test_dicts_are_reduced_by_key() -> None:
    assert run_on_ranks(dicts_in_another_order, 2) == [{"loss": 3.0, "accuracy": 21}] * 2


def dicts_of_other_keys() -> None:
    world = launched()
    world.all_reduce({"loss": 1.0} if world.rank else {"loss": 1.0, "accuracy": torch.ones(2)})


def test_dicts_with_different_keys_are_an_error_on_all_ranks() -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(dicts_of_other_keys, 2)

    for text in caught.value.tracebacks.values():
        assert "ranks disagree on what is reduced" in text
        assert "rank 0: {'accuracy': 'torch.float32 (2,)', 'loss': 'a number'}" in text
        assert "rank 1: {'loss': 'a number'}" in text


def disagree() -> None:
    world = launched()
    world.agree(10 + (world.rank == 2), "the number of batches")


def test_disagreement_is_an_error_on_all_ranks_with_the_values_by_rank() -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(disagree, 3)

    assert len(caught.value.tracebacks) == 3
    for text in caught.value.tracebacks.values():
        assert "ranks disagree on the number of batches" in text
        assert "rank 0, 1: 10" in text
        assert "rank 2: 11" in text


def mesh_of(parameters: DeviceParameters) -> tuple[Any, ...]:
    world = launched(parameters)
    shape = dict(zip(world.mesh.mesh_dim_names or (), world.mesh.shape, strict=True))
    coordinate = world.mesh.get_coordinate()
    return shape, tuple(coordinate or ()), tuple(world.place.values()), world.dp_rank


def test_the_mesh_has_all_axes_and_coordinates_are_known_before_launch() -> None:
    parameters = DeviceParameters(device="cpu", dp_shard=2, dp_replicate="auto")
    for rank, (shape, coordinate, place, dp_rank) in enumerate(
        run_on_ranks(mesh_of, 4, parameters)
    ):
        assert shape == {"pp": 1, "dp_replicate": 2, "dp_shard": 2, "cp": 1, "tp": 1}
        assert coordinate == tuple(reversed(place))
        assert dp_rank == rank


def test_coordinates_of_1024_ranks_are_row_major() -> None:
    shape = DeviceParameters(dp_replicate="auto", dp_shard=8, tensor_parallel=4).mesh_shape(1024)
    grid = torch.arange(1024).reshape(shape.sizes)

    for rank in (0, 1, 31, 500, 1023):
        index = tuple(position.item() for position in (grid == rank).nonzero()[0])
        assert tuple(coordinates(rank, shape)[axis] for axis in _axes()) == index


def _axes() -> tuple[str, ...]:
    from dream_trainer.configs.device import AXES

    return AXES


def timeouts() -> tuple[list[int], list[int]]:
    """Timeout of each kind of group in seconds, before and after the first step."""
    parameters = DeviceParameters(
        device="cpu", dp_replicate=2, context_parallel=2, init_timeout_s=100, train_timeout_s=7
    )
    world = launched(parameters)
    of_meshes = [*world.mesh.get_all_groups(), *world.fsdp_mesh.get_all_groups()]
    groups = [dist.group.WORLD, world.group(), *of_meshes]
    before = [timeout_of(group) for group in groups]
    world.tighten_timeouts()
    groups.append(world.group("made later"))
    return before, [timeout_of(group) for group in groups]


def timeout_of(group: Any) -> int:
    timeout: timedelta = group._get_backend(torch.device("cpu")).options._timeout  # noqa: SLF001
    return timeout.seconds


def test_timeouts_of_all_groups_are_set_and_tightened() -> None:
    # The world, the control group, five axes, and copies × shards over two axes.
    assert run_on_ranks(timeouts, 4) == [([100] * 9, [7] * 10)] * 4


class SlowFirstStep(TinyTrainer):
    """Rank 1 takes longer for its first step, as if it compiled, than a collective may later."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        result = super().training_step(batch, batch_idx)
        if self.world.rank == 1 and self.global_step == 0:
            time.sleep(4.0)
        return result


def train_with_a_slow_first_step(directory: Path) -> int:
    device = DeviceParameters(device="cpu", train_timeout_s=2.0)
    trainer = SlowFirstStep(tiny_config(directory, device=device, max_steps=3))
    trainer.fit()
    return trainer.global_step


def test_a_rank_that_still_compiles_has_the_longer_timeout(tmp_path: Path) -> None:
    assert run_on_ranks(train_with_a_slow_first_step, 2, tmp_path) == [3, 3]


def timeouts_in_training() -> list[int]:
    seen = []

    class Looks(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            seen.append(timeout_of(dist.group.WORLD))
            return super().training_step(batch, batch_idx)

    device = DeviceParameters(device="cpu", init_timeout_s=100, train_timeout_s=7)
    Looks(tiny_config("runs", device=device, max_steps=3)).fit()
    return seen


def test_timeouts_are_tightened_after_the_first_step() -> None:
    assert run_on_ranks(timeouts_in_training, 2) == [[100, 7, 7]] * 2


def groups() -> dict[str, Any]:
    world = launched()
    control, saving = world.group(), world.group("saving")
    box = torch.tensor([float(world.rank)])
    dist.all_reduce(box, group=saving)
    return {
        "backend": dist.get_backend(control),
        "ranks": dist.get_process_group_ranks(control),  # type: ignore[arg-type]  # not alone
        "shared": world.group() is control and world.group("saving") is saving,
        "own": control is not saving and control is not dist.group.WORLD,
        "sum": box.item(),
    }


def test_callbacks_share_a_cpu_group_of_all_ranks_for_each_kind() -> None:
    expected = {"backend": "gloo", "ranks": [0, 1], "shared": True, "own": True, "sum": 1.0}

    assert run_on_ranks(groups, 2) == [expected] * 2


def test_unknown_axes_are_refused() -> None:
    for axes in [("dp",), (), ("tp", "ep")]:
        with pytest.raises(ValueError, match="some of pp, dp_replicate, dp_shard, cp, tp are req"):
            world_of_one().get_mesh(*axes)


def guarded_collective(kind: str) -> str:
    world = launched()
    world.group()
    world.barrier()  # otherwise rank 1 could exit before rank 0 has connected to it
    if world.rank == 0:
        with world.no_collectives("a test"):
            try:
                if kind == "world":
                    world.all_reduce(1.0)
                elif kind == "group":
                    dist.new_group([0, 1], backend="gloo")
                elif kind == "mesh":
                    init_device_mesh("cpu", (2, 1))
                else:
                    dist.all_reduce(torch.ones(1))
            except RuntimeError as error:
                return str(error)
        return "no error"
    return "not run"


@pytest.mark.parametrize("kind", ["world", "torch", "group", "mesh"])
def test_guarded_collectives_raise_instead_of_hanging(kind: str) -> None:
    message, _ = run_on_ranks(guarded_collective, 2, kind)

    assert "in a test: the other ranks don't run this hook and would never join" in message


def test_an_incomplete_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2 is set and RANK isn't"):
        world_of_one()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE='two'; a whole number is required"):
        world_of_one()


def test_a_layout_that_does_not_fit_is_refused_before_launch() -> None:
    with pytest.raises(ValueError, match=r"multiply to 2 .*dp_shard=2.* but 1 rank was started"):
        World(DeviceParameters(device="cpu", dp_replicate=1, dp_shard=2))


def test_a_missing_device_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(RuntimeError, match="local rank 0 has no CUDA device: 0 are visible"):
        World(DeviceParameters(device="cuda"))
