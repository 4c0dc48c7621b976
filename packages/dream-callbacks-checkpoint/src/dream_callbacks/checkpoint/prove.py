"""prove: does a trainer that is killed and resumed do what it would have done? Bit by bit."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from dream_callbacks.checkpoint import layout
from dream_callbacks.checkpoint.callback import CheckpointCallback
from dream_callbacks.checkpoint.errors import CheckpointError
from dream_callbacks.checkpoint.tree import split
from dream_trainer.callbacks import Callback, Every
from dream_trainer.trainer import BaseTrainer

MakeTrainer: TypeAlias = Callable[[], Any]
KillIn: TypeAlias = Literal["step", "validation"]
_When: TypeAlias = Literal["repeated", "loaded", "resumed"]

_LOADED = ("models.", "optimizers.")
"""What must be there again before the first step is taken."""

_LEFT_OUT = ("dataloaders.", "trainer.callbacks.CheckpointCallback")
"""The position in the data shows in the batches; each loader spells it in its own way."""

_DURABLE_WITHIN_S = 30.0


@dataclass(frozen=True)
class Difference:
    """The first value that isn't the same.

    Attributes:
        name: Of the value, as "models.model.head.weight", "batch.0" or "result.loss".
        rank: On which rank.
        step: Optimizer steps done then.
        when: "repeated": already before the kill, so that the trainer itself gives other values
            each time; "loaded": right after the checkpoint was loaded; "resumed": later.
    """

    name: str
    rank: int
    step: int
    when: _When

    def __str__(self) -> str:
        what = {
            "repeated": "differs between two runs that nobody has stopped: draw random numbers "
            "from Python's, numpy's and torch's global generators alone, and set "
            "torch.use_deterministic_algorithms(True) on a GPU",
            "loaded": "isn't what was saved",
            "resumed": "differs from the run that wasn't stopped: something that it depends on "
            "isn't in the state, such as an attribute, a file, or a generator of its own",
        }
        return f"step {self.step}, rank {self.rank}: {self.name} {what[self.when]}"


@dataclass(frozen=True)
class Proof:
    """What came of comparing the runs.

    Attributes:
        num_steps: Of each run.
        stopped_at: Steps in the checkpoint that the killed run went on from.
        num_ranks: Of each run.
        num_values: How many values were compared.
        difference: The first one that differs; None if none does.
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
        """Raise an AssertionError that names the difference, if there is one."""
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
    """Train 2N steps; train N, kill -9, resume, train N more; and compare.

    Compared are, on each rank and bit for bit: every batch, every result, the results of
    validations, and after each step all weights, optimizer states, schedulers, counters, states of
    callbacks and random generators. The runs are processes of their own. The trainer's own
    CheckpointCallback is used if it has one, with `every` as its cadence.

    Args:
        make_trainer: Returns the trainer, not set up; or "module:function" or "file.py:function".
            Its root_dir and the length of its training are set here.
        folder: Where runs may write; emptied before.
        steps: N, in optimizer steps.
        every: When to save; something must be saved at step N. Default: every N steps.
        kill_in: "step" to kill at the beginning of the step that follows, "validation" in the
            first validation that does.
        num_ranks: Processes of each run.
        ignore: Names of values that may differ, as shell patterns.
        timeout_s: For each of the three runs.

    Raises:
        CheckpointError: If a run fails, or can't be killed as asked.
        ValueError: If `make_trainer` is text of another form.
    """
    from dream_trainer.testing import RankError, run_on_ranks

    if isinstance(make_trainer, str) and not make_trainer.rpartition(":")[0]:
        raise ValueError(
            f"{make_trainer!r}: module:function or file.py:function is required; the function "
            "takes nothing and returns a trainer"
        )
    folder = Path(folder)
    plan = _Plan(make_trainer, folder, steps, every or Every(steps=steps), kill_in)

    def run(phase: str) -> None:
        try:
            run_on_ranks(_train, num_ranks, plan, phase, timeout_s=timeout_s)
        except RankError as error:
            if phase != "stopped" or not all(plan.mark(r).exists() for r in range(num_ranks)):
                raise CheckpointError(f"the {phase} run failed: {error}") from None

    for phase in ("straight", "stopped"):
        shutil.rmtree(folder / phase, ignore_errors=True)
        (folder / phase).mkdir(parents=True)
    run("straight")
    run("stopped")
    if not plan.mark(0).exists():
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
        """Is there once a rank has killed itself."""
        return self.folder / "stopped" / f"killed-{rank}"


def _train(plan: _Plan, phase: str) -> None:
    """Body of a rank's process."""
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
    """Make the trainer's own CheckpointCallback save where it is needed; add one if it has none."""
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


