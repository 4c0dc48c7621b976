"""The checks of conformance.py: one function per rule, which is its docstring."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import logging
import math
import os
import pickle
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dream_trainer.callbacks.callback import HOOKS, Callback, RankZeroCallback
from dream_trainer.callbacks.collection import CallbackCollection
from dream_trainer.callbacks.plain_data import RankLocal, without_rank_local
from dream_trainer.testing.leftovers import (
    Leftovers,
    patches_of,
    quick_collections,
    random_numbers,
    unclosed_resources,
)
from dream_trainer.testing.processes import run_on_ranks
from dream_trainer.testing.trainers import TinyTrainer, tiny_config

Make = Callable[[], Callback[Any]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The callback to check.

    Args:
        make: Returns a new instance on each call.
        folder: Working directory of the checks; runs write below it.
        trainer_class: A trainer that meets the callback's requirements.
        changes_training: Whether it may change the trained weights or draw random numbers.
    """

    make: Make
    folder: Path
    trainer_class: type[TinyTrainer] = TinyTrainer
    changes_training: bool = False
    _run_numbers: Iterator[int] = field(default_factory=itertools.count)

    def trainer(
        self, *callbacks: Callback[Any], debug: bool = False, **training: Any
    ) -> TinyTrainer:
        """A trainer with a new run directory, for 2 epochs of 2 steps of 2 batches."""
        root = self.folder / f"run_{next(self._run_numbers)}"  # the same on all ranks
        lengths = {"n_epochs": 2, "gradient_accumulation_steps": 2, "num_sanity_val_steps": 1}
        config = tiny_config(root, callbacks, **{**lengths, **training})
        config.num_samples, config.debug = 16, debug
        return self.trainer_class(config)


def constructs(subject: Subject) -> None:
    """Constructing it has no side effects."""
    numbers, leftovers = random_numbers(), Leftovers()
    first, second = subject.make(), subject.make()
    for callback in (first, second):
        _require(isinstance(callback, Callback), f"make() returned {callback!r}.")
    _require(first is not second, "make() returned the same object twice.")
    _require_none([path.name for path in subject.folder.iterdir()], "It wrote {}.")
    _require_none(leftovers.found(), "It left {}.")
    _require(numbers == random_numbers() or subject.changes_training, "It drew random numbers.")


def plans(subject: Subject) -> None:
    """It can be attached, twice and with others, and does something."""
    collection = CallbackCollection([subject.make(), subject.make(), _NoOp()])
    trainer = subject.trainer(*collection)
    hooks = trainer.callbacks.plan().hooks
    does_something = {name for names in hooks.values() for name in names}
    does_something |= trainer.callbacks.state_dict().keys()
    idle = [name for name in trainer.callbacks.keys() if name not in does_something]  # noqa: SIM118  # iterating gives callbacks
    _require_none(idle, "{} overrides no hook and has no state.")


def trains(subject: Subject) -> None:
    """A run with it equals a run without it, unless it `changes_training`."""
    plain = subject.trainer(_NoOp())
    plain.fit()
    numbers = random_numbers()
    trainer = subject.trainer(_NoOp(), subject.make(), _NoOp())
    trainer.fit()
    _require(trainer.global_step == plain.global_step, f"It ended at step {trainer.global_step}.")
    if not subject.changes_training:
        same = _equal(trainer.model_state_dict(), plain.model_state_dict())
        _require(same, "The weights differ from those of a run without it.")
        _require(numbers == random_numbers(), "It drew random numbers.")


def trains_twice(subject: Subject) -> None:
    """fit() can be called again, and the callback can be used in a second trainer."""
    callback = subject.make()
    trainer = subject.trainer(callback)
    trainer.fit()
    trainer.training_parameters.n_epochs = 3
    trainer.fit()
    _require(trainer.global_step == 6, f"The second fit() ended at step {trainer.global_step}.")
    other = subject.trainer(callback)
    other.fit()
    _require(other.global_step == 4, f"In a second trainer it ended at step {other.global_step}.")


