"""Config of experiment trackers."""

from __future__ import annotations

from dataclasses import dataclass

from dream_trainer.configs.checked_fields import CheckedFields


@dataclass(kw_only=True)
class LoggingParameters(CheckedFields):
    """Trackers that LoggerCallback opens if it isn't given sinks.

    Args:
        enabled: If False, `trainer.log_*` work and nothing is sent to a tracker.
    """

    enabled: bool = True


@dataclass(kw_only=True)
class WandbLoggingParameters(LoggingParameters):
    """Log to Weights & Biases too, if enabled; needs dream-callbacks-logging[wandb]."""
