"""One task, one global batch: every layout gives the losses and weights of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from toy import GLOBAL_BATCH, Transformer, make, next_token_loss, token_data

from dream_trainer.testing import run_on_ranks
from tools.matrix import Cell

# Sums of float32 over parts of a batch, in another order: the last bits differ and grow with Adam.
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-4

TRAINING: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3},
    "clipping": {"gradient_clip_val": 0.1},
}


def trained(layout: str, root: str, training: dict[str, Any]) -> tuple[list[float], Any]:
    trainer, losses = make(root, layout, n_epochs=3, max_steps=20, **training)
    trainer.fit()
    return losses.losses, weights_of(trainer.model)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in model.named_parameters()
    }


@pytest.mark.parametrize("training", TRAINING.values(), ids=TRAINING)
def test_losses_and_weights_are_those_of_one_process(
    tmp_path: Path, cell: Cell, training: dict[str, Any]
) -> None:
    if cell.backend == "nccl" and torch.cuda.device_count() < cell.ranks:
        pytest.skip(f"{cell.ranks} GPUs are required, and {torch.cuda.device_count()} are here")
    root = str(tmp_path)
    ((losses, weights),) = run_on_ranks(trained, 1, "single", root, training)
    outcomes = run_on_ranks(trained, cell.ranks, cell.layout, root, training)

    assert len(losses) >= 20
    for found_losses, found_weights in outcomes:
        assert found_losses == pytest.approx(losses, abs=LOSS_TOLERANCE)
        for name, expected in weights.items():
            torch.testing.assert_close(
                found_weights[name], expected, atol=WEIGHT_TOLERANCE, rtol=WEIGHT_TOLERANCE
            )


def plain_losses(layout: str, accumulation: int) -> list[float]:
    """The same training in plain PyTorch."""
    import torch.distributed as dist

    torch.manual_seed(42)
    rank, size = 0, 1
    model: nn.Module = Transformer()
    if layout != "single":
        dist.init_process_group("gloo")
        rank, size = dist.get_rank(), dist.get_world_size()
        if layout == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.fsdp import fully_shard

            for block in model.blocks:  # type: ignore[union-attr]  # a ModuleList
                fully_shard(block)
            fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sampler = DistributedSampler(token_data(), num_replicas=size, rank=rank)
    loader = DataLoader(token_data(), batch_size=GLOBAL_BATCH // size, sampler=sampler)
    losses = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(loader)
        for start in range(0, len(batches), accumulation):
            group = batches[start : start + accumulation]
            for index, (tokens,) in enumerate(group):
                sync = index == len(group) - 1
                if layout == "ddp":
                    model.require_backward_grad_sync = sync  # type: ignore[assignment]
                elif layout == "fsdp":
                    model.set_requires_gradient_sync(sync)  # type: ignore[operator]
                loss = next_token_loss(model, tokens)
                (loss if len(group) == 1 else loss / len(group)).backward()
                mean = loss.detach().clone()
                if size > 1:
                    dist.all_reduce(mean)
                    mean /= size
                losses.append(mean.item())
            optimizer.step()
            optimizer.zero_grad()
    return losses


def our_losses(layout: str, root: str, accumulation: int) -> list[float]:
    trainer, losses = make(
        root, layout, n_epochs=2, val_steps_per_epoch=0, gradient_accumulation_steps=accumulation
    )
    trainer.fit()
    return losses.losses


@pytest.mark.parametrize("accumulation", [1, 3], ids=["plain", "accumulation"])
@pytest.mark.parametrize(
    ("layout", "num_ranks"),
    [("single", 1), ("ddp", 2), ("fsdp", 2)],
    ids=["w1-single", "w2-ddp", "w2-fsdp"],
)
def test_losses_are_bit_for_bit_those_of_plain_pytorch_in_the_same_layout(
    tmp_path: Path, layout: str, num_ranks: int, accumulation: int
) -> None:
    expected = run_on_ranks(plain_losses, num_ranks, layout, accumulation)
    found = run_on_ranks(our_losses, num_ranks, layout, str(tmp_path), accumulation)

    assert found == expected
    assert len(found[0]) == 16
