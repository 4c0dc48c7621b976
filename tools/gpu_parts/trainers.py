"""What the parts train: small trainers whose weights and data don't depend on the device."""

from __future__ import annotations

import dataclasses
import importlib.util
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dream_trainer import DreamTrainer, DreamTrainerConfig
from dream_trainer.callbacks import Callback, CallbackCollection
from dream_trainer.configs import DeviceParameters, TrainingParameters
from dream_trainer.configs.device import MeshShape
from dream_trainer.world import World


class Net(nn.Module):
    """A residual MLP with a buffer: `(batch, 16)` to `(batch, 1)`."""

    def __init__(self, width: int, num_blocks: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(num_blocks))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 1)
        self.register_buffer("scale", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + self.dropout(torch.tanh(block(x))) * self.scale.to(x.dtype)
        out: Tensor = self.head(x)
        return out


@dataclass(kw_only=True)
class NetConfig(DreamTrainerConfig):
    """Sizes of NetTrainer.

    Args:
        width: Of the hidden layers.
        num_blocks: Number of hidden layers.
        num_batches: Batches in an epoch.
        batch_size: Samples in a batch.
        dropout: Probability.
        num_workers: Of the loader, which pins its memory on a GPU.
        shuffle: Shuffle the samples; the order depends on the generators of the run.
        optimizer_options: Of AdamW.
    """

    width: int = 64
    num_blocks: int = 3
    num_batches: int = 20
    batch_size: int = 8
    dropout: float = 0.0
    num_workers: int = 0
    shuffle: bool = False
    optimizer_options: dict[str, Any] = field(default_factory=dict)


class NetTrainer(DreamTrainer):
    """Regression on fixed data; the same initial weights on every device and in every layout."""

    config: NetConfig
    model: Net
    optimizer: torch.optim.Optimizer

    def configure_models(self) -> None:
        config = self.config
        self.model = Net(config.width, config.num_blocks, config.dropout)

    def init_weights(self) -> None:
        for name, parameter in self.model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            full = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            # There is one rank: its shard is the whole tensor.
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.copy_(full)
        self.model.scale.fill_(0.5)  # type: ignore[operator]  # a buffer

    def configure_optimizers(self) -> None:
        options = {"lr": 1e-3, **self.config.optimizer_options}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **options)

    def configure_dataloaders(self) -> Any:
        config, generator = self.config, torch.Generator().manual_seed(0)
        x = torch.randn(config.num_batches * config.batch_size, 16, generator=generator)
        return DataLoader(
            TensorDataset(x, torch.sin(x.sum(1, keepdim=True))),
            config.batch_size,
            shuffle=config.shuffle,
            num_workers=config.num_workers,
            pin_memory=self.world.device.type == "cuda",
        )

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        loss = F.mse_loss(self.model(x).float(), y)
        self.backward(loss)
        if not self.is_accumulating_gradients:
            self.step(self.optimizer)
        return {"loss": loss}


def net_config(
    root: str | Path,
    device: DeviceParameters,
    callbacks: list[Callback[Any]],
    *,
    training: dict[str, Any] | None = None,
    **sizes: Any,
) -> NetConfig:
    """A config for NetTrainer.

    Args:
        root: Parent of run directories.
        device: Layout and device.
        callbacks: In order.
        training: Fields of TrainingParameters; by default one epoch.
        **sizes: Fields of NetConfig.
    """
    return NetConfig(
        root_dir=root,
        seed=0,
        device_parameters=device,
        training_parameters=TrainingParameters(**(training or {})),
        callbacks=CallbackCollection(callbacks),
        **sizes,
    )


class Losses(Callback[DreamTrainer]):
    """Keeps the loss of each batch, as the loop hands it to callbacks, without reading it."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.kept.append(result["loss"])

    def values(self) -> list[float]:
        """All of them, read from the device."""
        return [float(loss) for loss in self.kept]


class _ShardedShape(MeshShape):
    @property
    def uses_fsdp(self) -> bool:
        return True


class OneRankWorld(World):
    """A world of one rank that takes the paths of several: NCCL, FSDP2, the failure monitor.

    Needs the environment variables of a rank: `cases.rank_variables()`.

    Args:
        parameters: As of World.
        shards: Shard the models with FSDP2.
    """

    def __init__(self, parameters: DeviceParameters, *, shards: bool = True) -> None:
        super().__init__(parameters)
        if shards:
            self.shape = _ShardedShape(**dataclasses.asdict(self.shape))

    @property
    def is_distributed(self) -> bool:
        return True


def has_library(name: str) -> bool:
    """Whether an optional library is installed."""
    return importlib.util.find_spec(name) is not None


def largest_difference(found: list[float], wanted: list[float]) -> float:
    """The largest relative difference of two lists; infinite if their lengths differ."""
    if len(found) != len(wanted):
        return float("inf")
    pairs = zip(found, wanted, strict=True)
    return max((abs(a - b) / max(abs(b), 1e-12) for a, b in pairs), default=0.0)
