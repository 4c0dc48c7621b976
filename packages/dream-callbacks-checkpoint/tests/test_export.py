"""Exported weights load into a plain module."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import read_tensors, tiny
from torch import nn
from training import CrashAt, PlannedError, different, weights

from dream_callbacks.checkpoint import CheckpointError, ExportCallback
from dream_trainer.callbacks import Callback
from dream_trainer.testing import TinyTrainer, run_on_ranks
from dream_trainer.testing.trainers import TinyModel

safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_exported_weights_load_into_a_plain_module(tmp_path: Path, name: str) -> None:
    kind: Any = "torch" if name.endswith(".pt") else "safetensors"
    trainer = tiny(tmp_path, ExportCallback(f"exports/{name}", kind))

    trainer.fit()

    model = TinyModel(8, 2)
    model.load_state_dict(read_tensors(trainer.run_dir / "exports" / name))
    assert not different(
        {f"model.{key}": tensor for key, tensor in model.state_dict().items()}, weights(trainer)
    )


def test_the_checksum_file_is_read_by_sha256sum(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, ExportCallback("model.safetensors"))

    trainer.fit()

    command = ["sha256sum", "--check", "model.safetensors.sha256"]
    subprocess.run(command, cwd=trainer.run_dir, check=True, capture_output=True)
    names = sorted(path.name for path in trainer.run_dir.iterdir())
    assert names == ["checkpoints", "model.safetensors", "model.safetensors.sha256"]


def test_an_absolute_path_is_used_unchanged(tmp_path: Path) -> None:
    tiny(tmp_path / "runs", ExportCallback(tmp_path / "out" / "model.pt", "torch")).fit()

    assert (tmp_path / "out" / "model.pt").exists()


class Two(TinyTrainer):
    def configure_models(self) -> None:
        super().configure_models()
        self.critic = nn.Linear(2, 2)


def test_several_models_get_a_file_each(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, ExportCallback("exports"), kind=Two)

    trainer.fit()

    assert sorted(p.name for p in (trainer.run_dir / "exports").glob("*.safetensors")) == [
        "critic.safetensors",
        "model.safetensors",
    ]


def test_several_models_in_one_file_are_refused_before_training(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, ExportCallback("model.safetensors"), kind=Two)

    with pytest.raises(ValueError, match=r"is one file, and there are 2 models \(model, critic\)"):
        trainer.setup()


def test_tied_weights_are_exported_under_each_name(tmp_path: Path) -> None:
    class Tied(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.model.blocks[1].weight = self.model.blocks[0].weight

    trainer = tiny(tmp_path, ExportCallback("model.safetensors"), kind=Tied)

    trainer.fit()

    found = read_tensors(trainer.run_dir / "model.safetensors")
    assert torch.equal(found["blocks.0.weight"], found["blocks.1.weight"])


def test_nothing_is_exported_after_an_error(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, ExportCallback("model.safetensors"), CrashAt(3))

    with pytest.raises(PlannedError):
        trainer.fit()

    assert not (trainer.run_dir / "model.safetensors").exists()


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    for n_epochs in (1, 2):
        trainer = tiny(tmp_path, ExportCallback("model.pt", "torch"), n_epochs=n_epochs)
        trainer.fit()

        found = read_tensors(trainer.run_dir / "model.pt")
        assert not different({f"model.{k}": t for k, t in found.items()}, weights(trainer))


def test_a_path_that_cant_be_written_to_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(CheckpointError, match=r"/file/model\.pt|/file'"):
        tiny(tmp_path / "runs", ExportCallback(tmp_path / "file" / "model.pt", "torch")).fit()


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"format='onnx'"):
        ExportCallback("model.onnx", "onnx")  # type: ignore[arg-type]


def test_it_exports_before_a_signal_ends_the_process(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, Callback(), ExportCallback("exports"))

    assert trainer.callbacks.plan().hooks["post_fit"] == ("ExportCallback", "CheckpointCallback")


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_sharded_weights_are_gathered(tmp_path: Path, layout: str) -> None:
    found = run_on_ranks(export_from, 2, tmp_path, layout)

    model = TinyModel(8, 2)
    model.load_state_dict(read_tensors(next(tmp_path.rglob("model.safetensors"))))
    assert not different(
        {f"model.{key}": tensor for key, tensor in model.state_dict().items()}, found[0]
    )


def export_from(root: Path, layout: str) -> dict[str, torch.Tensor]:
    trainer = tiny(root, ExportCallback("model.safetensors"), layout=layout)
    trainer.fit()
    return weights(trainer)
