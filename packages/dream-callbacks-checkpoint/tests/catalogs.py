"""Manifests and checkpoints of a catalog, without files."""

from __future__ import annotations

import math
from typing import Any

from dream_callbacks.checkpoint.catalog import Checkpoint
from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.format.manifest import FileSum, Manifest


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "step": 200,
        "epoch": 1,
        "seq": 7,
        "run": "ab" * 16,
        "fence": 2,
        "created_unix": 1e9,
        "reason": "epoch",
        "world_size": 2,
        "shape": {"dp_shard": 2, "tp": 1},
        "dp_ranks": (0, 1),
        "num_train_batches": None,
        "metrics": {"val_loss": 0.5, "worst": -math.inf},
        "has_nan": False,
        "torch_version": "2.13.0",
        "files": {"state.json": FileSum(10, 20), "__0_0.distcp": FileSum(30, 40)},
        "monitor": "val_loss",
        "mode": "min",
        "keeps_best": True,
    }
    return Manifest(**{**fields, **changes})


def checkpoint(step: int, value: float | None = None, **fields: Any) -> Checkpoint:
    metrics = {} if value is None else {"val_loss": value}
    fields = {"seq": step, "metrics": metrics, **fields}
    return Checkpoint(file_names.checkpoint_name(step), manifest(step=step, **fields))


def steps(*values: int) -> list[Checkpoint]:
    return [checkpoint(step) for step in values]
