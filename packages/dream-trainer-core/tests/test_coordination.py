"""What ranks do together: an error of one is known to all, and nobody waits for ever."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from dream_callbacks.checkpoint import CheckpointError
from dream_callbacks.checkpoint.agreement import Agreement, Wishes
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import run_on_ranks
from dream_trainer.world import World
from dream_trainer.world import coordination as ranks_module
from dream_trainer.world.coordination import Ranks


def launched(train_timeout_s: float = 300.0) -> tuple[World, Ranks]:
    world = World(DeviceParameters(device="cpu", train_timeout_s=train_timeout_s))
    world.launch()
    return world, Ranks(world, "checkpoint")


def fails_on(rank: int) -> Any:
    def function() -> int:
        if int(os.environ.get("RANK", "0")) == rank:
            raise OSError(28, "No space left on device", "/disk")
        return 5

    return function


def errors_of_all_ways(failing_rank: int) -> list[str]:
    """What each way of working together says, on this rank."""
    _, ranks = launched()
    messages = []
    for call in (
        lambda: ranks.each(fails_on(failing_rank)),
        lambda: ranks.each_slowly(fails_on(failing_rank)),
        lambda: ranks.gather(fails_on(failing_rank)),
        lambda: ranks.on_zero(fails_on(0)),
        lambda: ranks.via_zero(1, lambda values: [fails_on(0)()] * len(values)),
    ):
        with pytest.raises(CheckpointError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    first, second = run_on_ranks(errors_of_all_ways, 2, 1)

    assert first == second
    text = "OSError: [Errno 28] No space left on device: '/disk'"
    assert first == [f"rank 1: {text}"] * 3 + [f"rank 0: {text}"] * 2


def test_alone_the_error_names_no_rank() -> None:
    ((*messages,),) = run_on_ranks(errors_of_all_ways, 1, 0)

    assert set(messages) == {"OSError: [Errno 28] No space left on device: '/disk'"}


def answers() -> list[Any]:
    _, ranks = launched()
    rank = ranks.rank
    return [
        ranks.each(lambda: rank),
        ranks.each_slowly(lambda: rank),
        ranks.gather(lambda: rank),
        ranks.on_zero(lambda: f"from {rank}"),
        ranks.via_zero(rank, lambda values: [value * 10 for value in values]),
        ranks.maximum([rank, -rank]),
        ranks.all_gather("ab"[rank]),
        ranks.broadcast(rank),
    ]


def test_each_way_gives_what_it_says() -> None:
    found = run_on_ranks(answers, 2)

    assert found[0] == [0, 0, [0, 1], "from 0", 0, [1, 0], ["a", "b"], 0]
    assert found[1] == [1, 1, [0, 1], "from 0", 10, [1, 0], ["a", "b"], 0]


def slow_rank() -> float:
    """Rank 1 takes longer than a collective may."""
    world, ranks = launched(train_timeout_s=1.0)
    world.tighten_timeouts()
    ranks_module._BEAT_S = 0.2  # noqa: SLF001
    began_s = time.monotonic()
    ranks.each_slowly(lambda: time.sleep(2.5 * ranks.rank))
    return time.monotonic() - began_s


def test_what_takes_long_may_take_longer_than_a_collective() -> None:
    first, second = run_on_ranks(slow_rank, 2)

    assert first == pytest.approx(second, abs=0.5)
    assert first >= 2.5


def polled(num_steps: int, wishes: dict[int, dict[int, str]]) -> list[tuple[int, Wishes]]:
    """Steps at which something was agreed on; what a rank wants, by rank and step."""
    _, ranks = launched()
    agreement = Agreement(ranks)
    own = wishes.get(ranks.rank, {})
    found = []
    for step in range(num_steps):
        time.sleep(0.02)
        name = own.get(step)
        agreed = agreement.poll(**({name: True} if name else {}))
        if agreed != Wishes():
            found.append((step, agreed))
    return found


@pytest.mark.parametrize("name", ["save", "failed"])
def test_what_one_rank_wants_is_known_to_all_at_the_same_step(name: str) -> None:
    first, second = run_on_ranks(polled, 2, 160, {1: {5: name}})

    assert first == second
    ((step, agreed),) = first
    assert 5 <= step < 160
    assert agreed == Wishes(**{name: True})


def test_the_clock_of_rank_0_counts() -> None:
    first, second = run_on_ranks(polled, 2, 120, {1: {0: "time_is_up"}})
    assert first == second == []

    first, second = run_on_ranks(polled, 2, 120, {0: {0: "time_is_up"}})
    assert first == second == [(0, Wishes(time_is_up=True))]


def test_alone_a_wish_is_granted_at_once() -> None:
    (found,) = run_on_ranks(polled, 1, 10, {0: {3: "save", 7: "time_is_up"}})

    assert found == [(3, Wishes(save=True)), (7, Wishes(time_is_up=True))]
