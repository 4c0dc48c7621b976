"""Loaders: invalid ones, the length of an epoch, and agreement between ranks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from dream_trainer.testing import RankError, TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.trainer.mixins import SetupMixin


class Gives(TinyTrainer):
    loaders: Any

    def configure_dataloaders(self) -> Any:
        return self.loaders


def set_up(tmp_path: Path, loaders: Any, **training: Any) -> TinyTrainer:
    class Given(Gives):
        pass

    Given.loaders = loaders
    trainer = Given(tiny_config(tmp_path, **training))
    trainer.setup()
    return trainer


BATCH = (torch.ones(2, 4), torch.ones(2, 1))
LOADER: Any = DataLoader([BATCH])  # type: ignore[arg-type]  # a list will do as a data set


@pytest.mark.parametrize(
    ("loaders", "message"),
    [
        (None, r"Given.configure_dataloaders returned no training loader \(None\); return an"),
        ((None, [BATCH]), r"returned no training loader \(None\)"),
        ([], r"the training loader \(list\) is empty: it has 0 batches, and at least 1"),
        (([BATCH], []), r"the validation loader \(list\) is empty"),
        (DataLoader([], batch_size=2), r"the training loader \(DataLoader\) is empty"),
        (3, "the training loader, of type int, can't be iterated over"),
        ([LOADER, LOADER], "the training loader is a list of loaders, and an iterable"),
        ({"train": LOADER}, "the training loader is a dict of loaders, and an iterable"),
        ((LOADER,) * 3, "the training loader is a tuple of loaders, and an iterable"),
        ((LOADER, [LOADER]), "the validation loader is a list of loaders, and an iterable"),
    ],
    ids=[
        *("none", "no_training", "empty", "empty_validation", "empty_loader", "number"),
        *("list", "dict", "three", "several_validation"),
    ],
)
def test_unusable_loaders_are_refused(tmp_path: Path, loaders: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        set_up(tmp_path, loaders)


def test_a_trainer_without_configure_dataloaders_is_refused(tmp_path: Path) -> None:
    class Without(TinyTrainer):
        configure_dataloaders = SetupMixin.configure_dataloaders

    with pytest.raises(NotImplementedError, match="has no configure_dataloaders; write one"):
        Without(tiny_config(tmp_path)).setup()


def test_a_scheduler_can_read_the_length_of_an_epoch(tmp_path: Path) -> None:
    class Scheduled(TinyTrainer):
        def configure_schedulers(self) -> None:
            num_batches = self.num_train_batches
            assert num_batches is not None
            total = num_batches * self.training_parameters.n_epochs
            self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, total)

    trainer = Scheduled(tiny_config(tmp_path, n_epochs=3))
    trainer.fit()

    assert trainer.scheduler.last_epoch == trainer.global_step == 24
    assert trainer.scheduler.get_last_lr() == [0.0]


def test_an_epoch_is_one_pass_or_train_steps_per_epoch(tmp_path: Path) -> None:
    loaders = ([BATCH] * 6, [BATCH] * 5)

    assert set_up(tmp_path, loaders).num_train_batches == 6
    shorter = set_up(
        tmp_path,
        loaders,
        train_steps_per_epoch=2,
        gradient_accumulation_steps=2,
        val_steps_per_epoch=3,
    )
    assert (shorter.num_train_batches, shorter.num_val_batches) == (4, 3)


def test_a_longer_epoch_than_the_loader_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = set_up(tmp_path, [BATCH] * 6, train_steps_per_epoch=9)

    assert trainer.num_train_batches == 6
    assert "train_steps_per_epoch=9 needs 9 batches and the training loader has 6" in caplog.text


def test_a_loader_without_length_needs_the_number_of_steps(tmp_path: Path) -> None:
    endless = (BATCH for _ in range(100))

    with pytest.raises(ValueError, match=r"\(generator\) has no length.*train_steps_per_epoch=…"):
        set_up(tmp_path, endless)
    assert set_up(tmp_path, endless, train_steps_per_epoch=4).num_train_batches == 4


def test_a_validation_loader_without_length_is_read_to_its_end(tmp_path: Path) -> None:
    class Three:
        def __iter__(self) -> Any:
            return iter([BATCH] * 3)

    class Counts(Gives):
        loaders = ([BATCH], Three())
        seen = 0

        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            Counts.seen += 1
            return super().validation_step(batch, batch_idx)

    Counts(tiny_config(tmp_path)).fit()

    assert Counts.seen == 3


def test_a_validation_loader_without_batches_is_refused(tmp_path: Path) -> None:
    class Empty:
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(RuntimeError, match="the validation loader gave no batch"):
        set_up(tmp_path, ([BATCH], Empty())).fit()


def uneven(root: str, kind: str) -> None:
    class Uneven(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            if kind == "empty on rank 1":
                return [BATCH] * (1 - self.world.rank)
            return [BATCH] * (3 + self.world.rank)

    Uneven(tiny_config(root)).setup()


def test_ranks_with_different_numbers_of_batches_are_an_error_on_all_ranks(
    tmp_path: Path,
) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(uneven, 2, str(tmp_path), "uneven")

    for rank in (0, 1):
        text = caught.value.tracebacks[rank]
        assert "ranks disagree on the number of batches of the training loader" in text
        assert "rank 0: 3" in text
        assert "rank 1: 4" in text


def test_a_loader_that_is_empty_on_one_rank_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(uneven, 2, str(tmp_path), "empty on rank 1")

    for rank in (0, 1):
        assert "rank 1: the training loader (list) is empty" in caught.value.tracebacks[rank]


def warned(root: str, *, sampler: bool) -> list[str]:
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logging.getLogger("dream_trainer").addHandler(Keep())

    class Plain(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            if sampler:
                return super().configure_dataloaders()
            return DataLoader([BATCH[0][0]] * 8, batch_size=2, shuffle=True)

    Plain(tiny_config(root)).setup()
    return messages


def test_a_sampler_that_ignores_the_ranks_warns(tmp_path: Path) -> None:
    without = run_on_ranks(_without_sampler, 2, str(tmp_path))[0]
    assert "RandomSampler doesn't know that there are 2 data-parallel ranks" in without[0]
    assert run_on_ranks(_with_sampler, 2, str(tmp_path))[0] == []


def _without_sampler(root: str) -> list[str]:
    return warned(root, sampler=False)


def _with_sampler(root: str) -> list[str]:
    return warned(root, sampler=True)