def state_round_trip(subject: Subject) -> None:
    """Its state is plain data, can be saved at any time, and is the same after loading."""
    trainer = subject.trainer(subject.make())
    trainer.setup()
    trainer.callbacks.state_dict()
    trainer.fit()
    state = trainer.callbacks.state_dict()
    _require(_equal(state, trainer.callbacks.state_dict()), "Saving the state changed it.")
    file = io.BytesIO()
    torch.save(without_rank_local(state), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other = subject.trainer(subject.make())
    other.setup()
    other.callbacks.load_state_dict(copy.deepcopy(loaded), strict=True)
    found = without_rank_local(other.callbacks.state_dict())
    _require(_equal(found, loaded), f"Saved was {loaded}, and after loading it is {found}.")
    other.fit()


def copies(subject: Subject) -> None:
    """It can be deep-copied before and after training; a copy isn't attached to a trainer."""
    collection = CallbackCollection({"mine": subject.make()})
    before = copy.deepcopy(collection)
    subject.trainer(*collection).fit()
    for each in (before, copy.deepcopy(collection)):
        _require(each["mine"] is not collection["mine"], "The copy is the callback itself.")
        _require(not hasattr(each["mine"], "trainer"), "The copy is attached to a trainer.")
        subject.trainer(*each).fit()


def pickles(subject: Subject) -> None:
    """If it can be pickled, the unpickled callback trains."""
    try:
        data = pickle.dumps(subject.make())
    except Exception:  # noqa: BLE001  # pickling may raise any error
        return
    subject.trainer(pickle.loads(data)).fit()  # noqa: S301  # made above


def survives_errors(subject: Subject) -> None:
    """It cleans up after an error of another callback in any hook, and doesn't hide it."""
    with unclosed_resources():
        subject.trainer(subject.make()).fit()  # what is loaded once per process stays
    with quick_collections():
        for hook in HOOKS:
            _survives_an_error(subject, hook, "before")
            _survives_an_error(subject, hook, "after")


def _survives_an_error(subject: Subject, hook: str, place: str) -> None:
    leftovers, callback, neighbour = Leftovers(), subject.make(), _Raises(hook)
    both = (neighbour, callback) if place == "before" else (callback, neighbour)
    trainer = subject.trainer(*both)
    where = f"When a callback {place} it raises in {hook}"
    with _errors_of_clean_up() as errors, unclosed_resources() as unclosed:
        try:
            trainer.fit()
        except _PlannedError:
            pass
        except BaseException as error:
            raise AssertionError(f"{where}, the run ends with {error!r}.") from error
        else:
            raise AssertionError(f"{where}, the error is swallowed.")
        del trainer, both, callback, neighbour
    own = [error for error in errors if not isinstance(error, _PlannedError)]
    _require_none(own, f"{where}, its clean-up raises {{!r}}.")
    _require_none(unclosed, f"{where}, it leaves {{}}.")
    _require_none(leftovers.found(), f"{where}, it leaves {{}}.")


def leaves_nothing_behind(subject: Subject) -> None:
    """It removes everything that it added: files, threads, signal handlers, hooks, patches."""
    plain = subject.trainer()
    plain.fit()
    with quick_collections():
        with unclosed_resources() as unclosed:
            subject.trainer(subject.make()).fit()  # what is loaded once per process stays
            leftovers = Leftovers()
            trainer = subject.trainer(subject.make())
            trainer.fit()
            patches = patches_of(trainer) - patches_of(plain)
            del trainer
        _require_none(list(patches), "It leaves {}.")
        _require_none(unclosed, "It leaves {}.")
        _require_none(leftovers.found(), "It leaves {}.")


def stops(subject: Subject) -> None:
    """It doesn't prevent a stop, from any hook of another callback."""
    for hook, step in (("pre_fit", 0), ("post_train_step", 1), ("pre_validation_epoch", 2)):
        for place in ("before", "after"):
            callback, neighbour = subject.make(), _Stops(hook)
            both = (neighbour, callback) if place == "before" else (callback, neighbour)
            trainer = subject.trainer(*both, num_sanity_val_steps=0)
            trainer.fit()
            where = f"Stopped in {hook} at step {step}"
            ended = trainer.global_step
            _require(ended == step, f"{where}, the run ended at step {ended}.")
            reason = trainer.stop_reason
            _require(reason == "planned", f"{where}, the reason became {reason!r}.")


def rank_zero_hooks_call_no_collective(subject: Subject) -> None:
    """Hooks that run on rank 0 only call no collective, as debug mode checks."""
    subject.trainer(subject.make(), debug=True).fit()
    with contextlib.suppress(_PlannedError):
        subject.trainer(subject.make(), _Raises("post_train_step"), debug=True).fit()


def works_on_two_ranks(subject: Subject) -> None:
    """On two ranks it trains, trains again, is stopped and fails; its states are equal."""
    outcomes = run_on_ranks(_on_rank, 2, subject.make, subject.folder, subject.trainer_class)
    for outcome in outcomes:
        found = f"Steps were {outcome.steps}, and without it {outcome.plain_steps}."
        _require(outcome.steps == outcome.plain_steps, found)
        if not subject.changes_training:
            same = _equal(outcome.weights, outcome.plain_weights)
            _require(same, "The weights differ from those of a run without it.")
    first, second = outcomes
    _require(_equal(first.weights, second.weights), "The weights differ between ranks.")
    if not isinstance(subject.make(), RankZeroCallback):
        both = f"{first.state} and {second.state}"
        found = f"Ranks have the states {both}; mark what may differ as RankLocal."
        _require(_equal(first.state, second.state), found)


@dataclass(frozen=True)
class _Outcome:
    """Outcome of the runs on one rank, with and without the callback."""

    steps: tuple[int, ...]
    plain_steps: tuple[int, ...]
    weights: Any
    plain_weights: Any
    state: Any


def _on_rank(make: Make, folder: Path, trainer_class: type[TinyTrainer]) -> _Outcome:
    os.chdir(folder)

    def runs(subject: Subject) -> list[TinyTrainer]:
        trainer = subject.trainer(_NoOp(), subject.make(), debug=True)
        trainer.fit()
        trainer.training_parameters.n_epochs = 3
        trainer.fit()
        stopped = subject.trainer(subject.make(), _Stops("post_train_step", rank=1), debug=True)
        stopped.fit()
        return [trainer, stopped]

    subject = Subject(make=make, folder=folder / "with", trainer_class=trainer_class)
    without = Subject(make=_NoOp, folder=folder / "without", trainer_class=trainer_class)
    plain, with_it = runs(without), runs(subject)
    with contextlib.suppress(_PlannedError):  # last, since it shuts down the world
        subject.trainer(make(), _Raises("post_optimizer_step")).fit()
    return _Outcome(
        steps=tuple(trainer.global_step for trainer in with_it),
        plain_steps=tuple(trainer.global_step for trainer in plain),
        weights=with_it[0].model_state_dict(),
        plain_weights=plain[0].model_state_dict(),
        state=_with_rank_local_masked(with_it[0].callbacks.state_dict()),
    )


# Comparison of states


def _equal(a: Any, b: Any) -> bool:
    """Whether two states are bit-identical; NaN equals NaN."""
    if isinstance(a, RankLocal) and isinstance(b, RankLocal):
        return _equal(a.value, b.value)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return bool(a == b)


def _with_rank_local_masked(state: Any) -> Any:
    """The state with "per rank" in place of each value that may differ between ranks."""
    if isinstance(state, RankLocal):
        return "per rank"
    if isinstance(state, dict):
        return {key: _with_rank_local_masked(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(_with_rank_local_masked, state))
    return state


# Not `assert`, which does nothing under python -O


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


def _require_none(found: Collection[object], otherwise: str) -> None:
    """Raise if anything was found, with the first of it in place of {}."""
    for each in found:
        raise AssertionError(otherwise.format(each))


# Other callbacks


class _PlannedError(Exception): ...


class _NoOp(Callback[Any]):
    """Does nothing, in hooks that every run calls."""

    def pre_fit(self) -> None: ...

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None: ...


class _Raises(Callback[Any]):
    def __init__(self, hook: str) -> None:
        self.hook = hook
        setattr(self, hook, self._raise)
        if hook == "on_exception":  # needs an error first
            self.post_epoch = self._raise  # type: ignore[method-assign]

    def _raise(self, *args: Any) -> Any:
        raise _PlannedError(f"planned, in {self.hook}")


class _Stops(Callback[Any]):
    def __init__(self, hook: str, rank: int = 0) -> None:
        self.rank = rank
        setattr(self, hook, self._stop)

    def _stop(self, *args: Any) -> None:
        if self.trainer.world.rank == self.rank:
            self.trainer.stop("planned")


@contextlib.contextmanager
def _errors_of_clean_up() -> Iterator[list[BaseException]]:
    """The errors of hooks during the clean-up of a failed run, which are only logged."""
    errors: list[BaseException] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1] is not None:
                errors.append(record.exc_info[1])

    handler, logger = Keeps(), logging.getLogger("dream_trainer.callbacks")
    logger.addHandler(handler)
    try:
        yield errors
    finally:
        logger.removeHandler(handler)
