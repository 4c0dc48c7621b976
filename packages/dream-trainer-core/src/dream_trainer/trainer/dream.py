"""DreamTrainer: the loop with setup, metrics and logging; the usual base class."""

from __future__ import annotations

from dataclasses import dataclass, field

from dream_trainer.configs.logging import LoggingParameters
from dream_trainer.trainer.base import BaseTrainer
from dream_trainer.trainer.config import BaseTrainerConfig
from dream_trainer.trainer.mixins.eval_metric import EvalMetricMixin
from dream_trainer.trainer.mixins.logger import LoggerMixin
from dream_trainer.trainer.mixins.setup import SetupMixin
from dream_trainer.world.world import World


@dataclass(kw_only=True)
class DreamTrainerConfig(BaseTrainerConfig):
    """Everything a run needs except the user's own fields; derive from it to add those.

    Args:
        logging_parameters: Whether LoggerCallback opens an experiment tracker.
    """

    logging_parameters: LoggingParameters = field(default_factory=LoggingParameters)


class DreamTrainer(BaseTrainer, SetupMixin, EvalMetricMixin, LoggerMixin):
    """Derive from it and write `configure_models`, `configure_optimizers`,
    `configure_dataloaders` and `training_step`; `validation_step` and the other `configure_…` and
    `apply_…` methods if wanted.
    """

    config: DreamTrainerConfig

    def __init__(self, config: DreamTrainerConfig, *, world: World | None = None) -> None:
        super().__init__(config, world=world)
