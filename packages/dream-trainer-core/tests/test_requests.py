"""Requests: agreed on all ranks at the same step, without a step that waits for another rank."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dream_trainer.callbacks import Callback, RankZeroCallback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import RankError, TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.world import Requests, World


def launched() -> World:
    world = World(DeviceParameters(device="cpu"))
    world.launch()
    return world


class Asks(Callback[TinyTrainer]):
    """Rank 1 asks for something of this callback's own, in a thread; notes when all know."""

    def __init__(self, step_s: float, at_step: int = 5) -> None:
        self.step_s = step_s
        self.at_step = at_step
        self.agreed_at: list[int] = []

    def pre_fit(self) -> None:
        self.request = self.trainer.requests.register("swap the data")

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if self.request.take():
            self.agreed_at.append(self.trainer.global_step)
            self.reason = self.request.reason()
        time.sleep(self.step_s)
        if self.trainer.global_step == self.at_step and self.trainer.world.rank == 1:
            self.asked_s = time.monotonic()
            thread = threading.Thread(target=self.request.ask, args=("the disk is full",))
            thread.start()
            thread.join()


def asked(root: str, step_s: float, num_steps: int) -> tuple[list[int], str]:
    callback = Asks(step_s)
    config = tiny_config(root, [callback], n_epochs=1)
    config.num_samples = 4 * num_steps
    TinyTrainer(config).fit()
    return callback.agreed_at, callback.reason


@pytest.mark.parametrize(
    ("step_s", "num_steps", "latest"),
    # Asked for after step 5. Two steps, or those of a second and some for a busy machine.
    [(0.6, 10, 6), (0.3, 12, 9), (0.02, 120, 70)],
    ids=["long", "medium", "short"],
)
def test_a_request_is_agreed_once_at_the_same_step_of_all_ranks(
    tmp_path: Path, step_s: float, num_steps: int, latest: int
) -> None:
    first, second = run_on_ranks(asked, 2, str(tmp_path), step_s, num_steps)

    assert first == second
    (agreed_at,), reason = first
    assert 6 <= agreed_at <= latest
    assert reason == "the disk is full"


def sends_without_waiting(folder: Path) -> list[str]:
    """Rank 1 takes part in an exchange only when rank 0 says that it has left the next step."""
    world = launched()
    requests = Requests(world)
    requests.start()
    seen = []
    is_sent = folder / "sent"
    if world.rank == 1:
        while not is_sent.exists():
            time.sleep(0.01)
    requests.send("train")
    seen.append("left a step")
    is_sent.touch()
    requests.receive()
    requests.finish()
    world.shutdown()
    return seen


def test_a_step_ends_before_another_rank_has_come_to_it(tmp_path: Path) -> None:
    assert run_on_ranks(sends_without_waiting, 2, tmp_path) == [["left a step"]] * 2


def schedule(step_s: float, num_steps: int, others_step_s: float) -> list[tuple[int, str]]:
    """After which steps this rank starts and reads exchanges."""
    world = launched()
    requests = Requests(world)
    requests.start()
    events: list[tuple[int, str]] = []
    group = world.group("requests")
    assert group is not None
    for step in range(1, num_steps + 1):
        time.sleep(step_s if world.rank == 0 else others_step_s)
        was_in_flight = requests.is_in_flight
        requests.receive()
        if was_in_flight and not requests.is_in_flight:
            events.append((step, "read"))
        num_before = _num_started(group)
        requests.send("train")
        if _num_started(group) != num_before:
            events.append((step, "start"))
    requests.finish()
    world.shutdown()
    return events


def _num_started(group: dist.ProcessGroup) -> int:
    number: int = group._get_sequence_number_for_group()  # noqa: SLF001  # no public one
    return number


