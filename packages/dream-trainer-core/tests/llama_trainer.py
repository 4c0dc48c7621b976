"""An ordinary trainer of a language model with 1.1 billion parameters, for any layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dream_trainer import DreamTrainer, DreamTrainerConfig
from dream_trainer.callbacks import CallbackCollection
from dream_trainer.configs import DeviceParameters, TrainingParameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

VOCABULARY, WIDTH, NUM_LAYERS, HIDDEN_WIDTH = 32_000, 2048, 22, 5632
NUM_HEADS, NUM_KEY_HEADS, HEAD_WIDTH = 32, 8, 64
CONTEXT = 128
NUM_TRAIN_SAMPLES, NUM_VAL_SAMPLES, BATCH_SIZE_PER_RANK = 8192, 2048, 2
NUM_PARAMETERS = 1_123_117_056


class Attention(nn.Module):
    """Causal attention with fewer heads for keys and values than for queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, NUM_HEADS * HEAD_WIDTH, bias=False)
        self.k = nn.Linear(WIDTH, NUM_KEY_HEADS * HEAD_WIDTH, bias=False)
        self.v = nn.Linear(WIDTH, NUM_KEY_HEADS * HEAD_WIDTH, bias=False)
        self.out = nn.Linear(NUM_HEADS * HEAD_WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)  # (B, heads, T, head width)
            for part in (self.q(x), self.k(x), self.v(x))
        )
        q, k = rotated(q, rotation), rotated(k, rotation)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(-2))
        return out


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN_WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN_WIDTH, bias=False)
        self.down = nn.Linear(HIDDEN_WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(WIDTH)
        self.attention = Attention()
        self.feed_forward_norm = nn.RMSNorm(WIDTH)
        self.feed_forward = FeedForward()

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        out: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return out


class Llama(nn.Module):
    """Tokens `(batch, seq)` to logits `(batch, seq, vocab)`."""

    rotation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(NUM_LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("rotation", rotations(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.rotation[: tokens.shape[1]])
        out: Tensor = self.head(self.norm(x))
        return out

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()
        self.rotation = rotations()


def rotations() -> Tensor:
    """Angles by position and pair of channels, `(seq, head width / 2)`."""
    frequencies = 10_000 ** -(torch.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH)
    return torch.outer(torch.arange(CONTEXT), frequencies)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Queries or keys `(B, heads, T, head width)` with pairs of channels turned by the angles."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


class MeanLoss:
    """A metric as users write them: not a module."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.losses: list[Tensor] = []

    def update(self, loss: Tensor) -> None:
        self.losses.append(loss)

    def compute(self) -> Tensor:
        return torch.stack(self.losses).mean()


class LlamaTrainer(DreamTrainer):
    model: Llama
    optimizer: torch.optim.AdamW
    scheduler: torch.optim.lr_scheduler.LRScheduler
    mean_loss: MeanLoss

    def configure_models(self) -> None:
        self.model = Llama()

    def init_weights(self) -> None:
        self.model.init_weights()

    def apply_tensor_parallel(self, mesh: DeviceMesh) -> None:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        plan = {
            "embed": RowwiseParallel(input_layouts=Replicate()),
            "layers.*.attention.q": ColwiseParallel(),
            "layers.*.attention.k": ColwiseParallel(),
            "layers.*.attention.v": ColwiseParallel(),
            "layers.*.attention.out": RowwiseParallel(),
            "layers.*.feed_forward.gate": ColwiseParallel(),
            "layers.*.feed_forward.up": ColwiseParallel(),
            "layers.*.feed_forward.down": RowwiseParallel(),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(self.model, mesh, plan)

    def configure_optimizers(self) -> None:
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": 0.1},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-4)

    def configure_schedulers(self) -> None:
        num_batches = self.num_train_batches
        assert num_batches is not None
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_batches)

    def configure_dataloaders(self) -> tuple[DataLoader[Any], DataLoader[Any]]:
        return self.loader(NUM_TRAIN_SAMPLES), self.loader(NUM_VAL_SAMPLES)

    def loader(self, num_samples: int) -> DataLoader[Any]:
        tokens = torch.randint(VOCABULARY, (num_samples, CONTEXT))
        sampler: DistributedSampler[Any] = DistributedSampler(
            TensorDataset(tokens), num_replicas=self.world.dp_size, rank=self.world.dp_rank
        )
        return DataLoader(TensorDataset(tokens), batch_size=BATCH_SIZE_PER_RANK, sampler=sampler)

    def configure_metrics(self) -> None:
        self.mean_loss = MeanLoss()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss = self.loss(batch)
        self.backward(loss)
        self.step(self.optimizer)
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss = self.loss(batch)
        self.mean_loss.update(loss)
        return {"val_loss": loss}

    def loss(self, batch: Any) -> Tensor:
        (tokens,) = batch
        logits = self.model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def llama_config(
    device_parameters: DeviceParameters, callbacks: CallbackCollection | None = None
) -> DreamTrainerConfig:
    return DreamTrainerConfig(
        device_parameters=device_parameters,
        training_parameters=TrainingParameters(n_epochs=1, gradient_clip_val=1.0),
        callbacks=callbacks or CallbackCollection(),
    )
