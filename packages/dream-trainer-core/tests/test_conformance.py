"""The conformance suite: a good callback passes, and each kind of bad one is caught."""

from __future__ import annotations

import ast
import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dream_trainer.callbacks import Callback, Every, RankLocal, RankZeroCallback, intersection
from dream_trainer.testing import TinyTrainer, check_callback, checks, conformance
from dream_trainer.testing.conformance import CHECKS, Check
from dream_trainer.trainer import AbstractTrainer

NAMES = [check.name for check in CHECKS]


class Good(Callback[Any]):
    """Counts, averages, writes a file, runs a thread, installs a hook, and cleans everything up."""

    def __init__(self, every: Every = Every(steps=2)) -> None:  # noqa: B008  # it is frozen
        self.every = every
        self.num_batches = 0
        self.average: torch.Tensor | None = None
        self.is_open = False

    def pre_fit(self) -> None:
        folder = self.trainer.run_dir / f"rank_{self.trainer.world.rank}"
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / "log.txt").open("a")
        self.is_open = True
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.done.wait, daemon=True)
        self.thread.start()
        self.handle = self.trainer.model.register_forward_hook(lambda *args: None)

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.num_batches += 1
        loss = result["loss"]
        self.average = loss if self.average is None else self.average * 0.9 + loss * 0.1

    def post_train_epoch(self, result: dict[str, Any]) -> None:
        self.trainer.world.all_reduce(result["loss"])

    def post_fit(self) -> None:
        self.handle.remove()
        self.done.set()
        self.thread.join()
        self.file.close()
        self.is_open = False

    def __getstate__(self) -> dict[str, Any]:
        lives = ("file", "thread", "done", "handle")
        return {k: v for k, v in super().__getstate__().items() if k not in lives}

    def state_dict(self) -> dict[str, Any]:
        return {"num_batches": self.num_batches, "average": RankLocal(self.average)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        self.num_batches = state_dict["num_batches"]
        self.average = state_dict["average"]


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_a_good_callback_passes_each_check(check: Check, tmp_path: Path) -> None:
    check(Good, tmp_path)
    assert check.rule.endswith(".")


def test_check_callback_passes_a_good_callback(capfd: pytest.CaptureFixture[str]) -> None:
    check_callback(lambda: Good(every=Every(steps=3)))

    assert capfd.readouterr() == ("", "")


class Mixin(AbstractTrainer): ...


class Other(AbstractTrainer): ...


@intersection
class Both(Mixin, Other): ...


class WithBoth(TinyTrainer, Mixin, Other): ...


class NeedsBoth(RankZeroCallback[Both]):
    def post_fit(self) -> None: ...


def test_a_callback_is_checked_in_a_trainer_with_what_it_requires(tmp_path: Path) -> None:
    check_callback(NeedsBoth, trainer_class=WithBoth)
    with pytest.raises(AssertionError, match=r"plans: .*needs a trainer with Mixin, Other"):
        CHECKS[NAMES.index("plans")](NeedsBoth, tmp_path)


# Callbacks that break a rule, each with the check that must catch it and its message

BAD: list[tuple[str, Callable[[], Any], str]] = []


def bad(check: str, says: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    def register(make: Callable[[], Any]) -> Callable[[], Any]:
        BAD.append((check, make, says))
        return make

    return register


@bad("constructs", r"make\(\) returned 3")
def makes_no_callback() -> Any:
    return 3


SHARED = Good()


@bad("constructs", "returned the same object twice")
def makes_the_same_one_twice() -> Any:
    return SHARED


@bad("constructs", "It wrote log.txt")
class WritesWhenMade(Good):
    def __init__(self) -> None:
        super().__init__()
        Path("log.txt").write_text("made")


@bad("constructs", r"It left the open file .*test_conformance.py")
class OpensWhenMade(Good):
    opened: Any = []

    def __init__(self) -> None:
        super().__init__()
        self.opened.append(Path(__file__).open())  # noqa: SIM115  # that is the mistake


@bad("constructs", "It drew random numbers")
class DrawsWhenMade(Good):
    def __init__(self) -> None:
        super().__init__()
        self.name = random.random()


@bad("constructs", "planned")
class FailsWhenMade(Good):
    def __init__(self) -> None:
        raise ValueError("planned")


@bad("plans", "Idle overrides no hook and has no state")
class Idle(Callback[Any]): ...


@bad("plans", "can't be ordered")
class AfterAndBeforeAnother(Good):
    before = {"_NoOp"}
    after = {"_NoOp"}


@bad("trains", "weights differ from those of a run without it")
class ScalesGradients(Good):
    def pre_optimizer_step(self, model: Any, optimizer: Any) -> None:
        for parameter in model.parameters():
            parameter.grad += 0.1


@bad("trains", "It drew random numbers")
class DrawsInHook(Good):
    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        torch.rand(1)


@bad("trains", "It ended at step 1")
class Stops(Good):
    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.trainer.stop("enough")


@bad("trains", r"SystemExit\(0\)")
class Exits(Good):
    def post_fit(self) -> None:
        super().post_fit()
        sys.exit(0)


@bad("trains", "only the loop changes global_step")
class AssignsCounters(Good):
    def pre_epoch(self) -> None:
        self.trainer.global_step = 0


@bad("trains_twice", "already finished")
class WorksOnce(Good):
    is_done = False

    def pre_fit(self) -> None:
        if self.is_done:
            raise RuntimeError("already finished")
        self.is_done = True
        super().pre_fit()


@bad("trains_twice", "stays in this trainer")
class BelongsToOneTrainer(Good):
    mine: Any = None

    def pre_epoch(self) -> None:
        self.mine = self.mine or self.trainer
        if self.mine is not self.trainer:
            raise RuntimeError("stays in this trainer")


@bad("state_round_trip", r"holds a PosixPath at state_dict\(\)\['path'\]")
class StateIsNotPlain(Good):
    def state_dict(self) -> dict[str, Any]:
        return {"path": Path("x")}


@bad("state_round_trip", "after loading it is")
class ForgetsToLoad(Good):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...  # type: ignore[override]


@bad("state_round_trip", "Saving the state changed it")
class CountsSaves(Good):
    num_saves = 0

    def state_dict(self) -> dict[str, Any]:
        self.num_saves += 1
        return {"num_saves": self.num_saves}


@bad("state_round_trip", "has no attribute 'best'")
class StateOnlyAfterTraining(Good):
    best: float

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self.best = result["val_loss"]

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}


@bad("copies", "cannot pickle '_io.TextIOWrapper'")
class KeepsItsFile(Good):
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "file": self.__dict__.get("file")}