def test_the_schedule_is_the_same_on_ranks_whose_clocks_differ() -> None:
    ours, others = run_on_ranks(schedule, 2, 0.01, 150, 0.002)

    assert ours == others
    starts = [step for step, what in ours if what == "start"]
    reads = [step for step, what in ours if what == "read"]
    gaps = [after - before for before, after in itertools.pairwise(starts[3:])]
    # Rank 0's steps take some 11 ms here: 80 of them make a second.
    assert all(20 <= gap <= 90 for gap in gaps)
    for start, read in zip(starts, reads, strict=False):
        assert start < read
    in_flight = [read - start for start, read in zip(starts, reads, strict=False)]
    assert all(num_steps >= 4 for num_steps in in_flight[3:]), "time to arrive"


def asks_again(num_steps: int) -> list[str]:
    """The reasons that are agreed if rank 1 asks again before the exchange is read."""
    world = launched()
    requests = Requests(world)
    request = requests.register("swap")
    requests.start()
    reasons = []
    for step in range(num_steps):
        requests.receive()
        if request.take():
            reasons.append(request.reason())
        if world.rank == 1 and step in (4, 5):
            request.ask(f"asked after step {step}")
        time.sleep(0.6)  # so long that each step ends with an exchange
        requests.send("train")
    requests.finish()
    world.shutdown()
    return reasons


def test_a_request_keeps_its_reason_if_there_is_another_one_meanwhile() -> None:
    expected = ["asked after step 4", "asked after step 5"]

    assert run_on_ranks(asks_again, 2, 9) == [expected] * 2


def registers_at_other_steps() -> None:
    """Both ranks register the same names, but not between the same exchanges."""
    world = launched()
    requests = Requests(world)
    requests.start()
    for step in range(20):
        requests.receive()
        if step == (2 if world.rank == 0 else 8):
            requests.register("mine")
        time.sleep(0.2)
        requests.send("train")


def test_names_that_are_registered_at_other_steps_are_an_error() -> None:
    with pytest.raises(RankError, match="ranks disagree on the registered requests"):
        run_on_ranks(registers_at_other_steps, 2)


class RegistersOnRankZero(RankZeroCallback[TinyTrainer]):
    def pre_fit(self) -> None:
        self.trainer.requests.register("mine")


def registers_otherwise(root: str) -> None:
    TinyTrainer(tiny_config(root, [RegistersOnRankZero()])).fit()


def test_ranks_that_register_other_names_are_told_who_registered_what(tmp_path: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(registers_otherwise, 2, str(tmp_path))

    for text in caught.value.tracebacks.values():
        assert "ranks disagree on the registered requests" in text
        assert "rank 0: ['mine', 'save', 'stop']" in text


def test_with_one_rank_a_request_is_agreed_at_once() -> None:
    requests = Requests(World(DeviceParameters.SINGLE_DEVICE(device="cpu")))
    one, other = requests.register("save"), requests.register("save")
    requests.start()

    one.ask("now")

    assert one.take()
    assert other.take(), "each handle learns of it"
    assert not one.take()
    assert other.reason() == "now"


def test_what_an_earlier_run_asked_for_is_forgotten() -> None:
    requests = Requests(World(DeviceParameters.SINGLE_DEVICE(device="cpu")))
    request = requests.register("save")
    requests.ask("save")

    requests.forget()
    requests.start()

    assert not request.take()
    request.ask()
    assert request.take()


def raised_by(function: Callable[[], object]) -> str:
    with pytest.raises((KeyError, ValueError)) as caught:
        function()
    return str(caught.value)


def test_a_name_that_isnt_registered_is_refused_with_those_that_are() -> None:
    requests = Requests(World(DeviceParameters.SINGLE_DEVICE(device="cpu")))

    assert "'swop' isn't registered; stop, save are" in raised_by(lambda: requests.ask("swop"))


def test_more_names_than_an_exchange_holds_are_refused() -> None:
    requests = Requests(World(DeviceParameters.SINGLE_DEVICE(device="cpu")))
    for number in range(30):
        requests.register(f"request {number}")

    assert "holds 32 names" in raised_by(lambda: requests.register("one more"))
