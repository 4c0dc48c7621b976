"""Loaders: making and checking them, and the length of an epoch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sized
from typing import Any

from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from dream_trainer.configs.training import TrainingParameters
from dream_trainer.interface.trainer import AbstractTrainer
from dream_trainer.trainer.batches import BatchStream, length_of
from dream_trainer.trainer.evaluation_sets import (
    EvaluationSet,
    empty_text,
    evaluation_sets,
    problem_of,
    refuse_problems,
)
from dream_trainer.trainer.loader_watch import LoaderWatch
from dream_trainer.trainer.rank_sampler import RankSampler

logger = logging.getLogger(__name__)


class DataLoaderSetupMixin(AbstractTrainer):
    """Builds the loaders once the models are ready."""

    training_parameters: TrainingParameters
    loader_watch: LoaderWatch
    train_batches: BatchStream
    seed: int | None
    validation_sets: tuple[EvaluationSet, ...]
    _train_dataloader: Iterable[Any] | None = None
    _val_dataloader: Iterable[Any] | None = None
    _num_train_batches: int | None = None

    # What the user writes

    def configure_dataloaders(self) -> Any:
        """Make the loaders of this rank, with `self.loader` for example.

        Each data-parallel rank must read its own part of the data: part `self.world.dp_rank` of
        `self.world.dp_size`.

        Returns:
            The training loader, or (training loader, validation loader); any iterables. Several
            validation loaders are a dict by name: `{"clean": …, "noisy": …}`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no configure_dataloaders; write one that returns the "
            "training loader, or (training loader, validation loader)"
        )

    # What the user calls

    def loader(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool | None = None,
        **options: Any,
    ) -> DataLoader[Any]:
        """A DataLoader of this rank's part of a data set, for training or evaluation.

        The batches of all data-parallel ranks together are the same on any number of ranks. Each
        sample is read once per epoch, on one rank; with `shuffle` in an order that depends on the
        trainer's seed and the epoch, which a resumed run continues.

        Args:
            dataset: A data set with `__getitem__` and `__len__`.
            batch_size: Samples per batch over all data-parallel ranks; a multiple of `dp_size`.
            shuffle: Shuffle anew in each epoch.
            drop_last: Drop the incomplete batch at the end of an epoch. Default: as `shuffle`, so
                that training has batches of one size and evaluation all samples.
            **options: Of DataLoader, such as `num_workers`.

        Raises:
            ValueError: If `batch_size` isn't a multiple of the number of data-parallel ranks.
            TypeError: If the data set has no length, or a sampler is given.
        """
        _refuse_for_loader(dataset, options)
        num_ranks = self.world.dp_size
        if batch_size < 1 or batch_size % num_ranks:
            raise ValueError(
                f"batch_size={batch_size} over all ranks can't be divided among {num_ranks} "
                f"data-parallel ranks; use a multiple of {num_ranks}"
            )
        if shuffle and self.seed is None:
            raise RuntimeError("loader(shuffle=True) needs the seed, which configure() sets")
        sampler = RankSampler(
            len(dataset),  # type: ignore[arg-type]  # it has a length
            batch_size,
            rank=self.world.dp_rank,
            num_ranks=num_ranks,
            shuffle=shuffle,
            seed=self.seed or 0,
            drop_last=shuffle if drop_last is None else drop_last,
        )
        return DataLoader(dataset, batch_size // num_ranks, sampler=sampler, **options)

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

    # Building

    def build_dataloaders(self) -> None:
        """Call `configure_dataloaders` and determine the length of an epoch. Collective.

        Raises:
            ValueError: On all ranks, if a loader is empty, ranks have different numbers of
                training batches, the length of an epoch is unknown, or a loader isn't iterable.
        """
        returned = self.configure_dataloaders()
        train, val = (
            returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
        )
        refuse_problems([self._problem_of_training(train)], self.world)
        self.world.agree(
            {
                "the number of batches of the training loader": length_of(train),
                "whether there is a validation loader": val is not None,
            }
        )
        self._train_dataloader, self._val_dataloader = train, val
        self._num_train_batches = self._epoch_length(train)
        if val is not None:
            self.validation_sets = evaluation_sets(val, "validation", self.world)
        self.train_batches = BatchStream(train, "training", self.loader_watch)
        self._warn_of_repeated_data(train)

    def _problem_of_training(self, loader: Any) -> str | None:
        if loader is None:
            return (
                f"{type(self).__name__}.configure_dataloaders returned no training loader (None); "
                "return an iterable of batches, or (training loader, validation loader)"
            )
        problem = problem_of(loader, "training")
        if problem is None and length_of(loader) == 0:
            return empty_text(loader, "training")
        sampler = getattr(loader, "sampler", None)
        if problem is None and isinstance(sampler, RankSampler) and sampler.leaves_ranks_out:
            return (
                f"the incomplete batch at the end of an epoch, of "
                f"{sampler.num_samples % sampler.batch_size} samples, has none for some of the "
                f"{sampler.num_ranks} ranks, which then can't train together; use "
                "self.loader(…, drop_last=True)"
            )
        return problem

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

    def _warn_of_repeated_data(self, loader: Iterable[Any]) -> None:
        if (
            self.world.dp_size > 1
            and isinstance(loader, DataLoader)
            and isinstance(loader.sampler, (RandomSampler, SequentialSampler))
        ):
            logger.warning(
                "the training loader's %s doesn't know that there are %d data-parallel ranks, so "
                "each of them reads all of the data; use self.loader(dataset, batch_size=…, "
                "shuffle=…), or a DistributedSampler with num_replicas=self.world.dp_size and "
                "rank=self.world.dp_rank",
                type(loader.sampler).__name__,
                self.world.dp_size,
            )


def _refuse_for_loader(dataset: Any, options: Mapping[str, Any]) -> None:
    for name in ("sampler", "batch_sampler"):
        if options.get(name) is not None:
            raise TypeError(
                f"loader({name}=…): it makes the sampler itself; for one of your own, use "
                "torch's DataLoader and give it this rank's part: world.dp_rank of world.dp_size"
            )
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        raise TypeError(
            f"loader() can't divide a {type(dataset).__name__}, which has no index or no length; "
            "use torch's DataLoader over a data set that yields this rank's part, such as "
            "itertools.islice(samples, world.dp_rank, None, world.dp_size)"
        )
