"""What a run shows in the terminal: a progress bar, what is trained, and the models."""

from dream_callbacks.summary.model_summary import ModelSummary
from dream_callbacks.summary.progress import ProgressBar
from dream_callbacks.summary.trainer_summary import TrainerSummary

__all__ = ["ModelSummary", "ProgressBar", "TrainerSummary"]
