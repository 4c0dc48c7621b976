"""Loaders: building them, the length of an epoch, and checks that ranks agree on it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from dream_trainer.configs.training import TrainingParameters
from dream_trainer.interface.trainer import AbstractTrainer
from dream_trainer.trainer.batches import BatchStream, length_of
from dream_trainer.trainer.loader_watch import LoaderWatch
from dream_trainer.world import RankFailure

logger = logging.getLogger(__name__)


class DataLoaderSetupMixin(AbstractTrainer):
    """Builds the loaders once the models are ready."""

    training_parameters: TrainingParameters
    loader_watch: LoaderWatch
    train_batches: BatchStream
    _train_dataloader: Iterable[Any] | None = None
    _val_dataloader: Iterable[Any] | None = None
    _num_train_batches: int | None = None
    _num_val_batches: int | None = None

    # What the user writes

    def configure_dataloaders(self) -> Any:
        """Make the loaders of this rank.

        Each data-parallel rank must read its own part: pass `self.world.dp_rank` and
        `self.world.dp_size` to a DistributedSampler, for example.

        Returns:
            The training loader, or (training loader, validation loader); any iterables.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no configure_dataloaders; write one that returns the "
            "training loader, or (training loader, validation loader)"
        )

    # What the trainer reads

    @property
    def train_dataloader(self) -> Iterable[Any]:
        if self._train_dataloader is None:
            raise RuntimeError("there is no training loader before trainer.setup()")
        return self._train_dataloader

    @property
    def val_dataloader(self) -> Iterable[Any] | None:
        if self._train_dataloader is None:
            raise RuntimeError("there is no validation loader before trainer.setup()")
        return self._val_dataloader

    @property
    def num_train_batches(self) -> int | None:
        return self._num_train_batches

    @property
    def num_val_batches(self) -> int | None:
        return self._num_val_batches

    # Building

    def build_dataloaders(self) -> None:
        """Call `configure_dataloaders` and determine the length of an epoch. Collective.

        Raises:
            ValueError: On all ranks, if a loader is empty, ranks have different numbers of
                batches, the length of an epoch is unknown, a loader isn't iterable, or is a list
                of loaders.
        """
        returned = self.configure_dataloaders()
        train, val = (
            returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
        )
        try:
            self.world.each(lambda: self._check_loaders(train, val))
        except RankFailure as error:
            raise ValueError(str(error)) from error.__cause__
        self.world.agree(
            {
                "the number of batches of the training loader": length_of(train),
                "the number of batches of the validation loader": (
                    "no loader" if val is None else length_of(val)
                ),
            }
        )
        self._train_dataloader, self._val_dataloader = train, val
        self._num_train_batches = self._epoch_length(train)
        self._num_val_batches = None if val is None else self._validation_length(val)
        self.train_batches = BatchStream(train, "training", self.loader_watch)
        self._warn_of_repeated_data(train)

    def _check_loaders(self, train: Any, val: Any) -> None:
        problem = _error_in(train, "training", type(self).__name__)
        if problem is None and val is not None:
            problem = _error_in(val, "validation", type(self).__name__)
        if problem is not None:
            raise ValueError(problem)

    def _epoch_length(self, loader: Iterable[Any]) -> int:
        length = length_of(loader)
        wanted_steps = self.training_parameters.train_steps_per_epoch
        if wanted_steps is None:
            if length is None:
                raise ValueError(
                    f"the training loader ({type(loader).__name__}) has no length, so the end of "
                    "an epoch can't be known; set TrainingParameters(train_steps_per_epoch=…)"
                )
            return length
        wanted = wanted_steps * self.training_parameters.gradient_accumulation_steps
        if length is not None and length < wanted:
            logger.warning(
                "train_steps_per_epoch=%d needs %d batches and the training loader has %d; an "
                "epoch is one pass over it",
                wanted_steps,
                wanted,
                length,
            )
            return length
        return wanted

    def _validation_length(self, loader: Iterable[Any]) -> int | None:
        length, wanted = length_of(loader), self.training_parameters.val_steps_per_epoch
        return min((n for n in (length, wanted) if n is not None), default=None)

    def _warn_of_repeated_data(self, loader: Iterable[Any]) -> None:
        from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

        if (
            self.world.dp_size > 1
            and isinstance(loader, DataLoader)
            and isinstance(loader.sampler, (RandomSampler, SequentialSampler))
        ):
            logger.warning(
                "the training loader's %s doesn't know that there are %d data-parallel ranks, so "
                "each of them reads all of the data; use DistributedSampler(dataset, "
                "num_replicas=self.world.dp_size, rank=self.world.dp_rank)",
                type(loader.sampler).__name__,
                self.world.dp_size,
            )


def _error_in(loader: Any, kind: str, trainer_name: str) -> str | None:
    """The message of the error in a loader, if any."""
    from torch.utils.data import DataLoader

    if loader is None:
        return (
            f"{trainer_name}.configure_dataloaders returned no {kind} loader (None); return an "
            "iterable of batches, or (training loader, validation loader)"
        )
    parts = loader.values() if isinstance(loader, Mapping) else loader
    if isinstance(loader, (list, tuple, Mapping)) and any(isinstance(p, DataLoader) for p in parts):
        return (
            f"the {kind} loader is a {type(loader).__name__} of loaders, and an iterable of "
            "batches is required; return the training loader, or the tuple (training loader, "
            "validation loader)"
        )
    if not isinstance(loader, Iterable):
        return (
            f"the {kind} loader, of type {type(loader).__qualname__}, can't be iterated over; "
            "return an iterable of batches, or (training loader, validation loader)"
        )
    if length_of(loader) == 0:
        return (
            f"the {kind} loader ({type(loader).__name__}) is empty: it has 0 batches, and at "
            "least 1 is required; look at the data set's length, the batch size and drop_last"
        )
    return None
