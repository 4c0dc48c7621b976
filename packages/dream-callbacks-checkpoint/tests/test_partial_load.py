"""LoadPartialCheckpointCallback: loads matching weights and reports the rest."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_files import damage
from tiny_runs import Average, tiny
from torch import nn
from training import different, directory, weights

from dream_callbacks.checkpoint import CheckpointError, LoadPartialCheckpointCallback, catalog
from dream_callbacks.checkpoint.catalog import Checkpoint, damage_of
from dream_callbacks.checkpoint.io.local_filesystem import LocalFilesystem
from dream_callbacks.checkpoint.restore import SavedState
from dream_trainer.callbacks import Every
from dream_trainer.testing import TinyTrainer, run_on_ranks


class Finetuned(TinyTrainer):
    """TinyModel with another head, an additional block and no bias in the last layer."""

    def configure_models(self) -> None:
        super().configure_models()
        self.model.head = nn.Linear(8, 2, bias=False)
        self.model.blocks.append(nn.Linear(8, 8))


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, TinyTrainer]:
    trainer = tiny(tmp_path / "source", every=Every(steps=4))
    trainer.fit()
    return directory(tmp_path / "source"), trainer


def test_matching_weights_are_loaded_and_the_rest_is_reported(
    tmp_path: Path, source: tuple[Path, TinyTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    path, first = source
    fresh = tiny(tmp_path / "fresh", kind=Finetuned)
    fresh.setup()
    callback = LoadPartialCheckpointCallback(path)
    trainer = tiny(tmp_path / "second", callback, kind=Finetuned)
    caplog.set_level(logging.INFO)

    trainer.setup()

    found = weights(trainer)
    report = callback.report
    assert report is not None
    assert report.checkpoint == path / "step-0000000016"
    assert len(report.loaded) == 6
    assert all(torch.equal(found[name], weights(first)[name]) for name in report.loaded)
    assert report.missing == ("model.blocks.2.bias", "model.blocks.2.weight")
    assert report.unused == ("model.head.bias",)
    assert report.mismatched == {"model.head.weight": ((1, 8), (2, 8))}
    unchanged = [*report.missing, *report.mismatched]
    assert all(torch.equal(found[name], weights(fresh)[name]) for name in unchanged)
    assert "model.head.weight [1, 8] → [2, 8]" in caplog.text


def test_only_weights_are_loaded(tmp_path: Path, source: tuple[Path, TinyTrainer]) -> None:
    trainer = tiny(tmp_path / "second", LoadPartialCheckpointCallback(source[0]))

    trainer.setup()

    assert trainer.global_step == 0
    assert not trainer.optimizer.state
    assert not different(weights(trainer), weights(source[1]))
    trainer.fit()
    assert trainer.global_step == 16


@pytest.mark.parametrize("way", ["checkpoints", "run", "one"])
def test_the_path_may_be_a_run_a_directory_or_a_checkpoint(
    tmp_path: Path, source: tuple[Path, TinyTrainer], way: str
) -> None:
    path = source[0]
    paths = {"checkpoints": path, "run": path.parent, "one": path / "step-0000000008"}
    callback = LoadPartialCheckpointCallback(paths[way])

    tiny(tmp_path / "second", callback).setup()

    assert callback.report is not None
    step = "step-0000000008" if way == "one" else "step-0000000016"
    assert callback.report.checkpoint.name == step


@pytest.mark.parametrize("mode", [4, "min", "max", "best"])
def test_any_checkpoint_can_be_chosen(
    tmp_path: Path, source: tuple[Path, TinyTrainer], mode: Any
) -> None:
    callback = LoadPartialCheckpointCallback(source[0], resume_mode=mode)

    tiny(tmp_path / "second", callback).setup()

    assert callback.report is not None
    expected = {4: 4, "min": 16, "best": 16, "max": 8}[mode]
    assert callback.report.checkpoint.name == f"step-{expected:010d}"


def test_a_resumed_run_keeps_its_own_weights(
    tmp_path: Path, source: tuple[Path, TinyTrainer]
) -> None:
    own = tiny(tmp_path / "second", LoadPartialCheckpointCallback(source[0]), n_epochs=1)
    own.fit()

    again = tiny(tmp_path / "second", LoadPartialCheckpointCallback(source[0]), n_epochs=1)
    again.setup()

    assert again.global_step == 8
    assert not different(weights(again), weights(own))


def test_other_callbacks_see_the_loaded_weights(
    tmp_path: Path, source: tuple[Path, TinyTrainer]
) -> None:
    average = Average()
    trainer = tiny(tmp_path / "second", average, LoadPartialCheckpointCallback(source[0]))

    trainer.setup()

    assert not different({f"model.{n}": t for n, t in average.average.items()}, weights(source[1]))


def test_another_dtype_is_cast(tmp_path: Path, source: tuple[Path, TinyTrainer]) -> None:
    class Half(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.model.to(torch.bfloat16)

    trainer = tiny(tmp_path / "second", LoadPartialCheckpointCallback(source[0]), kind=Half)

    trainer.setup()

    expected = {name: tensor.to(torch.bfloat16) for name, tensor in weights(source[1]).items()}
    assert not different(weights(trainer), expected)


def test_a_single_model_may_have_another_name(
    tmp_path: Path, source: tuple[Path, TinyTrainer]
) -> None:
    class Renamed(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.network = self.model
            del self.model

        def configure_optimizers(self) -> None:
            self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1)

    trainer = tiny(tmp_path / "second", LoadPartialCheckpointCallback(source[0]), kind=Renamed)

    trainer.setup()

    found = {f"model.{name}": tensor for name, tensor in trainer.network.state_dict().items()}  # type: ignore[attr-defined]
    assert not different(found, weights(source[1]))


def test_a_damaged_checkpoint_is_skipped(
    tmp_path: Path, source: tuple[Path, TinyTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    damage(source[0] / "step-0000000016" / "__0_0.distcp")
    callback = LoadPartialCheckpointCallback(source[0])

    tiny(tmp_path / "second", callback).setup()

    assert callback.report is not None
    assert callback.report.checkpoint.name == "step-0000000012"
    assert "its checksum doesn't match" in caplog.text


def test_a_checkpoint_without_matching_weights_is_an_error(
    tmp_path: Path, source: tuple[Path, TinyTrainer]
) -> None:
    class Different(TinyTrainer):
        def configure_models(self) -> None:
            self.encoder = nn.Linear(1, 1)
            self.decoder = nn.Linear(1, 1)

        def configure_optimizers(self) -> None:
            self.optimizer = torch.optim.SGD(self.encoder.parameters(), lr=0.1)

    trainer = tiny(tmp_path / "second", LoadPartialCheckpointCallback(source[0]), kind=Different)

    with pytest.raises(CheckpointError, match=r"nothing in .*step-0000000016 matches the trainer"):
        trainer.setup()


def test_a_path_without_checkpoints_is_an_error_that_suggests_others(
    tmp_path: Path, source: tuple[Path, TinyTrainer]
) -> None:
    callback = LoadPartialCheckpointCallback(tmp_path / "source")

    with pytest.raises(CheckpointError, match=r"there are checkpoints in .*/checkpoints"):
        tiny(tmp_path / "second", callback).setup()
    with pytest.raises(CheckpointError, match=r"isn't a directory"):
        tiny(tmp_path / "third", LoadPartialCheckpointCallback(tmp_path / "nowhere")).setup()


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_weights_are_loaded_into_any_layout(
    tmp_path: Path, source: tuple[Path, TinyTrainer], layout: str
) -> None:
    found = run_on_ranks(loaded, 2, tmp_path / "second", source[0], layout)

    for tensors in found:
        assert not different(tensors, weights(source[1]))


def loaded(root: Path, path: Path, layout: str) -> dict[str, torch.Tensor]:
    trainer = tiny(root, LoadPartialCheckpointCallback(path), layout=layout)
    trainer.setup()
    return weights(trainer)


def test_a_checkpoint_deleted_before_it_is_protected_is_skipped(
    tmp_path: Path,
    source: tuple[Path, TinyTrainer],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reading = LocalFilesystem.reading

    def late(self: LocalFilesystem, folder: str) -> Any:
        if folder == "step-0000000016":  # another run's retention is faster
            shutil.rmtree(self.root / folder)
        return reading(self, folder)

    monkeypatch.setattr(LocalFilesystem, "reading", late)
    callback = LoadPartialCheckpointCallback(source[0])
    tiny(tmp_path / "second", callback).setup()

    assert callback.report is not None
    assert callback.report.checkpoint.name == "step-0000000012"
    assert "step-0000000016 is no longer there" in caplog.text


def test_a_checkpoint_is_protected_between_verification_and_reading(
    tmp_path: Path, source: tuple[Path, TinyTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def noted(
        filesystem: LocalFilesystem, checkpoint: Checkpoint, *args: Any, **options: Any
    ) -> list[str]:
        seen.append(filesystem.is_being_read(checkpoint.name))
        return damage_of(filesystem, checkpoint, *args, **options)

    monkeypatch.setattr(catalog, "damage_of", noted)
    tiny(tmp_path / "new", LoadPartialCheckpointCallback(source[0])).setup()

    assert seen == [True]


def test_the_source_is_protected_while_it_is_read(
    tmp_path: Path, source: tuple[Path, TinyTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    read = SavedState.read

    def noted(self: SavedState, wanted: Any) -> None:
        seen.append(self.filesystem.is_being_read(self.checkpoint.name))
        read(self, wanted)
        seen.append(self.filesystem.is_being_read(self.checkpoint.name))

    monkeypatch.setattr(SavedState, "read", noted)
    load = LoadPartialCheckpointCallback(source[0])
    tiny(tmp_path / "new", load).setup()

    assert seen == [True, True]
    assert load.report is not None
    folder = Path(load.report.checkpoint)
    assert not LocalFilesystem(folder.parent).is_being_read(folder.name)
