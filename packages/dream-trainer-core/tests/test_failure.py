"""An error on one rank: all ranks are gone within seconds, and each says whose error it was."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dream_trainer.callbacks.callback import HOOKS
from dream_trainer.testing import RankError, TinyTrainer, run_on_ranks, tiny_config

LIMIT_S = 10.0
SCRIPT = Path(__file__).parent / "ranks_that_fail.py"


@dataclass(frozen=True)
class Case:
    """What happens on one rank, and what the last line of each rank says of it.

    Args:
        what: A hook, or what `ranks_that_fail.py` names.
        failing_rank: Where.
        num_ranks: Of how many.
        said: The error, in the words of the last line.
        place: Where it was, in the words of the last line.
    """

    what: str
    failing_rank: int = 1
    num_ranks: int = 2
    said: str = "ZeroDivisionError: planned"
    place: str | None = None

    def __str__(self) -> str:
        return f"{self.what}:{self.failing_rank}:{self.num_ranks}"

    @property
    def last_line(self) -> str:
        """A regular expression for what each rank says last."""
        hook = f"FailsInHook.{self.what}" if self.what in HOOKS else self.what
        place = self.place or f"failed in {hook}"
        # A rank that hangs doesn't say so itself.
        failing_rank = 1 - self.failing_rank if self.place == HUNG else self.failing_rank
        rank = rf"rank {failing_rank} \(pid \d+ on \S+\)"
        return rf"(\[rank\d\]: )?\S*( ?RemoteError: )?{rank} {place}.*{self.said}.*"


IN_STEP = r"failed in training_step at step 1 \(epoch 0, batch 1\)"
HUNG = "failed in"
KILLED = r"exited without reporting an error"
AT_STEP = r"; rank \d was at step 1"
TIMED_OUT = (
    r"an NCCL collective timed out \(group default_pg\); flight recorder: \S+/trace_0; where each "
    r"rank was: rank 0: wait \(ranks_that_fail.*; rank 1: _special \(ranks_that_fail"
)
LOADER = r"failed in the training loader, at batch \d of epoch 0"

SPECIAL = [
    Case("configure_models", 1, place="failed in fail "),
    Case("configure_optimizers", 0, place="failed in fail "),
    Case("configure_dataloaders", 1, place="failed in fail "),
    Case("training_step", 0),
    Case("validation_step", 1),
    Case("loader_raise", 1, place=LOADER),
    Case("loader_kill", 0, place="failed in ", said="DataLoader worker"),
    Case("others_compute", 1, place=IN_STEP),
    Case("others_stuck", 1, place=IN_STEP),
    Case("clean_up_hangs", 1, place=IN_STEP),
    Case("clean_up_collective", 1, place=IN_STEP),
    Case("gives_sigterm_back", 1, place=IN_STEP),
    Case("clean_up_fails", 1, place=IN_STEP),
    Case("finally_collective", 1, place=IN_STEP),
    Case("thread_hangs", 0, place=IN_STEP),
    Case("backward", 1, place=IN_STEP),
    Case("SIGKILL", 1, place=KILLED, said=AT_STEP),
    Case("SIGTERM", 1, place="was ended by SIGTERM", said=r"; rank \d was at step 0"),
    Case("killed_on_another_machine", 1, place=HUNG, said="rank 1: no answer"),
    Case("hangs", 1, place=HUNG, said="Timed out waiting"),
    Case("loader_hang", 0, place=HUNG, said="Timed out waiting"),
    Case("os_exit", 0, place=KILLED, said=AT_STEP),
    Case("out_of_memory", 1, place=IN_STEP, said="OutOfMemoryError: planned"),
    Case("system_exit", 1, place=IN_STEP, said="SystemExit: 3"),
    Case("others_in_kernel", 1, place=IN_STEP),
    Case("abort_hangs", 1, place=IN_STEP),
    Case("kernel_times_out", 0, place=r"failed in wait \(ranks_that_fail", said=TIMED_OUT),
]
IN_HOOKS = [Case(hook, rank) for rank in (1, 0) for hook in HOOKS if hook != "on_exception"]
ON_FOUR_RANKS = [
    Case("post_train_step", 2, 4),
    Case("pre_fit", 3, 4),
    Case("post_fit", 1, 4),
    Case("backward", 3, 4, place=IN_STEP),
    Case("SIGKILL", 2, 4, place=KILLED, said=AT_STEP),
    Case("SIGTERM", 2, 4, place="was ended by SIGTERM", said=r"; rank \d was at step 0"),
]
ALL = [*IN_HOOKS, *SPECIAL, *ON_FOUR_RANKS]
QUICK = {
    *("pre_launch:1:2", "post_validation_epoch:0:2"),
    *(
        "post_fit:1:2",
        "training_step:0:2",
        "loader_kill:0:2",
        "others_compute:1:2",
        "hangs:1:2",
        "gives_sigterm_back:1:2",
        "others_in_kernel:1:2",
        "kernel_times_out:0:2",
        "abort_hangs:1:2",
    ),
    *("clean_up_hangs:1:2", "clean_up_collective:1:2"),
    *(
        "SIGKILL:1:2",
        "SIGTERM:2:4",
        "killed_on_another_machine:1:2",
        "system_exit:1:2",
    ),
}
CASES = [
    pytest.param(case, id=str(case), marks=() if str(case) in QUICK else pytest.mark.full)
    for case in ALL
]


# A second error is shown with the first, during which it came.
SAID_TWICE = {"clean_up_fails", "clean_up_collective", "finally_collective", "thread_hangs"}


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What became of the ranks, by case: all cases that are asked for run in one go."""
    folder = tmp_path_factory.mktemp("ranks")
    asked_for = [
        str(item.callspec.params["case"])
        for item in request.session.items
        if item.path == request.path and "case" in getattr(item, "fixturenames", ())
    ]
    cases = list(dict.fromkeys(asked_for))
    subprocess.run([sys.executable, SCRIPT, folder, "4", *cases], check=True, timeout=500)
    return {
        case: json.loads((folder / f"{case}.json").read_text()) | {"folder": folder / case}
        for case in cases
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES)
def test_all_ranks_are_gone_soon_and_say_whose_error_it_was(
    case: Case, outcomes: dict[str, dict[str, Any]]
) -> None:
    outcome = outcomes[str(case)]
    lived_s = [ended_at - outcome["failed_at"] for ended_at in outcome["ended_at"]]
    is_silent = case.what in ("SIGKILL", "SIGTERM", "killed_on_another_machine", "os_exit")

    assert max(lived_s) <= LIMIT_S
    for rank, (code, stderr) in enumerate(zip(outcome["codes"], outcome["stderr"], strict=True)):
        if is_silent and rank == case.failing_rank:
            continue
        assert code == 1 or (case.what, code) == ("system_exit", 3), stderr
        assert re.fullmatch(case.last_line, stderr.splitlines()[-1]), stderr
        if case.what not in SAID_TWICE:
            said = [line for line in stderr.splitlines() if re.fullmatch(case.last_line, line)]
            assert len(said) == 1, "once"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", [case for case in CASES if "others_compute" in str(case.id)])
