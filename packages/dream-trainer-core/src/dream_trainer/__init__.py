"""Dream Trainer: a PyTorch training loop; extend it with callbacks instead of editing it."""

from __future__ import annotations

# trainer first: callbacks are typed by the abstract trainer, which has a callback collection.
from dream_trainer.trainer import DreamTrainer, DreamTrainerConfig, WeightedMean  # isort: skip
from dream_trainer import callbacks

__all__ = ["DreamTrainer", "DreamTrainerConfig", "WeightedMean", "callbacks"]
