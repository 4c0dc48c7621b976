"""`self.loader`: the same global batches on any number of ranks, each sample on one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from dream_trainer.testing import RankError, TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.trainer.rank_sampler import RankSampler


def global_batches(num_samples: int, num_ranks: int, **options: Any) -> list[list[int]]:
    """The batches of an epoch, from the parts that `num_ranks` ranks read in batches of 4."""
    epoch = options.pop("epoch", 0)
    samplers = [
        RankSampler(
            num_samples,
            4,
            rank=rank,
            num_ranks=num_ranks,
            **{"shuffle": True, "seed": 1, "drop_last": False, **options},
        )
        for rank in range(num_ranks)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    parts = [list(sampler) for sampler in samplers]
    assert [len(part) for part in parts] == [len(sampler) for sampler in samplers]
    share = 4 // num_ranks
    num_batches = -(-num_samples // 4)
    return [
        [i for part in parts for i in part[k * share : (k + 1) * share]] for k in range(num_batches)
    ]


@pytest.mark.parametrize("num_samples", [3, 4, 5, 16, 17, 19])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_global_batches_are_those_of_one_rank(num_samples: int, num_ranks: int) -> None:
    alone = global_batches(num_samples, 1)

    assert global_batches(num_samples, num_ranks) == alone
    assert sorted(i for batch in alone for i in batch) == list(range(num_samples))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_incomplete_batch_is_dropped_if_asked(num_ranks: int) -> None:
    batches = global_batches(10, num_ranks, drop_last=True, shuffle=False)

    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], []]


def test_what_is_left_is_divided_evenly() -> None:
    parts = [
        list(RankSampler(10, 4, rank=r, num_ranks=4, shuffle=False, seed=0, drop_last=False))
        for r in range(4)
    ]

    assert parts == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]


def test_the_order_depends_on_the_epoch_and_the_seed() -> None:
    orders = [global_batches(16, 1, seed=seed, epoch=e) for seed in (1, 2) for e in (0, 1, 2)]

    assert len({str(order) for order in orders}) == 6
    assert global_batches(16, 1, seed=1, epoch=0) == orders[0]


# In a trainer


class WithLoader(TinyTrainer):
    """Keeps the ids of the samples that it trains on."""

    data_size = 18
    batch_size = 4
    options: dict[str, Any] = {}  # of the test

    def configure_dataloaders(self) -> Any:
        self.trained: list[tuple[int, ...]] = []
        data = TensorDataset(
            torch.randn(self.data_size, 4, generator=torch.Generator().manual_seed(0)),
            torch.arange(float(self.data_size))[:, None],
        )
        options = {"shuffle": True, **self.options}
        return (
            self.loader(data, self.batch_size, **options),
            self.loader(data, batch_size=self.batch_size),
        )

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.trained.append(tuple(batch[1].flatten().int().tolist()))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"id": batch[1].mean()}


def trained(root: str, *, stops_at: int | None = None, saved: Any = None) -> Any:
    trainer = WithLoader(tiny_config(root, n_epochs=2, max_steps=stops_at))
    trainer.setup()
    if saved is not None:
        trainer.load_state_dict(saved)
    trainer.fit()
    return trainer.trained, trainer.state_dict()


def batches_of(parts: list[Any]) -> list[tuple[int, ...]]:
    return [sum(batches, ()) for batches in zip(*parts, strict=True)]


def order(root: str) -> list[tuple[int, ...]]:
    seen: list[tuple[int, ...]] = trained(root)[0]
    return seen


def test_training_sees_the_same_batches_on_any_number_of_ranks(tmp_path: Path) -> None:
    alone = order(str(tmp_path))

    assert len(alone) == 8
    assert all(len(batch) == 4 for batch in alone)
    assert alone[:4] != alone[4:]
    assert batches_of(run_on_ranks(order, 2, str(tmp_path))) == alone
    assert batches_of(run_on_ranks(order, 4, str(tmp_path))) == alone


def test_training_continues_in_mid_epoch(tmp_path: Path) -> None:
    straight, _ = trained(str(tmp_path))
    first, state = trained(str(tmp_path), stops_at=6)
    second, _ = trained(str(tmp_path), saved=state)

    assert first + second == straight


def validated_ids(root: str) -> float:
    result: float = WithLoader(tiny_config(root)).validate()["id"]
    return result


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_validation_reads_each_sample_once(tmp_path: Path, num_ranks: int) -> None:
    assert run_on_ranks(validated_ids, num_ranks, str(tmp_path)) == [8.5] * num_ranks


class Misdivided(WithLoader):
    batch_size = 6


class LeftOver(WithLoader):
    data_size = 17
    options = {"drop_last": False}


def set_up(root: str, cls: type[WithLoader]) -> None:
    cls(tiny_config(root)).setup()


def test_a_batch_size_that_cannot_be_divided_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"batch_size=6 .* among 4 data-parallel ranks; use a mult"):
        run_on_ranks(set_up, 4, str(tmp_path), Misdivided)


def test_an_incomplete_training_batch_that_leaves_a_rank_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="drop_last=True"):
        run_on_ranks(set_up, 2, str(tmp_path), LeftOver)


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


def test_what_loader_cannot_divide_is_refused(tmp_path: Path) -> None:
    trainer = TinyTrainer(tiny_config(tmp_path))
    data: Any = [1, 2, 3]

    with pytest.raises(TypeError, match=r"can't divide a Streamed, .*islice\(samples"):
        trainer.loader(Streamed(), 4)
    with pytest.raises(TypeError, match=r"loader\(sampler=…\): it makes the sampler itself"):
        trainer.loader(data, 4, sampler=[0, 1])
    with pytest.raises(ValueError, match="batch_size=0"):
        trainer.loader(data, 0)
    with pytest.raises(RuntimeError, match="needs the seed"):
        trainer.loader(data, 1, shuffle=True)
    assert [batch.tolist() for batch in trainer.loader(data, 2)] == [[1, 2], [3]]
