"""Short runs of TinyTrainer with checkpoints, and the files that they write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from training import directory, make

from dream_callbacks.checkpoint.catalog import Checkpoint, read_catalog
from dream_callbacks.checkpoint.io.local_filesystem import LocalFilesystem
from dream_trainer.callbacks import Callback, RankLocal
from dream_trainer.testing import TinyTrainer


def tiny(root: Path, *callbacks: Callback[Any], n_epochs: int = 2, **fields: Any) -> TinyTrainer:
    """A trainer of 8 steps an epoch; `fields` are of CheckpointParameters or `training`."""
    training = {"n_epochs": n_epochs, **fields.pop("training", {})}
    kind = fields.pop("kind", TinyTrainer)
    fields = {"keep_last": None, **fields}
    trainer: TinyTrainer = make(root, *callbacks, kind=kind, training=training, **fields)
    return trainer


def saved(root: Path) -> list[Checkpoint]:
    catalog = read_catalog(LocalFilesystem(directory(root)))
    assert not catalog.damaged
    return list(catalog.checkpoints)


def steps(root: Path) -> list[int]:
    return [checkpoint.step for checkpoint in saved(root)]


def scored(values: dict[int, float]) -> type[TinyTrainer]:
    """A trainer whose validation result is given for each step."""

    class Scored(TinyTrainer):
        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            return {"val_loss": torch.tensor(values[self.global_step])}

    return Scored


class Average(Callback[Any]):
    """A moving average of the weights, updated after each step, and sharded like them."""

    def __init__(self) -> None:
        self.steps = 0

    def post_setup(self) -> None:
        self.average = {n: p.detach().clone() for n, p in self.trainer.model.named_parameters()}

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.steps += 1
        for name, parameter in self.trainer.model.named_parameters():
            self.average[name].lerp_(parameter.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "steps": RankLocal(self.steps)}

    def load_state_dict(self, state_dict: dict[str, Any], trainer: Any) -> None:
        self.steps = state_dict["steps"]
        for name, tensor in state_dict["average"].items():
            self.average[name].copy_(tensor)


class SendSignal(Callback[Any]):
    """Sends this process a signal during a step, on one rank."""

    def __init__(self, number: int, step: int = 3, rank: int = 0) -> None:
        self.number = number
        self.step = step
        self.rank = rank

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == self.step - 1 and self.trainer.world.rank == self.rank:
            os.kill(os.getpid(), self.number)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file of safetensors' or torch's."""
    if path.suffix == ".safetensors":
        from safetensors import torch as safetensors_torch

        found: dict[str, torch.Tensor] = safetensors_torch.load_file(path)
    else:
        found = torch.load(path, weights_only=True)
    return found