class Recorder(Callback[BaseTrainer]):
    """Writes down a digest of everything that two runs should have in common.

    Args:
        path: A line is added for each batch, result, state and validation, at once.
        resumed_at: The step at which the run must go on; 0 if it begins.
    """

    after: ClassVar = {Callback}

    def __init__(self, path: Path, resumed_at: int = 0) -> None:
        self.path = path
        self.resumed_at = resumed_at

    def pre_fit(self) -> None:
        self.path.unlink(missing_ok=True)
        step = self.trainer.global_step
        if step != self.resumed_at:
            raise CheckpointError(
                f"the run should have gone on at step {self.resumed_at} and did at step {step}"
            )
        if self.resumed_at:
            state = self._state()
            self._write("loaded", {k: v for k, v in state.items() if k.startswith(_LOADED)})

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        self._write("batch", dict(_digests(batch, "batch")))

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self._write("result", dict(_digests(result, "result")))
        if not self.trainer.is_accumulating_gradients:
            self._write("state", self._state())

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self._write("validation", dict(_digests(result, "result")))

    def _state(self) -> dict[str, str]:
        parts = split(self.trainer.state_dict(), self.trainer.world.rank)
        values = {**dict(_digests(parts.tensors, "")), **dict(_leaves(parts.shared, ""))}
        for name, document in parts.local.items():
            values |= dict(_leaves(document, name))
        return {name: v for name, v in values.items() if not name.startswith(_LEFT_OUT)}

    def _write(self, kind: str, values: Mapping[str, str]) -> None:
        counters = self.trainer.counters
        place = [counters.global_step, counters.local_batches]
        line = json.dumps({"kind": kind, "place": place, "values": values}) + "\n"
        # At once, and in one piece: the process may be killed.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


class Killer(Callback[BaseTrainer]):
    """Kills its process after the checkpoint of a step, once that lasts.

    Args:
        step: Which.
        kill_in: "step" or "validation", whichever comes next.
        mark: File to make before.
    """

    def __init__(self, step: int, kill_in: KillIn, mark: Path) -> None:
        self.step = step
        self.kill_in = kill_in
        self.mark = mark

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        if self.kill_in == "step" and self.trainer.global_step == self.step:
            self._kill()

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if self.kill_in == "validation" and self.trainer.global_step == self.step:
            self._kill()

    def _kill(self) -> None:
        (callback,) = [
            c
            for c in self.trainer.callbacks.values()
            if isinstance(c, CheckpointCallback) and c.parameters.enable
        ]
        folder = Path(callback.directory, layout.checkpoint_name(self.step))
        deadline = time.monotonic() + _DURABLE_WITHIN_S
        while not folder.is_dir():
            if time.monotonic() > deadline:
                raise CheckpointError(f"{folder} wasn't saved; `every` must be due at that step")
            time.sleep(0.01)
        self.mark.touch()
        for worker in multiprocessing.active_children():
            worker.kill()  # a loader's would only notice after seconds
        os.kill(os.getpid(), signal.SIGKILL)


# Digests


def _digests(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """A digest of each tensor in a value, and of whatever else is in it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _digests(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _digests(item, f"{name}.{index}")
    else:
        yield name, _digest(value)


def _digest(value: Any) -> str:
    if not isinstance(value, Tensor):
        return _hash(repr(value).encode())
    local = cast("Tensor", value.to_local() if hasattr(value, "to_local") else value)
    flat = local.detach().cpu().contiguous().reshape(-1)
    kind = f"{local.dtype} {tuple(local.shape)} "
    return _hash(kind.encode() + flat.view(torch.uint8).numpy().tobytes())


def _leaves(document: Any, name: str) -> Iterator[tuple[str, str]]:
    """A digest of each value in JSON of a state; tensors are left to `_digests`."""
    if isinstance(document, dict) and not any(key.startswith("$") for key in document):
        for key, item in document.items():
            yield from _leaves(item, f"{name}.{key}" if name else key)
    elif not (isinstance(document, dict) and {"$tensor", "$rank_local"} & set(document)):
        yield name, _hash(json.dumps(document).encode())


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


# Comparing

_KINDS = ("loaded", "batch", "result", "state", "validation")
"""Of records, as they come."""

_Key: TypeAlias = tuple[str, tuple[int, int]]
"""Kind of a record; steps and batches done."""

_Records: TypeAlias = dict[_Key, dict[str, str]]


@dataclass(frozen=True)
class _Comparison:
    num_values: int
    difference: Difference | None = None
    order: tuple[Any, ...] = ()
    """Smaller for a difference that comes earlier, on whichever rank."""


def _compare(plan: _Plan, rank: int, ignore: Sequence[str]) -> _Comparison:
    """The runs of one rank, in the order in which the straight one went."""
    straight, stopped, resumed = (
        _read(plan.records(phase, rank), ignore) for phase in ("straight", "stopped", "resumed")
    )
    num_values = 0
    for when, key, wanted, found in _pairs(straight, stopped, resumed):
        num_values += len(wanted)
        for name in wanted | found:
            if wanted.get(name) != found.get(name):
                kind, place = key
                # A record that only one of the runs has differs in all of its names.
                shown = name if wanted and found else f"the {kind}, which only one of the runs had,"
                order = (get_args(_When).index(when), place, _KINDS.index(kind))
                return _Comparison(num_values, Difference(shown, rank, place[0], when), order)
    return _Comparison(num_values)


def _pairs(
    straight: _Records, stopped: _Records, resumed: _Records
) -> Iterator[tuple[_When, _Key, dict[str, str], dict[str, str]]]:
    """Values that should be the same: when, which, in the straight run, and in the other."""
    for key, values in stopped.items():
        yield "repeated", key, straight.get(key, {}), values
    for (kind, place), values in resumed.items():
        if kind == "loaded":
            saved = straight.get(("state", place), {})
            here = {name: v for name, v in saved.items() if name.startswith(_LOADED)}
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
