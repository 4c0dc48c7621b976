"""Evaluation sets: loaders that all ranks read together, each its own number of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DistributedSampler, IterableDataset

from dream_trainer.trainer.batches import ended_early, explain_error, length_of, start_iterator
from dream_trainer.trainer.loader_watch import LoaderWatch
from dream_trainer.world import cpu_collectives
from dream_trainer.world.rank_mismatch import grouped
from dream_trainer.world.world import World

NO_BATCH: Any = object()
"""In place of a batch, on a rank that has none left."""


@dataclass(frozen=True)
class EvaluationSet:
    """A loader of this rank, and what is known of those of the other ranks.

    Attributes:
        name: Name of the set; empty if it has none, being the only one.
        kind: "validation", "test" or "predict", for messages.
        loader: The loader of this rank.
        lengths: Number of batches by rank; None if a rank's loader has no length.
        parts: Part of the data that each rank reads (its `dp_rank`), by rank.
    """

    name: str
    kind: str
    loader: Iterable[Any]
    lengths: tuple[int, ...] | None
    parts: tuple[int, ...]

    @property
    def title(self) -> str:
        """Name in messages, such as "validation" or "validation 'noisy'"."""
        return f"{self.kind} {self.name!r}" if self.name else self.kind

    @property
    def may_be_uneven(self) -> bool:
        """Whether a rank may have fewer batches than another."""
        return len(self.parts) > 1 and (self.lengths is None or len(set(self.lengths)) > 1)

    def num_batches(self, rank: int, limit: int | None) -> int | None:
        """Number of batches of a rank, at most `limit`; None if neither is known."""
        return limit if self.lengths is None else _limited(self.lengths[rank], limit)


def evaluation_sets(given: Any, kind: str, world: World) -> tuple[EvaluationSet, ...]:
    """The sets that a user gave: one loader, or several in a dict by name. Collective.

    Args:
        given: An iterable of batches, or a dict of them.
        kind: "validation", "test" or "predict", for messages.
        world: The ranks that read them.

    Raises:
        ValueError: On all ranks, if one is no iterable of batches, all ranks' loaders of a set are
            empty, ranks have different sets, or ranks that read the same data have different
            numbers of batches.
    """
    loaders = dict(given) if isinstance(given, Mapping) else {"": given}
    world.agree(list(loaders), f"the names of the {kind} loaders")
    if not loaders:
        raise ValueError(f"there are no {kind} loaders in the dict; at least 1 is required")
    refuse_problems([_problem_of_set(each, name, kind) for name, each in loaders.items()], world)
    parts, lengths = zip(
        *world.all_gather((world.dp_rank, [_exact_length(each) for each in loaders.values()])),
        strict=True,
    )
    sets = tuple(
        EvaluationSet(name, kind, loader, None if None in column else column, parts)
        for (name, loader), column in zip(loaders.items(), zip(*lengths, strict=True), strict=True)
    )
    for each in sets:
        _refuse_lengths(each)
    return sets


def refuse_problems(problems: Sequence[str | None], world: World) -> None:
    """Raise the first problem that a rank found, on all ranks. Collective.

    Raises:
        ValueError: If there is one.
    """
    mine = next((problem for problem in problems if problem is not None), None)
    by_rank = world.all_gather((mine,)) if world.is_distributed else [(mine,)]
    found = {rank: problem for rank, (problem,) in enumerate(by_rank) if problem is not None}
    if found:
        rank, text = next(iter(found.items()))
        raise ValueError(f"rank {rank}: {text}" if world.is_distributed else text)


def problem_of(loader: Any, title: str) -> str | None:
    """Why an object is no loader, if it isn't one.

    Args:
        loader: What the user gave.
        title: Name in the message, such as "training".
    """
    from torch.utils.data import DataLoader

    parts = loader.values() if isinstance(loader, Mapping) else loader
    if isinstance(loader, (list, tuple, Mapping)) and any(isinstance(p, DataLoader) for p in parts):
        return (
            f"the {title} loader is a {type(loader).__name__} of loaders, and an iterable of "
            "batches is required; return the training loader, or the tuple (training loader, "
            'validation loader). Several validation loaders have names: {"clean": …, "noisy": …}'
        )
    if not isinstance(loader, Iterable):
        return (
            f"the {title} loader, of type {type(loader).__qualname__}, can't be iterated over; "
            "return an iterable of batches, or (training loader, validation loader)"
        )
    return None


def empty_text(loader: Any, title: str) -> str:
    """The message for a loader without batches."""
    return (
        f"the {title} loader ({type(loader).__name__}) is empty: it has 0 batches, and at "
        "least 1 is required; look at the data set's length, the batch size and drop_last"
    )


def _problem_of_set(loader: Any, name: Any, kind: str) -> str | None:
    if not isinstance(name, str):
        return f"a {kind} loader has the name {name!r}; names are strings"
    return problem_of(loader, f"{kind} {name!r}" if name else kind)


def _refuse_lengths(each: EvaluationSet) -> None:
    lengths = each.lengths
    if lengths is None:
        return
    if not any(lengths):
        raise ValueError(empty_text(each.loader, each.title))
    if len(set(zip(each.parts, lengths, strict=True))) > len(set(each.parts)):
        by_rank = [
            f"{n} batches of part {part}" for part, n in zip(each.parts, lengths, strict=True)
        ]
        raise ValueError(
            f"ranks that read the same part of the {each.title} data have different numbers of "
            f"batches ({grouped(by_rank)}); each part (world.dp_rank) must be the same on all of "
            "its ranks"
        )


def _limited(length: int, limit: int | None) -> int:
    return length if limit is None else min(length, limit)


# Samplers that pad


@contextmanager
def without_padding(loader: Any) -> Iterator[None]:
    """Inside, a loader's DistributedSampler gives each sample of its data set to one rank, once.

    It repeats samples until all ranks have the same number, which is right for training only. Of a
    subclass with an `__iter__` or `__len__` of its own, nothing is known or changed.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader, "sampler", None) if batch_sampler is None else batch_sampler
    while sampler is not None and not isinstance(sampler, DistributedSampler):
        sampler = getattr(sampler, "sampler", None)
    if sampler is None or not _pads(sampler):
        yield
        return
    before = sampler.num_samples, sampler.total_size
    total = len(sampler.dataset)  # type: ignore[arg-type]  # the sampler asks too
    sampler.total_size = total
    sampler.num_samples = len(range(sampler.rank, total, sampler.num_replicas))
    try:
        yield
    finally:
        sampler.num_samples, sampler.total_size = before


