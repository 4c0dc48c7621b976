"""Whether a run logs to an experiment tracker."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class LoggingParameters:
    """What LoggerCallback may open when it isn't given sinks of its own.

    Args:
        enabled: False keeps `trainer.log_*` working and sends nothing to a tracker.
    """

    enabled: bool = True


@dataclass(kw_only=True)
class WandbLoggingParameters(LoggingParameters):
    """Log to Weights & Biases as well, if enabled; needs dream-callbacks-logging[wandb]."""