def test_callbacks_clean_up_on_every_rank_that_can_be_got_out(
    case: Case, outcomes: dict[str, dict[str, Any]]
) -> None:
    folder = outcomes[str(case)]["folder"]

    errors = {"0": "RemoteError", "1": "ZeroDivisionError"}
    for rank, error in errors.items():
        assert (folder / f"on_exception-{rank}").read_text() == error
        assert (folder / f"post_fit-{rank}").read_text() == error


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", [case for case in CASES if "kernel" in str(case.id)])
def test_callbacks_clean_up_on_ranks_that_waited_for_an_aborted_kernel(
    case: Case, outcomes: dict[str, dict[str, Any]]
) -> None:
    folder = outcomes[str(case)]["folder"]
    has_own_error = case.what == "others_in_kernel"

    errors = {"0": "RemoteError", "1": "ZeroDivisionError" if has_own_error else "RemoteError"}
    for rank, error in errors.items():
        assert (folder / f"on_exception-{rank}").read_text() == error
        assert (folder / f"post_fit-{rank}").read_text() == error


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", [case for case in CASES if "clean_up_collective" in str(case.id)])
def test_collectives_in_clean_up_raise_and_dont_wait(
    case: Case, outcomes: dict[str, dict[str, Any]]
) -> None:
    said = outcomes[str(case)]["stderr"][case.failing_rank]

    for name in ("barrier", "c10d::allreduce_"):
        assert f"{name} in the clean-up after an error: the other ranks may be gone" in said


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", [case for case in CASES if "train_context:1:2" in str(case.id)])
def test_the_first_error_is_the_earliest_that_torchrun_hears_of(
    case: Case, outcomes: dict[str, dict[str, Any]]
) -> None:
    folder = outcomes[str(case)]["folder"]
    messages = [
        json.loads((folder / f"{rank}.error.json").read_text())["message"] for rank in (0, 1)
    ]

    assert re.fullmatch(case.last_line, messages[1]["message"])
    assert messages[0]["message"] == messages[1]["message"]
    assert "ZeroDivisionError: planned" in messages[1]["extraInfo"]["py_callstack"]
    times = [int(message["extraInfo"]["timestamp"]) for message in messages]
    assert times[1] < times[0]


def trains(root: str) -> tuple[int, list[str]]:
    import threading

    trainer = TinyTrainer(tiny_config(root, n_epochs=1))
    trainer.fit()
    return trainer.global_step, [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_no_thread_is_left_after_training(tmp_path: Path, num_ranks: int) -> None:
    for steps, threads in run_on_ranks(trains, num_ranks, str(tmp_path)):
        assert steps == 8
        assert "failure-monitor" not in threads


def fails_first_and_trains_again(root: str) -> None:
    trainer = TinyTrainer(tiny_config(root, n_epochs=1))
    trainer.fit()
    trainer.training_parameters.n_epochs = 2
    if trainer.world.rank == 1:
        raise ZeroDivisionError("between two fits")
    trainer.fit()


def test_a_rank_that_is_gone_before_the_others_fit_again_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(fails_first_and_trains_again, 2, str(tmp_path))

    assert "between two fits" in caught.value.tracebacks[1]
    assert "rank 1 (pid " in caught.value.tracebacks[0]
