"""What ranks want becomes known to all of them at the same step."""

from __future__ import annotations

import time

import pytest

from dream_callbacks.checkpoint.agreement import Agreement, Wishes
from dream_callbacks.checkpoint.coordination import coordination
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import run_on_ranks
from dream_trainer.world import World


def polled(num_steps: int, wishes: dict[int, dict[int, str]]) -> list[tuple[int, Wishes]]:
    """Steps at which something was agreed on; what a rank wants, by rank and step."""
    world = World(DeviceParameters(device="cpu"))
    world.launch()
    ranks = coordination(world)
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