@bad("copies", "The copy is the callback itself")
class CopiesToItself(Good):
    def __deepcopy__(self, memo: Any) -> Any:
        return self


@bad("copies", "The copy is attached")
class CopyIsAttached(Good):
    def __deepcopy__(self, memo: Any) -> Any:
        other = type(self)()
        other.__dict__.update(self.__dict__)
        return other


@bad("pickles", "has no attribute 'num_batches'")
class LosesItsFields(Good):
    def __getstate__(self) -> dict[str, Any]:
        return {"every": self.every}


@bad("survives_errors", "its clean-up raises AttributeError.*scratch")
class NeedsTheFirstStep(Good):
    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.scratch = [result]

    def post_fit(self) -> None:
        super().post_fit()
        self.scratch.clear()


@bad("survives_errors", r"its clean-up raises ValueError\('not again'\)")
class FailsWhenTold(Good):
    def on_exception(self, exception: BaseException) -> None:
        raise ValueError("not again")


@bad("survives_errors", "raises in train_context.*Swallows.train_context suppressed an error of")
class Swallows(Good):
    def train_context(self) -> Any:
        return contextlib.suppress(Exception)


@bad("survives_errors", "it leaves .*unclosed file.*log.txt")
class ClosesAtTheEndOnly(Good):
    def post_fit(self) -> None:
        file, self.file = self.file, (self.trainer.run_dir / "other.txt").open("w")
        if self.trainer.exception is None:
            file.close()
        super().post_fit()


@bad("survives_errors", "it leaves the changed torch.is_grad_enabled")
class SwitchesGradientsOff(Good):
    def pre_validation_step(self, batch: Any, batch_idx: int) -> None:
        torch.set_grad_enabled(False)

    def pre_setup(self) -> None:
        self.before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)

    def post_setup(self) -> None:
        torch.set_grad_enabled(self.before)


@bad("survives_errors", "it leaves the thread left")
class StartsAThreadTooEarly(Good):
    def post_setup(self) -> None:
        self.end = threading.Event()
        threading.Thread(target=self.end.wait, name="left", daemon=True).start()

    def post_fit(self) -> None:
        super().post_fit()
        self.end.set()


@bad("leaves_nothing_behind", "It leaves the thread left")
class LeavesAThread(Good):
    def pre_fit(self) -> None:
        super().pre_fit()
        threading.Thread(target=time.sleep, args=(8,), name="left", daemon=True).start()


@bad("leaves_nothing_behind", "It leaves the signal handler SIGUSR1: ")
class LeavesASignalHandler(Good):
    other = True

    def pre_fit(self) -> None:
        super().pre_fit()
        handler = signal.getsignal(signal.SIGUSR1)
        new = signal.SIG_DFL if handler == signal.SIG_IGN else signal.SIG_IGN
        signal.signal(signal.SIGUSR1, new)


@bad("leaves_nothing_behind", r"It leaves a hook in model\.head\._forward_hooks")
class LeavesAHook(Good):
    def pre_fit(self) -> None:
        super().pre_fit()
        self.trainer.model.head.register_forward_hook(lambda *args: None)


@bad("leaves_nothing_behind", r"It leaves trainer\.training_step, which was replaced")
class PatchesTheTrainer(Good):
    def pre_fit(self) -> None:
        super().pre_fit()
        step = self.trainer.training_step
        self.trainer.training_step = lambda batch, batch_idx: step(batch, batch_idx)


@bad("leaves_nothing_behind", r"It leaves model\.head\.forward, which was replaced")
class PatchesAModule(Good):
    def pre_fit(self) -> None:
        super().pre_fit()
        head = self.trainer.model.head
        forward = type(head).forward
        head.forward = lambda x: forward(head, x)


