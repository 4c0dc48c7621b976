"""The toy's training in plain PyTorch, in each layout; the trainer must equal it bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler
from toy import (
    GLOBAL_BATCH,
    Transformer,
    divide_layers,
    divide_sequences,
    next_token_loss,
    token_data,
)


class Parallel(NamedTuple):
    """A model in a layout, with what the loop needs.

    Args:
        model: Sharded or parallelized.
        data: Index and number of data-parallel ranks.
        sequence: Index and number of context-parallel ranks.
        set_gradient_sync: Whether the next backward reduces gradients.
    """

    model: nn.Module
    data: tuple[int, int] = (0, 1)
    sequence: tuple[int, int] = (0, 1)
    set_gradient_sync: Callable[[bool], None] = lambda _: None


def divided(model: Transformer, layout: str) -> Parallel:
    """Parallelize a model over all ranks."""
    if layout == "single":
        return Parallel(model)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    everyone = dist.get_rank(), size
    if layout == "ddp":
        copies = nn.parallel.DistributedDataParallel(model)

        def set_ddp_sync(sync: bool) -> None:
            copies.require_backward_grad_sync = sync

        return Parallel(copies, everyone, set_gradient_sync=set_ddp_sync)
    if layout == "fsdp":
        return Parallel(sharded(model), everyone, set_gradient_sync=model_sync(model))
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("copies", "shards"))
        return Parallel(sharded(model, mesh=mesh), everyone, set_gradient_sync=model_sync(model))
    if layout == "tp":
        divide_layers(model, init_device_mesh("cpu", (size,), mesh_dim_names=("tp",)))
        return Parallel(model)
    if layout == "cp":
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
        divide_sequences(model, mesh)
        sharded(model, mesh=mesh)
        return Parallel(model, sequence=everyone, set_gradient_sync=model_sync(model))
    if layout == "fsdp+cp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "cp"))
        divide_sequences(model, mesh["cp"])
        sharded(model)
        data = mesh.get_local_rank("dp"), size // 2
        return Parallel(model, data, (mesh.get_local_rank("cp"), 2), model_sync(model))
    names = ("copies", "shards", "tp")
    sizes = (1, size // 2, 2) if layout == "fsdp+tp" else (size // 2, 1, 2)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    divide_layers(model, mesh["tp"])
    sharded(model, mesh=mesh["shards"] if layout == "fsdp+tp" else mesh["copies", "shards"])
    data = dist.get_rank() // 2, size // 2
    return Parallel(model, data, set_gradient_sync=model_sync(model))


def sharded(model: Transformer, **config: Any) -> Transformer:
    for block in model.blocks:
        fully_shard(block, **config)
    fully_shard(model, **config)
    return model


def model_sync(model: nn.Module) -> Callable[[bool], None]:
    setter: Callable[[bool], None] = model.set_requires_gradient_sync  # type: ignore[assignment]
    return setter


def train(
    layout: str, max_steps: int, accumulation: int, clip_norm: float | None
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the global batches, and the final weights."""
    torch.manual_seed(42)
    parallel = divided(Transformer(), layout)
    model = parallel.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rank, size = parallel.data
    sampler = DistributedSampler(token_data(), num_replicas=size, rank=rank)
    loader = DataLoader(token_data(), batch_size=GLOBAL_BATCH // size, sampler=sampler)
    losses: list[float] = []
    steps = epoch = 0
    while steps < max_steps:
        sampler.set_epoch(epoch)
        batches = list(loader)
        for start in range(0, len(batches), accumulation):
            if steps == max_steps:
                break
            group = batches[start : start + accumulation]
            for index, (tokens,) in enumerate(group):
                parallel.set_gradient_sync(index == len(group) - 1)
                loss = next_token_loss(model, tokens, *parallel.sequence)
                (loss if len(group) == 1 else loss / len(group)).backward()
                losses.append(mean_over_ranks(loss))
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        epoch += 1
    return losses, weights_of(model)


def mean_over_ranks(loss: Tensor) -> float:
    mean = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean.item()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Unsharded parameters by the names that they have in one process."""
    return {
        name.removeprefix("module."): (value.full_tensor() if isinstance(value, DTensor) else value)
        .detach()
        .clone()
        for name, value in model.named_parameters()
    }
