"""prove: check that a trainer that is killed and resumed is bit-exact."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from dream_callbacks.checkpoint.callback import CheckpointCallback
from dream_callbacks.checkpoint.errors import CheckpointError
from dream_callbacks.checkpoint.testing.injected_callbacks import (
    KINDS,
    LOADED,
    Killer,
    KillIn,
    Recorder,
)
from dream_trainer.callbacks import Every

MakeTrainer: TypeAlias = Callable[[], Any]
_When: TypeAlias = Literal["repeated", "loaded", "resumed"]


@dataclass(frozen=True)
class Difference:
    """The first value that differs.

    Attributes:
        name: Name of the value, such as "models.model.head.weight", "batch.0" or "result.loss".
        rank: Rank on which it differs.
        step: Optimizer steps done.
        when: "repeated": before the kill, so the trainer isn't deterministic; "loaded": right
            after the checkpoint was loaded; "resumed": later.
    """

    name: str
    rank: int
    step: int
    when: _When

    def __str__(self) -> str:
        what = {
            "repeated": "differs between two uninterrupted runs: draw random numbers only "
            "from Python's, numpy's and torch's global generators, and on a GPU set "
            "DeviceParameters(deterministic=True)",
            "loaded": "differs from what was saved",
            "resumed": "differs from the uninterrupted run: something that it depends on "
            "isn't in the state, such as an attribute, a file, or a generator of its own",
        }
        return f"step {self.step}, rank {self.rank}: {self.name} {what[self.when]}"


@dataclass(frozen=True)
class Proof:
    """Result of comparing the runs.

    Attributes:
        num_steps: Optimizer steps of each run.
        stopped_at: Step of the checkpoint that the killed run resumed from.
        num_ranks: Ranks of each run.
        num_values: Number of compared values.
        difference: The first value that differs; None if all are equal.
    """

    num_steps: int
    stopped_at: int
    num_ranks: int
    num_values: int
    difference: Difference | None = None

    def __str__(self) -> str:
        ranks = f"{self.num_ranks} rank{'s' if self.num_ranks > 1 else ''}"
        runs = f"{self.num_steps} steps, and killed and resumed at step {self.stopped_at}, {ranks}"
        if self.difference is None:
            return f"{runs}: all of {self.num_values} values are the same, bit for bit"
        return f"{runs}: not the same\n{self.difference}"

    def check(self) -> None:
        """Raise an AssertionError that names the difference if there is one."""
        if self.difference is not None:
            raise AssertionError(str(self))


def prove(
    make_trainer: MakeTrainer | str,
    folder: str | Path,
    *,
    steps: int = 5,
    every: Every | None = None,
    kill_in: KillIn = "step",
    num_ranks: int = 1,
    ignore: Sequence[str] = (),
    timeout_s: float = 600.0,
) -> Proof:
    """Train 2N steps; train N steps, `kill -9`, resume, train N more; compare both.

    Compares bit for bit on each rank: every batch, every result, validation results, and after
    each step all weights, optimizer states, schedulers, counters, callback states and random
    generators. Each run has its own processes. A CheckpointCallback of the trainer is used, with
    `every` as its cadence; otherwise one is added.

    Args:
        make_trainer: Returns a trainer that isn't set up; or "module:function" or
            "file.py:function". Its root_dir and training length are overwritten.
        folder: Working directory of the runs; its `straight` and `stopped` folders are emptied.
        steps: N, in optimizer steps.
        every: When to save; must be due at step N. Default: every N steps.
        kill_in: "step" to kill at the start of the step after the save, "validation" to kill in
            the first validation after it.
        num_ranks: Processes of each run.
        ignore: Names of values that may differ, as shell patterns.
        timeout_s: Timeout of each of the three runs.

    Raises:
        CheckpointError: If a run fails or can't be killed as requested.
        ValueError: If `make_trainer` is malformed text or names a file that doesn't exist.
    """
    from dream_trainer.testing import RankError, run_on_ranks

    if isinstance(make_trainer, str):
        _refuse_unfindable(make_trainer)
    folder = Path(folder)
    plan = _Plan(make_trainer, folder, steps, every or Every(steps=steps), kill_in)

    def was_killed() -> bool:
        # Each rank kills itself; the first kill may end the others before they do.
        return any(plan.mark(rank).exists() for rank in range(num_ranks))

    def run(phase: str) -> None:
        try:
            run_on_ranks(_train, num_ranks, plan, phase, timeout_s=timeout_s)
        except RankError as error:
            if phase != "stopped" or not was_killed():
                raise CheckpointError(f"the {phase} run failed: {error}") from None

    for phase in ("straight", "stopped"):
        shutil.rmtree(folder / phase, ignore_errors=True)
        (folder / phase).mkdir(parents=True)
    run("straight")
    run("stopped")
    if not was_killed():
        where = "in a validation after" if kill_in == "validation" else "in the step after"
        raise CheckpointError(
            f"the run ended before it could be killed {where} the checkpoint of step {steps}; "
            f"choose a number of steps after which one comes, and `every` so that it is saved"
        )
    run("resumed")
    found = [_compare(plan, rank, ignore) for rank in range(num_ranks)]
    differences = [part for part in found if part.difference is not None]
    first = min(differences, key=lambda part: part.order, default=None)
    return Proof(
        2 * steps,
        steps,
        num_ranks,
        sum(part.num_values for part in found),
        first.difference if first else None,
    )


# One run


@dataclass(frozen=True)
class _Plan:
    make_trainer: MakeTrainer | str
    folder: Path
    steps: int
    every: Every
    kill_in: KillIn

    def records(self, phase: str, rank: int) -> Path:
        return self.folder / f"{phase}-{rank}.jsonl"

    def mark(self, rank: int) -> Path:
        """File that a rank creates just before it kills itself."""
        return self.folder / "stopped" / f"killed-{rank}"


def _train(plan: _Plan, phase: str) -> None:
    """Train in the process of one rank."""
    trainer = _made(plan.make_trainer)
    is_resumed = phase == "resumed"
    trainer.config.root_dir = plan.folder / ("stopped" if is_resumed else phase)
    parameters = trainer.training_parameters
    parameters.max_steps, parameters.n_epochs, parameters.max_time = 2 * plan.steps, None, None
    _let_save(trainer, plan)
    rank = int(os.environ["RANK"])
    trainer.callbacks.append(
        Recorder(plan.records(phase, rank), resumed_at=plan.steps * is_resumed)
    )
    if phase == "stopped":
        trainer.callbacks.append(Killer(plan.steps, plan.kill_in, plan.mark(rank)))
    trainer.fit()


def _refuse_unfindable(make_trainer: str) -> None:
    module_name, _, _ = make_trainer.rpartition(":")
    if not module_name:
        raise ValueError(
            f"{make_trainer!r}: module:function or file.py:function is required; the function "
            "takes nothing and returns a trainer"
        )
    if module_name.endswith(".py") and not Path(module_name).is_file():
        raise ValueError(
            f"{make_trainer!r}: there is no file {Path(module_name).resolve()}; give its path, as "
            "in path/to/train.py:make_trainer"
        )


def _made(make_trainer: MakeTrainer | str) -> Any:
    if not isinstance(make_trainer, str):
        return make_trainer()
    module_name, _, function_name = make_trainer.rpartition(":")
    if module_name.endswith(".py"):
        path = Path(module_name).resolve()
        sys.path.insert(0, str(path.parent))
        module_name = path.stem
    return getattr(importlib.import_module(module_name), function_name)()


def _let_save(trainer: Any, plan: _Plan) -> None:
    """Configure the trainer's CheckpointCallback for the plan; add one if it has none."""
    present = [c for c in trainer.callbacks.values() if isinstance(c, CheckpointCallback)]
    if not present:
        present = [CheckpointCallback()]
        trainer.callbacks.append(present[0])
    for callback in present:
        callback.parameters = dataclasses.replace(
            callback.parameters,
            root_dir=None,
            every=plan.every,
            checkpoint_every_n_train_epochs=None,
            checkpoint_every_n_val_epochs=None,
            resume_mode="last",
            on_save_error="raise",
            enable=callback is present[0],
        )