@bad("leaves_nothing_behind", "It leaves the environment variable SET_BY_CALLBACK=")
class SetsTheEnvironment(Good):
    def pre_launch(self) -> None:
        os.environ["SET_BY_CALLBACK"] = str(random.SystemRandom().random())


@bad("leaves_nothing_behind", "It leaves .*unclosed file.*other.txt")
class NeverCloses(Good):
    def pre_fit(self) -> None:
        super().pre_fit()
        self.other = (self.trainer.run_dir / "other.txt").open("w")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "other"}


@bad("stops", r"Stopped in post_train_step at step 1, the run ended at step [24]")
class WillNotStop(Good):
    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.trainer.stop_reason = None


@bad("stops", "the reason became 'mine'")
class ChangesTheReason(Good):
    def post_fit(self) -> None:
        super().post_fit()
        self.trainer.stop_reason = "mine"


@bad("rank_zero_hooks_call_no_collective", "all_reduce in ReducesOnRankZero.post_train_epoch")
class ReducesOnRankZero(RankZeroCallback[Any]):
    def post_train_epoch(self, result: dict[str, Any]) -> None:
        self.trainer.world.all_reduce(result["loss"])


@bad("works_on_two_ranks", "all_reduce in ReducesOnRankZero.post_train_epoch of a RankZero")
class AlsoOnTwoRanks(ReducesOnRankZero): ...


BAD[-1] = ("works_on_two_ranks", AlsoOnTwoRanks, "all_reduce in AlsoOnTwoRanks.post_train_epoch")


@bad("works_on_two_ranks", "states .*mark what may differ as RankLocal")
class StateDiffers(Good):
    def state_dict(self) -> dict[str, Any]:
        return {"rank": self.trainer.world.rank}


@bad("works_on_two_ranks", "ranks have different values of model.head.bias")
class ChangesRankOne(Good):
    def post_epoch(self) -> None:
        if self.trainer.world.rank == 1:
            with torch.no_grad():
                self.trainer.model.head.bias += 1


@bad("works_on_two_ranks", "planned on rank 1")
class FailsOnRankOne(Good):
    def post_epoch(self) -> None:
        if self.trainer.world.rank == 1:
            raise ValueError("planned on rank 1")


@bad("works_on_two_ranks", "Address already in use|FileExistsError|rank 1")
class BothWriteOneFile(Good):
    def pre_launch(self) -> None:
        self.trainer.run_dir.mkdir(parents=True, exist_ok=True)
        (self.trainer.run_dir / "lock").touch(exist_ok=False)


@pytest.mark.parametrize(
    ("name", "make", "says"), BAD, ids=[getattr(make, "__name__", "") for _, make, _ in BAD]
)
def test_a_bad_callback_is_caught(
    name: str, make: Callable[[], Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=f"(?s)^{name}: .*({says})"):
        CHECKS[NAMES.index(name)](make, tmp_path)


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, handler)
    torch.set_grad_enabled(True)
    os.environ.pop("SET_BY_CALLBACK", None)
    while OpensWhenMade.opened:
        OpensWhenMade.opened.pop().close()


def test_each_check_catches_something() -> None:
    assert {name for name, _, _ in BAD} == set(NAMES)


# What is allowed


def test_a_callback_may_change_training_with_changes_training(tmp_path: Path) -> None:
    for check in CHECKS:
        if check.name in ("constructs", "trains", "works_on_two_ranks"):
            folder = tmp_path / check.name
            folder.mkdir()
            check(ScalesGradients, folder, changes_training=True)


def test_a_callback_that_cannot_be_pickled_passes(tmp_path: Path) -> None:
    class Local(Good): ...

    CHECKS[NAMES.index("pickles")](Local, tmp_path)


# The report


def test_all_broken_rules_are_reported_together() -> None:
    only = {"plans", "state_round_trip", "stops"}
    with pytest.raises(AssertionError) as caught:
        check_callback(ChangesTheReasonAndStates, skip=set(NAMES) - only)

    assert str(caught.value).startswith("2 of 12 checks failed:\n- state_round_trip: ")
    assert "\n- stops: It doesn't prevent a stop" in str(caught.value)


class ChangesTheReasonAndStates(ChangesTheReason, CountsSaves): ...


def test_an_unknown_check_to_skip_is_refused() -> None:
    with pytest.raises(ValueError, match="no check is called 'stop'; there are constructs, plans"):
        check_callback(Good, skip={"stop"})


def test_the_error_of_the_callback_is_the_cause(tmp_path: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        CHECKS[NAMES.index("trains_twice")](WorksOnce, tmp_path)

    assert repr(caught.value.__cause__) == "RuntimeError('already finished')"


@pytest.mark.parametrize("module", [checks, conformance], ids=lambda module: module.__name__)
def test_checks_work_under_python_optimized(module: Any) -> None:
    nodes = ast.walk(ast.parse(Path(module.__file__).read_text()))

    assert not any(isinstance(node, ast.Assert) for node in nodes)
