"""A user's script that trains a tiny transformer, unchanged for every way to start it.

python toy.py …    torchrun --nproc-per-node=2 toy.py --layout fsdp …
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from dream_trainer import DreamTrainer, DreamTrainerConfig, WeightedMean
from dream_trainer.callbacks import Callback, CallbackCollection
from dream_trainer.configs import DeviceParameters, TrainingParameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# The callbacks of each installed package.
CALLBACKS = {
    "checkpoint": "CheckpointCallback",
    "fsdp": "OptimizeFSDP",
    "logging": "LoggerCallback",
    "profile": "BenchmarkCallback",
    "summary": "ProgressBar",
}

VOCABULARY, CONTEXT, WIDTH, HEAD_WIDTH, GLOBAL_BATCH = 16, 8, 16, 4, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        # No biases: the gradient of a key's bias is rounding error, which Adam would scale up.
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.context: DeviceMesh | None = None
        """Ranks that have a part of each sequence, in order."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            part.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)  # (B, heads, T, head width)
            for part in (self.q(h), self.k(h), self.v(h))
        )
        if self.context is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = (
                all_gather_tensor_autograd(part.contiguous(), 2, self.context) for part in (k, v)
            )
            first = self.context.get_local_rank() * q.size(2)
            is_seen = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=x.device)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=is_seen.tril(first))
        return x + self.out(y.transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def token_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(VOCABULARY, (64, 1), generator=generator)
    return TensorDataset((start + torch.arange(CONTEXT + 1)) % VOCABULARY)


def with_names(samples: list[tuple[Tensor]]) -> tuple[list[str], Tensor]:
    """A batch that begins with texts, as many do."""
    return ["text"] * len(samples), torch.stack([tokens for (tokens,) in samples])


def next_token_loss(model: nn.Module, tokens: Tensor, part: int = 0, num_parts: int = 1) -> Tensor:
    """Mean loss over one part of the sequences."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(inputs.chunk(num_parts, dim=1)[part])  # (B, T / num_parts, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.chunk(num_parts, dim=1)[part].flatten())


def divide_layers(model: Transformer, mesh: DeviceMesh) -> None:
    """Shard heads, vocabulary and, between them, sequences, so that every parameter is sharded."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    sequence = Shard(1)
    plan: dict[str, Any] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=sequence),
        "blocks.*.norm": SequenceParallel(),
        **{f"blocks.*.{name}": ColwiseParallel(input_layouts=sequence) for name in "qkv"},
        "blocks.*.out": RowwiseParallel(output_layouts=sequence),
        "head": ColwiseParallel(input_layouts=sequence, output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)


def divide_sequences(model: Transformer, mesh: DeviceMesh) -> None:
    """Attention of this rank's queries over the keys and values of all ranks."""
    for block in model.blocks:
        block.context = mesh  # type: ignore[assignment]  # a Block


class Toy(DreamTrainer):
    def configure_models(self) -> None:
        self.model = Transformer()

    def apply_tensor_parallel(self, mesh: DeviceMesh) -> None:
        divide_layers(self.model, mesh)

    def apply_context_parallel(self, mesh: DeviceMesh) -> None:
        divide_sequences(self.model, mesh)

    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def configure_dataloaders(self) -> Any:
        data, size = token_data(), self.world.dp_size
        sampler = DistributedSampler(data, num_replicas=size, rank=self.world.dp_rank)
        loader = DataLoader(
            data, batch_size=GLOBAL_BATCH // size, sampler=sampler, collate_fn=with_names
        )
        # On 2 ranks one has fewer batches of the five, on 4 three have.
        five = self.loader(Subset(data, range(5)), batch_size=size, collate_fn=with_names)
        return loader, {"all": loader, "five": five}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        _, tokens = batch
        loss = self.loss(tokens)
        self.backward(loss)
        if not self.is_accumulating_gradients:
            self.step(self.optimizer)
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        _, tokens = batch
        is_low = tokens[:, 0] < 3  # none in some batches
        second = WeightedMean(tokens[is_low, 1].float().mean(), is_low.sum())
        return {"val_loss": self.loss(tokens), "second_token": second}

    def loss(self, tokens: Tensor) -> Tensor:
        return next_token_loss(self.model, tokens, self.world.cp_rank, self.world.cp_size)


class GlobalLosses(Callback[DreamTrainer]):
    """Records the loss of each global batch, and the result of each validation."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.validations: list[dict[str, float]] = []

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.losses.append(self.trainer.world.all_reduce(result["loss"]).item())

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self.validations.append(result)


class Sleeps(Callback[DreamTrainer]):
    """Slows down steps, prints that training began, and writes a file when it is closed."""

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            sys.stdout.write("training\n")
            sys.stdout.flush()
        time.sleep(0.05)

    def post_fit(self) -> None:
        Path(f"closed-{self.trainer.world.rank}").touch()


LAYOUTS: dict[str, Callable[..., DeviceParameters]] = {
    "single": DeviceParameters.SINGLE_DEVICE,
    "ddp": DeviceParameters.DDP,
    "fsdp": DeviceParameters.FSDP,
    "tp": partial(DeviceParameters, dp_replicate=1, tensor_parallel="auto"),
    "hsdp": partial(DeviceParameters.HSDP, dp_shard=2),
    "ddp+tp": partial(DeviceParameters.DDP, tensor_parallel=2),
    "fsdp+tp": partial(DeviceParameters.FSDP, tensor_parallel=2),
    "cp": partial(DeviceParameters, dp_replicate=1, context_parallel="auto"),
    "fsdp+cp": partial(DeviceParameters.FSDP, context_parallel=2),
}


def make(
    root_dir: str | Path,
    layout: str = "ddp",
    device: Literal["cpu", "cuda"] = "cpu",
    callbacks: Iterable[Callback[Any]] = (),
    **training: Any,
) -> tuple[Toy, GlobalLosses]:
    losses = GlobalLosses()
    config = DreamTrainerConfig(
        root_dir=root_dir,
        device_parameters=LAYOUTS[layout](device=device),
        training_parameters=TrainingParameters(**training),
        callbacks=CallbackCollection([losses, *callbacks]),
    )
    return Toy(config), losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layout", default="ddp", choices=LAYOUTS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sleep", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    trainer, losses = make("runs", options.layout, n_epochs=2)
    if options.sleep:
        trainer.callbacks.append(Sleeps())
    trainer.fit()
    if options.out is not None and trainer.world.is_global_zero:
        options.out.write_text(
            json.dumps(
                {
                    "losses": losses.losses,
                    "world_size": trainer.world.world_size,
                    "process_group": torch.distributed.is_initialized(),
                }
            )
        )


if __name__ == "__main__":
    main()
