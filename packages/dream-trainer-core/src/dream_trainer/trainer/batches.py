"""BatchStream: iterates over a loader for many epochs, with a position that can be saved."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch

from dream_trainer.trainer.loader_watch import LoaderWatch
from dream_trainer.world.determinism import random_state, random_state_kept, set_random_state
from dream_trainer.world.torch_private import has_running_workers
from dream_trainer.world.worker_signals import protected_workers


@runtime_checkable
class StatefulLoader(Protocol):
    """A loader that keeps its own position, such as torchdata's StatefulDataLoader."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class BatchStream:
    """Iterates over a loader for any number of epochs.

    A loader with a length restarts with each epoch. One without continues where the last epoch
    ended, since otherwise only its first batches would be used, and restarts when it ends.

    Resuming continues with the next batch: a loader with its own position loads it; any other is
    restarted with the random state of its start, and the consumed batches are read again and
    dropped.

    Args:
        loader: Any iterable. `set_epoch` of it, its sampler, batch sampler or data set is called.
        name: Used in errors.
        watch: Warns of long waits.
    """

    def __init__(self, loader: Iterable[Any], name: str, watch: LoaderWatch | None = None) -> None:
        self.loader = loader
        self.name = name
        self._watch = watch or LoaderWatch()
        self._iterator: Iterator[Any] | None = None
        self._position = 0
        self._random_state_at_start: dict[str, Any] | None = None
        self._epoch_at_start = 0
        self._paused: dict[str, Any] | None = None

    def start_epoch(self, epoch: int) -> None:
        """Make the next batch the first of an epoch."""
        if self._paused is not None and length_of(self.loader) is None:
            self.load_state_dict(self._paused)
        elif self._iterator is None or length_of(self.loader) is not None:
            self._begin(epoch)

    def resume_epoch(self, epoch: int, num_done: int) -> None:
        """Make the next batch the one after the first `num_done` of an epoch.

        Uses the loader's position if there is one; otherwise restarts the epoch and drops the
        batches already done.
        """
        if self._paused is not None:
            self.load_state_dict(self._paused)
        if self._iterator is None:
            self._begin(epoch)
            for _ in range(num_done):
                self.next_batch()

    def next_batch(self) -> Any:
        """The next batch of this rank.

        Raises:
            RuntimeError: If there is none.
        """
        assert self._iterator is not None, "start_epoch comes first"
        self._watch.waits_for = (self.name, self._position)
        try:
            batch = next(self._iterator)
        except StopIteration:
            batch = self._next_of_new_pass()
        except BaseException as error:
            explain_error(error, self.loader, self.name, self._position, self._epoch_at_start)
            raise
        finally:
            self._watch.waits_for = None
        self._position += 1
        return batch

    def finish_epoch(self) -> None:
        """Release the loader's workers if the next epoch restarts the loader."""
        if length_of(self.loader) is not None:
            self._iterator = None

    def pause(self) -> None:
        """Release the loader's workers mid-epoch; `resume_epoch` continues from here.

        Otherwise worker processes would live until the trainer is garbage collected, and then take
        seconds to exit.
        """
        if self._iterator is not None and getattr(self.loader, "num_workers", 0) > 0:
            self._paused = self.state_dict()
            self._iterator = None

    @contextmanager
    def generators_kept(self) -> Iterator[None]:
        """Restore generators of the loader and its samplers, which another loader may share."""
        outer = (self.loader, getattr(self.loader, "batch_sampler", None))
        owners = (*outer, *(getattr(owner, "sampler", None) for owner in outer))
        generators = [getattr(owner, "generator", None) for owner in owners]
        kept = [
            (each, each.get_state()) for each in generators if isinstance(each, torch.Generator)
        ]
        try:
            yield
        finally:
            for generator, state in kept:
                generator.set_state(state)

    def state_dict(self) -> dict[str, Any]:
        """Position on this rank, as plain data."""
        if self._paused is not None:
            return self._paused
        if self._iterator is None:
            return {}
        position = {"position": self._position, "epoch": self._epoch_at_start}
        if isinstance(self.loader, StatefulLoader):
            return {**position, "loader": self.loader.state_dict()}
        return {**position, "random_state": self._random_state_at_start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a position, with the batch after it."""
        self._iterator = self._paused = None
        if not state_dict:
            return
        if isinstance(self.loader, StatefulLoader) and "loader" in state_dict:
            self._set_epoch(state_dict["epoch"])
            self.loader.load_state_dict(state_dict["loader"])
            with protected_workers(self.loader):
                self._iterator = iter(self.loader)
        else:
            now = random_state()
            set_random_state(state_dict["random_state"])
            self._begin(state_dict["epoch"])
            for _ in range(state_dict["position"]):
                self.next_batch()
            set_random_state(now)
        self._position = state_dict["position"]

    def _begin(self, epoch: int) -> None:
        self._paused = None
        self._set_epoch(epoch)
        self._random_state_at_start = random_state()
        self._iterator = start_iterator(self.loader)
        self._position = 0

    def _set_epoch(self, epoch: int) -> None:
        self._epoch_at_start = epoch
        for owner in (self.loader, *(getattr(self.loader, name, None) for name in _EPOCH_OWNERS)):
            set_epoch = getattr(owner, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)

    def _next_of_new_pass(self) -> Any:
        length = length_of(self.loader)
        if length is not None:
            raise RuntimeError(ended_early(self.name, length, self._position))
        ended_after = self._position
        self._begin(self._epoch_at_start + 1)
        try:
            return next(self._iterator)  # type: ignore[arg-type]  # _begin made one
        except StopIteration:
            raise RuntimeError(
                f"the {self.name} loader ended after {ended_after} batches and gives none when it "
                "is restarted; return an iterable that can be iterated repeatedly, or train for "
                "fewer steps"
            ) from None


def start_iterator(loader: Iterable[Any]) -> Iterator[Any]:
    """An iterator over a loader, which draws the same random numbers the first time as later.

    With `persistent_workers` the first one draws another random number, the workers' seed, so a
    resumed run would differ from one that wasn't interrupted.
    """
    with protected_workers(loader):
        if getattr(loader, "persistent_workers", False) and not has_running_workers(loader):
            with random_state_kept():
                iter(loader)
        return iter(loader)


_WORKER_DIED = "DataLoader worker (pid"


def explain_error(
    error: BaseException,
    loader: Iterable[Any],
    name: str,
    position: int,
    epoch: int | None = None,
) -> None:
    """Add a note to a loader's error; raise the death of its worker instead, if that caused it."""
    num_workers = getattr(loader, "num_workers", None) or 0
    cause = _what_killed_a_worker(error) if num_workers > 0 else error
    of_epoch = "" if epoch is None else f" of epoch {epoch}"
    note = f"raised in the {name} loader, at batch {position}{of_epoch}"
    if str(cause).startswith(_WORKER_DIED):  # it died, so the error has no traceback of it
        num_ahead = num_workers * getattr(loader, "prefetch_factor", 0)
        last = min(position + num_ahead, length_of(loader) or sys.maxsize) - 1
        note += f"; its workers were making the batches up to {last}"
    cause.add_note(note)
    if cause is not error:
        raise cause from error


def _what_killed_a_worker(error: BaseException) -> BaseException:
    """The death of a worker that caused a connection error, or the error itself.

    If a worker dies while it sends a batch, the connection breaks first. torch raises the cause
    from its SIGCHLD handler a moment later, wherever the main thread is: so wait for it here.
    """
    if isinstance(error, (ConnectionError, EOFError)):
        try:
            for _ in range(100):
                time.sleep(0.01)
        except RuntimeError as cause:
            if not str(cause).startswith(_WORKER_DIED):
                raise
            return cause
    return error


def ended_early(name: str, length: int, position: int) -> str:
    """The message for a loader that has ended before its length."""
    return (
        f"the {name} loader has length {length} and ended after {position} batches; its "
        "__len__ and its __iter__ must agree"
    )


_EPOCH_OWNERS = ("sampler", "batch_sampler", "dataset")


def length_of(loader: Iterable[Any]) -> int | None:
    """Number of batches; None for a loader without length."""
    if not isinstance(loader, Sized):
        return None
    try:
        return len(loader)
    except TypeError:  # a DataLoader over an iterable data set has __len__, and it raises
        return None
