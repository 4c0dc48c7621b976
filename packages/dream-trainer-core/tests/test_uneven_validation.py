"""Validation with any number of samples on any number of ranks: each sample once, no trace."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import RankError, TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.world.determinism import random_state

LAYOUTS: dict[str, tuple[int, DeviceParameters]] = {
    "one": (1, DeviceParameters(device="cpu")),
    "ddp2": (2, DeviceParameters.DDP(device="cpu")),
    "ddp4": (4, DeviceParameters.DDP(device="cpu")),
    "fsdp2": (2, DeviceParameters.FSDP(device="cpu")),
    "fsdp4": (4, DeviceParameters.FSDP(device="cpu")),
    "hsdp": (4, DeviceParameters.HSDP(dp_shard=2, device="cpu")),
    "tp": (2, DeviceParameters(dp_replicate=1, tensor_parallel=2, device="cpu")),
    "fsdp+tp": (4, DeviceParameters.FSDP(tensor_parallel=2, device="cpu")),
    "ddp+tp": (4, DeviceParameters.DDP(tensor_parallel=2, device="cpu")),
}
SAMPLES = 5


class SeenIds:
    """The ids that each update has seen, over all ranks in the end."""

    def __init__(self, trainer: TinyTrainer) -> None:
        self.trainer = trainer
        self.ids: list[int] = []
        self.total = torch.zeros(())

    def update(self, ids: Tensor) -> None:
        self.ids += ids.tolist()
        self.total += ids.sum()

    def compute(self) -> dict[str, Any]:
        world = self.trainer.world
        parts = {world.dp_rank: (self.ids, float(self.total))}
        everyone = [item for each in world.all_gather(parts) for item in each.items()]
        by_part = dict(everyone)
        return {
            "ids": sorted(i for ids, _ in by_part.values() for i in ids),
            "total": sum(total for _, total in by_part.values()),
        }

    def reset(self) -> None:
        self.ids = []
        self.total = torch.zeros(())


class Stream(IterableDataset[Any]):
    """This rank's samples, without a length."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter(self.samples)


class NoTruth:
    """An iterable that refuses to be true or false."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Any:
        return iter(self.loader)

    def __bool__(self) -> bool:
        raise TypeError("the truth value of a loader is ambiguous")


class Exact(TinyTrainer):
    """Validates 5 samples, whose y is their id, in batches of 2 per rank."""

    kind = "sampler"
    data_size = SAMPLES

    def configure_models(self) -> None:
        super().configure_models()
        self.counting = Counting()

    def configure_metrics(self) -> None:
        self.seen = SeenIds(self)
        self.collected: list[int] = []
        self.by_set: dict[str, list[int]] = {}
        self.num_steps_run = 0
        self.id_sum = torch.zeros(())

    def configure_dataloaders(self) -> Any:
        world = self.world
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(self.data_size, 4, generator=generator)
        data = TensorDataset(x, torch.arange(float(self.data_size))[:, None])
        mine = [data[i] for i in range(world.dp_rank, len(data), world.dp_size)]
        train = super().configure_dataloaders()[0]
        if self.kind == "sampler":
            sampler: Any = DistributedSampler(data, world.dp_size, world.dp_rank, shuffle=False)
            return train, DataLoader(data, 2, sampler=sampler)
        if self.kind == "shards":
            return train, DataLoader(mine, 2)  # type: ignore[arg-type]  # a list will do
        if self.kind == "stream":
            return train, DataLoader(Stream(mine), 2)
        if self.kind == "no truth":
            return train, NoTruth(DataLoader(Stream(mine), 2))
        if self.kind == "all on the last":
            is_last = world.dp_rank == world.dp_size - 1
            return train, DataLoader(data if is_last else [], 2)  # type: ignore[arg-type]
        return train, self.loader(data, 2 * world.dp_size)

    def apply_tensor_parallel(self, mesh: Any) -> None:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        columns = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(self.model, mesh, {"embed": columns, "blocks.*": columns})

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        random.random()
        torch.rand(())
        self.counting(x)
        ids = y.flatten().long()
        self.seen.update(ids)
        self.collected += ids.tolist()
        self.by_set.setdefault("only", []).extend(ids.tolist())
        self.num_steps_run += 1
        self.id_sum += ids.sum()
        return {"val_loss": (self.model(x).float() - y).square().mean(), "id": y.mean()}


class Counting(nn.Module):
    """A buffer that counts samples in each forward, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> None:
        self.count += len(x)


class Records(Callback[Exact]):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.result: dict[str, Any] = {}

    def pre_validation_step(self, batch: Any, batch_idx: int) -> None:
        self.steps.append(len(batch[0]))

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self.result = result


