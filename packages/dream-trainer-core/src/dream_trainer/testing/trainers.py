"""TinyTrainer: a real trainer with a tiny model, for any layout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dream_trainer.callbacks.callback import Callback
from dream_trainer.callbacks.collection import CallbackCollection
from dream_trainer.configs.device import DeviceParameters
from dream_trainer.configs.training import TrainingParameters
from dream_trainer.trainer.dream import DreamTrainer, DreamTrainerConfig


@dataclass(kw_only=True)
class TinyConfig(DreamTrainerConfig):
    """Sizes of the tiny task: regression on `num_samples` vectors.

    Args:
        num_samples: Size of the training set; the validation set has a quarter of it.
        batch_size: Global batch size, over all data-parallel ranks.
        width: Size of the hidden layers.
        num_blocks: Number of hidden layers, each a block in a ModuleList.
        learning_rate: Learning rate of AdamW.
    """

    num_samples: int = 32
    batch_size: int = 4
    width: int = 8
    num_blocks: int = 2
    learning_rate: float = 1e-2


def tiny_config(
    root_dir: str | Path = "runs",
    callbacks: Iterable[Callback[Any]] | CallbackCollection = (),
    *,
    device: DeviceParameters | None = None,
    **training: Any,
) -> TinyConfig:
    """A config for TinyTrainer on the CPU.

    Args:
        root_dir: Parent of run directories, such as pytest's `tmp_path`.
        callbacks: The callbacks, in order.
        device: Layout. Default: DDP over all ranks.
        **training: Fields of TrainingParameters; by default one epoch.
    """
    return TinyConfig(
        root_dir=root_dir,
        device_parameters=device or DeviceParameters(device="cpu"),
        training_parameters=TrainingParameters(**training),
        callbacks=(
            callbacks
            if isinstance(callbacks, CallbackCollection)
            else CallbackCollection(list(callbacks))
        ),
    )


class TinyModel(nn.Module):
    """A residual MLP: `(batch, 4)` to `(batch, 1)`."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(num_blocks))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        out: Tensor = self.head(x)
        return out


class TinyTrainer(DreamTrainer):
    """Trains TinyModel on synthetic data; the same global batches in every layout."""

    config: TinyConfig
    model: TinyModel
    optimizer: torch.optim.Optimizer

    def configure_models(self) -> None:
        self.model = TinyModel(self.config.width, self.config.num_blocks)

    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.config.learning_rate)

    def configure_dataloaders(self) -> tuple[Iterable[Any], Iterable[Any]]:
        num_samples = self.config.num_samples
        train, val = _task(num_samples, seed=0), _task(num_samples // 4, seed=1)
        return self._loader(train, shuffle=True), self._loader(val, shuffle=False)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        loss = F.mse_loss(self.model(x).float(), y)
        self.backward(loss)
        if not self.is_accumulating_gradients:
            self.step(self.optimizer)
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        return {"val_loss": F.mse_loss(self.model(x).float(), y)}

    def _loader(self, dataset: TensorDataset, *, shuffle: bool) -> Iterable[Any]:
        sampler: Any = DistributedSampler(
            dataset, num_replicas=self.world.dp_size, rank=self.world.dp_rank, shuffle=shuffle
        )
        return DataLoader(
            dataset, batch_size=self.config.batch_size // self.world.dp_size, sampler=sampler
        )


def _task(num_samples: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, 4, generator=generator)
    return TensorDataset(x, torch.sin(x.sum(dim=1, keepdim=True)))
