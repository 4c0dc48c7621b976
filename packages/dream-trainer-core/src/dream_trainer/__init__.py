"""Dream Trainer: a training loop for PyTorch that callbacks extend and never touch."""

from __future__ import annotations

# trainer first: callbacks are typed by the abstract trainer, and the trainer holds callbacks.
from dream_trainer.trainer import DreamTrainer, DreamTrainerConfig  # isort: skip
from dream_trainer import callbacks

__all__ = ["DreamTrainer", "DreamTrainerConfig", "callbacks"]
