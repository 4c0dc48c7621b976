"""Trainers: abstract (for callbacks), base (the loop), dream (loop, setup, metrics, logging)."""

from dream_trainer.interface.trainer import AbstractTrainer, AbstractTrainerConfig
from dream_trainer.trainer.base import BaseTrainer, BaseTrainerConfig
from dream_trainer.trainer.dream import DreamTrainer, DreamTrainerConfig
from dream_trainer.trainer.results import WeightedMean

__all__ = [
    "AbstractTrainer",
    "AbstractTrainerConfig",
    "BaseTrainer",
    "BaseTrainerConfig",
    "DreamTrainer",
    "DreamTrainerConfig",
    "WeightedMean",
]