# Comparing

_Key: TypeAlias = tuple[str, tuple[int, int]]
"""Kind of a record; optimizer steps and batches done."""

_Records: TypeAlias = dict[_Key, dict[str, str]]


@dataclass(frozen=True)
class _Comparison:
    num_values: int
    difference: Difference | None = None
    order: tuple[Any, ...] = ()
    """Sort key of the difference: earlier ones are smaller, across ranks."""


def _compare(plan: _Plan, rank: int, ignore: Sequence[str]) -> _Comparison:
    """Compare the runs of one rank, in the order of the straight run."""
    straight, stopped, resumed = (
        _read(plan.records(phase, rank), ignore) for phase in ("straight", "stopped", "resumed")
    )
    num_values = 0
    for when, key, wanted, found in _pairs(straight, stopped, resumed):
        num_values += len(wanted)
        for name in wanted | found:
            if wanted.get(name) != found.get(name):
                kind, place = key
                # A record that only one run has differs in all names.
                shown = name if wanted and found else f"the {kind}, which only one of the runs had,"
                order = (get_args(_When).index(when), place, KINDS.index(kind))
                return _Comparison(num_values, Difference(shown, rank, place[0], when), order)
    return _Comparison(num_values)


def _pairs(
    straight: _Records, stopped: _Records, resumed: _Records
) -> Iterator[tuple[_When, _Key, dict[str, str], dict[str, str]]]:
    """Records that must be equal: when, key, values of the straight run, values of the other."""
    for key, values in stopped.items():
        yield "repeated", key, straight.get(key, {}), values
    for (kind, place), values in resumed.items():
        if kind == "loaded":
            saved = straight.get(("state", place), {})
            here = {name: v for name, v in saved.items() if name.startswith(LOADED)}
            yield "loaded", (kind, place), here, values
    for key in (key for key in straight | resumed if key[0] != "loaded"):
        if key in resumed or key not in stopped:
            yield "resumed", key, straight.get(key, {}), resumed.get(key, {})


def _read(path: Path, ignore: Sequence[str]) -> _Records:
    records: _Records = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        records[record["kind"], tuple(record["place"])] = {
            name: digest
            for name, digest in record["values"].items()
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)
        }
    return records
