"""WandBLoggerMixin: a trainer whose run is one of Weights & Biases."""

from __future__ import annotations

from typing import Any

from dream_callbacks.logging.sinks.wandb import WandBRun
from dream_trainer.trainer.mixins import LoggerMixin


class WandBLoggerMixin(LoggerMixin):
    """LoggerMixin whose LoggerCallback opens a WandBSink, if it isn't given sinks of its own.

    `WandbLoggingParameters(enabled=False)` in the config keeps it from doing so.
    """

    @property
    def wandb_run(self) -> Any:
        """The `wandb.Run` of this fit, for what only W&B has, such as tables.

        None on ranks other than global zero, outside of `fit`, and while there is none. Its
        methods wait for wandb-core; those of the trainer don't.
        """
        opened = (sink.run for sink in self.sinks if isinstance(sink, WandBRun))
        return next(opened, None)
