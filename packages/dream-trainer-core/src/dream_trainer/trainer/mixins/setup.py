"""SetupMixin: sets up models, then loaders, then optimizers."""

from __future__ import annotations

from dream_trainer.trainer.mixins.dataloaders import DataLoaderSetupMixin
from dream_trainer.trainer.mixins.models import ModelSetupMixin
from dream_trainer.trainer.mixins.optimizers import OptimizerSetupMixin


class SetupMixin(ModelSetupMixin, OptimizerSetupMixin, DataLoaderSetupMixin):
    """Models, loaders, optimizers and schedulers."""

    def build_training(self) -> None:
        """Prepare the models; build loaders, optimizers and schedulers. Collective."""
        self.prepare_models()
        self.build_dataloaders()  # first: a scheduler may need the length of an epoch
        self.build_optimizers()
