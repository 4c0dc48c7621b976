"""Runs for tests: a trainer with everything that makes exact resuming hard, on any layout."""

from __future__ import annotations

import functools
import logging
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler

from dream_callbacks.checkpoint import (
    AsyncCheckpointCallback,
    CheckpointCallback,
    CheckpointParameters,
)
from dream_trainer.callbacks import Callback, CallbackCollection, Every
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, tiny_config
from dream_trainer.trainer import WeightedMean

CALLBACKS: dict[str, type[CheckpointCallback]] = {
    "sync": CheckpointCallback,
    "async": AsyncCheckpointCallback,
}
LAYOUTS: dict[str, Callable[[], DeviceParameters]] = {
    "single": lambda: DeviceParameters.SINGLE_DEVICE(device="cpu"),
    "ddp": lambda: DeviceParameters.DDP(device="cpu"),
    "fsdp": lambda: DeviceParameters.FSDP(device="cpu"),
    "hsdp": lambda: DeviceParameters.HSDP(dp_shard=2, device="cpu"),
    "fsdp+tp": lambda: DeviceParameters.FSDP(device="cpu", tensor_parallel=2),
}


class Augmented(Dataset[Any]):
    """Vectors that hold their index, with noise from Python's, numpy's and torch's generators."""

    def __init__(self, num_samples: int, noise: float) -> None:
        self.num_samples = num_samples
        self.noise = noise

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Tensor:
        noise = random.random() + float(numpy.random.rand()) + torch.rand(()).item()
        return torch.full((4,), float(index) / self.num_samples) + self.noise * noise


class Sums:
    """A metric: the sum of what it saw, and each batch's."""

    def reset(self) -> None:
        self.total, self.parts = torch.zeros(()), list[Tensor]()

    def update(self, batch: Tensor) -> None:
        self.total += batch.sum()
        self.parts.append(batch.sum())

    def compute(self) -> Tensor:
        return self.total / len(self.parts)


class Everything(TinyTrainer):
    """Shuffling, augmentation, dropout, a scheduler, accumulation.

    With `reports` "all kinds": batches that begin with texts, and results with a WeightedMean,
    numbers of numpy, keys that differ between batches and ranks, and a metric of training.
    """

    loader = "distributed"
    num_workers = 0
    shuffle = True
    noise = 0.1
    dropout = 0.2
    has_scheduler = True
    reports = "loss"

    def configure_schedulers(self) -> None:
        if self.has_scheduler:
            self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=20)

    def configure_dataloaders(self) -> Any:
        return self._augmented(24, shuffle=self.shuffle), self._augmented(8, shuffle=False)

    def configure_train_metrics(self) -> None:
        if self.reports == "all kinds":
            self.sums = Sums()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        batch = batch[-1] if self.reports == "all kinds" else batch
        loss = nn.functional.dropout(self.model(batch), self.dropout).square().mean()
        self.backward(loss)
        if not self.is_accumulating_gradients:
            self.step(self.optimizer)
        result = {"loss": loss, "seen": batch.sum()}
        if self.reports == "all kinds":
            self.sums.update(batch)
            result |= self._numbers(loss.detach(), batch_idx)
        return result

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        if self.reports == "loss":
            return {"val_loss": self.model(batch).square().mean()}
        loss = self.model(batch[-1]).square().mean()
        return {"val_loss": loss, **self._numbers(loss, batch_idx)}

    def _numbers(self, loss: Tensor, batch_idx: int) -> dict[str, Any]:
        part = (batch_idx + self.world.dp_rank) % 2
        return {
            "weighted": WeightedMean(loss, torch.tensor(batch_idx)),
            "weighted_numpy": WeightedMean(numpy.float32(loss.item()), numpy.int64(part)),
            "numpy": loss.numpy().reshape(1),
            f"part_{part}": loss,
        }

    def _augmented(self, num_samples: int, *, shuffle: bool) -> Iterable[Any]:
        dataset = Augmented(num_samples, self.noise)
        sampler: Any = DistributedSampler(
            dataset, num_replicas=self.world.dp_size, rank=self.world.dp_rank, shuffle=shuffle
        )
        if self.world.dp_size == 1 and self.loader == "plain":
            sampler = RandomSampler(dataset) if shuffle else None
        return LOADERS[self.loader](
            dataset,
            batch_size=4 // self.world.dp_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_with_texts if self.reports == "all kinds" else None,
        )


def _with_texts(samples: list[Tensor]) -> Any:
    return ["text"] * len(samples), torch.stack(samples)


def _stateful(*args: Any, **kwargs: Any) -> Iterable[Any]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader: Iterable[Any] = StatefulDataLoader(*args, **kwargs)
    return loader


LOADERS: dict[str, Callable[..., Iterable[Any]]] = {
    "plain": DataLoader,
    "distributed": DataLoader,
    "persistent": functools.partial(DataLoader, persistent_workers=True),
    "stateful": _stateful,
}


