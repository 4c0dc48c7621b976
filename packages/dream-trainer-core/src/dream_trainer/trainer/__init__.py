"""Trainers: abstract (for callbacks), base (the loop), dream (loop, setup, metrics, logging)."""

from dream_trainer.interface.lr_schedule import LRSchedule
from dream_trainer.interface.trainer import AbstractTrainer, AbstractTrainerConfig, Counters
from dream_trainer.trainer.base import BaseTrainer
from dream_trainer.trainer.config import BaseTrainerConfig
from dream_trainer.trainer.dream import DreamTrainer, DreamTrainerConfig
from dream_trainer.trainer.replicas import ReplicaMismatch
from dream_trainer.trainer.results import WeightedMean

__all__ = [
    "AbstractTrainer",
    "AbstractTrainerConfig",
    "BaseTrainer",
    "BaseTrainerConfig",
    "Counters",
    "DreamTrainer",
    "DreamTrainerConfig",
    "LRSchedule",
    "ReplicaMismatch",
    "WeightedMean",
]