def validated(root: str, layout: str, kind: str) -> dict[str, Any]:
    records = Records()
    config = tiny_config(root, [records], device=LAYOUTS[layout][1], max_steps=1)
    config.num_samples = 16

    class Kind(Exact):
        pass

    Kind.kind = kind
    trainer = Kind(config)
    trainer.setup()
    before = random_state()
    result = trainer.validate()
    after = random_state()
    assert before["python"] == after["python"]
    assert torch.equal(before["torch"], after["torch"])
    assert records.result == result
    part = trainer.collected
    assert trainer.by_set["only"] == part if part else trainer.by_set == {}
    return {
        "result": result,
        "ids": part,
        "hooks": sum(records.steps),
        "attributes": (trainer.num_steps_run, float(trainer.id_sum)),
        "part": trainer.world.dp_rank,
        "layout": layout,
    }


def losses_alone(tmp_path: Path) -> dict[str, Any]:
    result: dict[str, Any] = validated(str(tmp_path), "one", "loader")["result"]
    return result


KINDS = ["sampler", "shards", "stream", "no truth", "all on the last", "loader"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_five_samples_are_evaluated_once_each(tmp_path: Path, layout: str, kind: str) -> None:
    num_ranks = LAYOUTS[layout][0]
    alone = losses_alone(tmp_path)

    outcomes = run_on_ranks(validated, num_ranks, str(tmp_path), layout, kind)

    for outcome in outcomes:
        result = outcome["result"]
        assert result["id"] == pytest.approx(2.0, abs=1e-12)
        assert result["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-6)
        assert result["ids"] == [0, 1, 2, 3, 4]
        assert result["total"] == 10.0
        assert outcome["hooks"] == len(outcome["ids"])
        num_steps, id_sum = outcome["attributes"]
        assert id_sum == sum(outcome["ids"])
        assert num_steps == -(-len(outcome["ids"]) // 2)
    by_part = {outcome["part"]: outcome["ids"] for outcome in outcomes}
    assert sorted(i for ids in by_part.values() for i in ids) == [0, 1, 2, 3, 4]


def buffers_of(root: str, layout: str) -> tuple[float, float]:
    class AllOnLast(Exact):
        kind = "all on the last"

    trainer = AllOnLast(tiny_config(root, device=LAYOUTS[layout][1], max_steps=1))
    trainer.setup()
    trainer.validate()
    return float(trainer.counting.count), float(trainer.world.dp_rank)


def test_filler_steps_leave_buffers_as_they_are(tmp_path: Path) -> None:
    counts = run_on_ranks(buffers_of, 2, str(tmp_path), "fsdp2")

    assert counts == [(0.0, 0.0), (5.0, 1.0)]


class TwoSets(Exact):
    """The second set's real batches come after filler steps in the first."""

    draws: tuple[float, ...] = ()

    def configure_dataloaders(self) -> Any:
        train, uneven = super().configure_dataloaders()
        even = self.loader(TensorDataset(torch.zeros(4, 4), torch.arange(4.0)[:, None]), 2)
        return train, {"uneven": uneven, "even": even}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        drawn = torch.rand(())
        if self.validation_set == "even":
            self.draws = (*self.draws, float(drawn))
        return super().validation_step(batch, batch_idx)


def draws_in_second_set(root: str, kind: str) -> tuple[float, ...]:
    class Kind(TwoSets):
        pass

    Kind.kind = kind
    trainer = Kind(tiny_config(root, device=LAYOUTS["fsdp2"][1], max_steps=1))
    trainer.setup()
    trainer.validate()
    return trainer.draws


def test_filler_steps_draw_no_random_numbers(tmp_path: Path) -> None:
    # Rank 1 has one batch of the 5 samples and fills in for the second.
    uneven = run_on_ranks(draws_in_second_set, 2, str(tmp_path), "sampler")

    assert len(uneven[1]) == 2
    assert uneven[1] != uneven[0]
    assert uneven[1] == run_on_ranks(draws_in_second_set, 2, str(tmp_path), "shards")[1]


class ReplacesBatches(Callback[Exact]):
    """The step needs what this callback makes of a batch."""

    def pre_validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return {"x": x, "y": y}


class TakesDicts(Exact):
    kind = "all on the last"

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return super().validation_step((batch.pop("x"), batch.pop("y")), batch_idx)


def with_replaced_batches(root: str) -> float:
    trainer = TakesDicts(
        tiny_config(root, [ReplacesBatches()], device=LAYOUTS["fsdp2"][1], max_steps=1)
    )
    result: float = trainer.validate()["id"]
    return result


def test_a_rank_without_a_batch_gets_one_as_callbacks_made_it(tmp_path: Path) -> None:
    assert run_on_ranks(with_replaced_batches, 2, str(tmp_path)) == [2.0, 2.0]


class Reduces(Callback[Exact]):
    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.trainer.world.all_reduce(result["id"])


def with_a_collective_in_a_hook(root: str) -> None:
    Exact(tiny_config(root, [Reduces()], device=LAYOUTS["fsdp2"][1])).validate()


def test_a_collective_in_a_hook_is_an_error_where_a_rank_has_no_batch(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="some ranks have no batch left and would never join"):
        run_on_ranks(with_a_collective_in_a_hook, 2, str(tmp_path))


class UnevenParts(Exact):
    """Two tensor-parallel ranks of one part that have different batches."""

    length_is_known = True

    def configure_dataloaders(self) -> Any:
        samples = [(torch.zeros(4), torch.zeros(1))] * (4 + 2 * self.world.rank)
        data = samples if self.length_is_known else Stream(samples)
        return super().configure_dataloaders()[0], DataLoader(data, 2)  # type: ignore[arg-type]


class UnevenStreams(UnevenParts):
    length_is_known = False


def with_other_data_on_a_tensor_parallel_rank(root: str, cls: type[Exact]) -> None:
    cls(tiny_config(root, device=LAYOUTS["tp"][1])).validate()


@pytest.mark.parametrize("cls", [UnevenParts, UnevenStreams])
def test_ranks_that_read_the_same_data_must_end_together(tmp_path: Path, cls: type[Exact]) -> None:
    with pytest.raises(RankError, match="same part of the validation data") as caught:
        run_on_ranks(with_other_data_on_a_tensor_parallel_rank, 2, str(tmp_path), cls)

    assert len(caught.value.tracebacks) == 2


class BatchNorm(Exact):
    """DDP broadcasts its buffers in each forward, in eval mode too."""

    def configure_models(self) -> None:
        super().configure_models()
        self.norm = nn.BatchNorm1d(4)

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, _ = batch
        return {"normal": self.norm(x).mean(), **super().validation_step(batch, batch_idx)}


def with_batch_norm(root: str) -> float:
    result: float = BatchNorm(tiny_config(root, device=LAYOUTS["ddp2"][1])).validate()["id"]
    return result


def test_ranks_take_part_in_ddps_broadcast_of_buffers(tmp_path: Path) -> None:
    assert run_on_ranks(with_batch_norm, 2, str(tmp_path)) == [2.0, 2.0]


# Samplers


class Own(DistributedSampler[Any]):
    def __iter__(self) -> Any:
        return super().__iter__()


def lengths_with(root: str, kind: str) -> tuple[list[int], int, int]:
    """Ids in validation, the sampler's length afterwards, and in training."""

    class WithSampler(Exact):
        def configure_dataloaders(self) -> Any:
            data = TensorDataset(torch.zeros(5, 4), torch.arange(5.0)[:, None])
            cls = Own if kind == "own" else DistributedSampler
            sampler: Any = cls(
                data, self.world.dp_size, self.world.dp_rank, False, drop_last=kind == "drops"
            )
            loader = DataLoader(data, 1, sampler=sampler)
            return loader, loader

    trainer = WithSampler(tiny_config(root, device=LAYOUTS["ddp2"][1]))
    trainer.fit()
    loader: Any = trainer.train_dataloader
    return trainer.collected, len(loader.sampler), trainer.local_batches


@pytest.mark.parametrize(
    ("kind", "ids"),
    [("pads", [[0, 2, 4], [1, 3]]), ("own", [[0, 2, 4], [1, 3, 0]]), ("drops", [[0, 2], [1, 3]])],
)
def test_a_samplers_padding_is_left_out_of_validation_only(
    tmp_path: Path, kind: str, ids: list[list[int]]
) -> None:
    outcomes = run_on_ranks(lengths_with, 2, str(tmp_path), kind)

    assert [seen for seen, _, _ in outcomes] == ids
    num_in_training = 2 if kind == "drops" else 3
    assert [rest for _, *rest in outcomes] == [[num_in_training, num_in_training]] * 2


class SizedStream(Stream):
    """Says how many samples it has; its DataLoader's number of batches is too small."""

    def __iter__(self) -> Any:
        worker = torch.utils.data.get_worker_info()
        step, first = (1, 0) if worker is None else (worker.num_workers, worker.id)
        return iter(self.samples[first::step])

    def __len__(self) -> int:
        return len(self.samples)


class WithWorkers(Exact):
    def configure_dataloaders(self) -> Any:
        samples = [(torch.zeros(4), torch.tensor([float(i)])) for i in range(9)]
        loader = DataLoader(SizedStream(samples), 4, num_workers=2)
        assert len(loader) == 3
        return super().configure_dataloaders()[0], loader


def test_workers_with_incomplete_batches_each_lose_no_sample(tmp_path: Path) -> None:
    trainer = WithWorkers(tiny_config(tmp_path))
    trainer.validate()

    assert sorted(trainer.collected) == list(range(9))
