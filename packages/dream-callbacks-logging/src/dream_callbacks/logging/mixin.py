"""WandBLoggerMixin: a trainer that logs to Weights & Biases by default."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dream_callbacks.logging.sinks.wandb import WandBRun
from dream_trainer.trainer.mixins import LoggerMixin

logger = logging.getLogger(__name__)


class WandBLoggerMixin(LoggerMixin):
    """LoggerMixin whose LoggerCallback opens a WandBSink unless it is given `sinks`.

    `WandbLoggingParameters(enabled=False)` in the config disables this.
    """

    _has_warned = False

    def log_dict(self, values: Mapping[str, float | Tensor], step: int | None = None) -> None:
        if not self.sinks and not self._has_warned and self.world.is_global_zero:
            self._has_warned = True
            logger.warning(
                "%s logs values but has no sink; add a LoggerCallback to its callbacks",
                type(self).__name__,
            )
        super().log_dict(values, step)

    @property
    def wandb_run(self) -> Any:
        """The `wandb.Run` of this `fit`, for features that only W&B has, such as tables.

        None on ranks other than global zero, outside of `fit`, and until the run is open. Its
        methods wait for wandb-core; those of the trainer don't.
        """
        opened = (sink.run for sink in self.sinks if isinstance(sink, WandBRun))
        return next(opened, None)
