"""Terminal output of a run: progress bar, trainer summary and model summary."""

from dream_callbacks.summary.model_summary import ModelSummary
from dream_callbacks.summary.progress import ProgressBar
from dream_callbacks.summary.trainer_summary import TrainerSummary

__all__ = ["ModelSummary", "ProgressBar", "TrainerSummary"]