class History(Callback[Any]):
    """The result of each batch, by its number in the run; repeated batches replace earlier ones."""

    def __init__(self) -> None:
        self.batches: dict[int, tuple[float, float]] = {}
        self.epochs: dict[int, float] = {}
        self.validations: dict[int, float] = {}

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        values = (result["loss"].item(), result.get("seen", torch.zeros(())).item())
        self.batches[self.trainer.local_batches] = values

    def post_train_epoch(self, result: dict[str, Any]) -> None:
        self.epochs[self.trainer.current_epoch] = result["loss"]

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self.validations[self.trainer.global_step] = result["val_loss"]


class PlannedError(Exception):
    """Ends a run as a crash does: nothing more is saved."""


class CrashAt(Callback[Any]):
    """Raises after a number of batches, or in a validation."""

    def __init__(self, batch: int, *, in_validation: bool = False) -> None:
        self.batch = batch
        self.in_validation = in_validation

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if not self.in_validation and self.trainer.local_batches == self.batch:
            raise PlannedError

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        is_training = self.trainer.local_batches >= self.batch
        if self.in_validation and is_training and batch_idx == 1:
            raise PlannedError


def make(
    root: Path,
    *callbacks: Callback[Any],
    kind: type[TinyTrainer] = Everything,
    layout: str = "single",
    parameters: CheckpointParameters | None = None,
    every: Every | None = None,
    callback: str = "sync",
    training: dict[str, Any] | None = None,
    **checkpoint: Any,
) -> Any:
    """A trainer with a CheckpointCallback; `checkpoint` are fields of its parameters."""
    parameters = parameters or CheckpointParameters(every=every, **checkpoint)
    collection = CallbackCollection([CALLBACKS[callback](parameters), *callbacks])
    return kind(
        tiny_config(root, collection, device=LAYOUTS[layout](), **(training or {"n_epochs": 2}))
    )


class Filled(TinyTrainer):
    """Every value of the model and its optimizer is the step, so that a mix of two steps shows.

    With 8 MB of them, files have a full chunk and more, on each of two ranks too.
    """

    def configure_models(self) -> None:
        super().configure_models()
        self.model.register_parameter("wide", nn.Parameter(torch.zeros(2048, 1024)))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batch, batch_idx)
        if not self.is_accumulating_gradients:
            step = float(self.global_step + 1)
            with torch.no_grad():
                for tensor in (*self.model.parameters(), *_optimizer_tensors(self.optimizer)):
                    tensor.fill_(step)
        return result


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values()]


class Acknowledged(logging.Handler):
    """Writes each reported step to a file, which outlives the process."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("saved step"):
            with self.path.open("a") as file:
                file.write(f"{record.args[0]}\n")  # type: ignore[index]  # a tuple


def train_until_killed(root: Path, callback: str) -> None:
    """Body of a process: saves each step, and records the reported steps."""
    layout = "fsdp" if os.environ["WORLD_SIZE"] != "1" else "single"
    logger = logging.getLogger("dream_callbacks.checkpoint")
    logger.setLevel(logging.INFO)
    logger.addHandler(Acknowledged(root / "acknowledged"))
    make(
        root,
        kind=Filled,
        layout=layout,
        callback=callback,
        every=Every(steps=1),
        save_on_signal=False,
        training={"n_epochs": 100_000, "num_sanity_val_steps": 0},
    ).fit()


def weights(trainer: Any) -> dict[str, Tensor]:
    """Unsharded weights of all models. Collective where they are sharded."""
    found = {}
    for name, model in trainer.named_models().items():
        for key, tensor in model.state_dict().items():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            found[f"{name}.{key}"] = full.detach().clone()
    return found


def moments(trainer: Any) -> dict[str, Tensor]:
    """Unsharded tensors of all optimizers. Collective where they are sharded."""
    found = {}
    for name, optimizer in trainer.state_dict()["optimizers"].items():
        for parameter, state in optimizer["state"].items():
            for key, tensor in state.items():
                full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                found[f"{name}.{parameter}.{key}"] = full.detach().clone()
    return found


def different(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names whose tensors aren't equal bit for bit."""
    names = sorted({*first, *second})
    return [
        n
        for n in names
        if n not in first or n not in second or not torch.equal(first[n], second[n])
    ]


def checkpoints(root: Path) -> list[str]:
    """Names of the checkpoints below a root, in order."""
    return sorted(path.name for path in root.rglob("step-*") if path.is_dir())


def directory(root: Path) -> Path:
    """The one checkpoint directory below a root."""
    # Not by rglob: it fails if a folder that it looks into is deleted meanwhile.
    patterns = ("checkpoints", "*/*/*/checkpoints")
    (found,) = [path for each in patterns for path in root.glob(each) if path.is_dir()]
    return found
