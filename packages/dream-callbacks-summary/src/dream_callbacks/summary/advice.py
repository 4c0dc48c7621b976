"""Advice on settings that cost nothing to change and make training faster or more exact."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from dream_trainer.trainer import BaseTrainer

_LOW_PRECISION = (torch.bfloat16, torch.float16)


def advice(trainer: BaseTrainer) -> list[str]:
    """A line of text for each setting of a trainer that is set up. Not collective."""
    return [*_on_loaders(trainer), *_on_matrix_products(trainer), *_on_reduction(trainer)]


def _on_loaders(trainer: BaseTrainer) -> Iterator[str]:
    loaders = {"training": trainer.train_dataloader, "validation": trainer.val_dataloader}
    pageable = [
        name
        for name, loader in loaders.items()
        if isinstance(loader, DataLoader) and not loader.pin_memory
    ]
    if pageable and trainer.world.device.type == "cuda":
        yield (
            f"{' and '.join(pageable)} data: DataLoader(pin_memory=True) copies batches to the GPU "
            "while it computes"
        )


def _on_matrix_products(trainer: BaseTrainer) -> Iterator[str]:
    device = trainer.world.device
    parameters = trainer.config.device_parameters
    computes_in = parameters.computes_in or parameters.param_dtype
    if device.type != "cuda" or computes_in in _LOW_PRECISION:
        return
    models = trainer.named_models().values()
    is_float32 = any(p.dtype is torch.float32 for model in models for p in model.parameters())
    # What torch.set_float32_matmul_precision sets, whose own getter raises if this one was set.
    uses_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if is_float32 and not uses_tf32 and torch.cuda.get_device_capability(device) >= (8, 0):
        yield (
            'float32: torch.set_float32_matmul_precision("high") computes matrix products on '
            "tensor cores (TF32), several times as fast, with 10 bits of mantissa"
        )


def _on_reduction(trainer: BaseTrainer) -> Iterator[str]:
    parameters = trainer.config.device_parameters
    reduces_in_low_precision = parameters.param_dtype in _LOW_PRECISION
    if trainer.world.shape.uses_fsdp and reduces_in_low_precision and not parameters.reduce_dtype:
        dtype = str(parameters.param_dtype).removeprefix("torch.")
        yield (
            f"gradients are reduced in {dtype}: reduce_dtype=torch.float32 sums them without "
            "rounding each one, for twice the traffic"
        )