def _pads(sampler: DistributedSampler[Any]) -> bool:
    return (
        not sampler.drop_last
        and type(sampler).__iter__ is DistributedSampler.__iter__
        and type(sampler).__len__ is DistributedSampler.__len__
    )


def _exact_length(loader: Iterable[Any]) -> int | None:
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None  # a DataLoader's is an estimate: its workers may have incomplete batches each
    with without_padding(loader):
        return length_of(loader)


# Reading together


@dataclass(frozen=True, slots=True)
class Round:
    """The batches that the ranks evaluate at the same time.

    Attributes:
        batch: Of this rank; NO_BATCH if it has none left.
        source: Lowest rank that has a batch.
        is_full: Whether every rank has one.
    """

    batch: Any
    source: int
    is_full: bool


def rounds(
    each: EvaluationSet, limit: int | None, world: World, watch: LoaderWatch
) -> Iterator[Round]:
    """The batches of a set, until the last rank has none left. Collective.

    Lengths were exchanged when the set was made. Without them, ranks exchange before each batch
    whether they have one.

    Args:
        each: The set; inside `without_padding` of its loader.
        limit: Largest number of batches of each rank; None for no limit.
        world: The ranks that read it.
        watch: Warns of long waits.

    Raises:
        RuntimeError: If the loader ends before its length; or, without lengths, on all ranks, if
            ranks that read the same part of the data don't end together.
    """
    iterator = start_iterator(each.loader)

    def next_batch(position: int) -> Any:
        watch.waits_for = (each.title, position)
        try:
            return next(iterator, NO_BATCH)
        except BaseException as error:
            explain_error(error, each.loader, each.title, position)
            raise
        finally:
            watch.waits_for = None

    if each.lengths is None:
        yield from _rounds_of_unknown_length(each, limit, world, next_batch)
        return
    # Alone, the length may have changed: nobody else has to know.
    lengths = each.lengths if world.is_distributed else (length_of(each.loader) or 0,)
    ends = [_limited(length, limit) for length in lengths]
    for position in range(max(ends)):
        batch = next_batch(position) if position < ends[world.rank] else NO_BATCH
        if batch is NO_BATCH and position < ends[world.rank]:
            raise RuntimeError(ended_early(each.title, lengths[world.rank], position))
        source = next(rank for rank, end in enumerate(ends) if position < end)
        yield Round(batch, source, is_full=position < min(ends))


def _rounds_of_unknown_length(
    each: EvaluationSet, limit: int | None, world: World, next_batch: Any
) -> Iterator[Round]:
    position, batch = 0, None
    while limit is None or position < limit:
        batch = NO_BATCH if batch is NO_BATCH else next_batch(position)
        have = cpu_collectives.gathered_ints(batch is not NO_BATCH, world.group())
        if not any(have):
            return
        if len(set(zip(each.parts, have, strict=True))) > len(set(each.parts)):
            ended = ", ".join(str(rank) for rank, has in enumerate(have) if not has)
            raise RuntimeError(
                f"the loader ended after {position} batches on rank {ended}, and others that read "
                f"the same part of the {each.title} data have more; each part (world.dp_rank) must "
                "be the same on all of its ranks"
            )
        yield Round(batch, have.index(1), is_full=all(have))
        position += 1
