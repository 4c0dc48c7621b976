"""Errors of one rank of a checkpoint are CheckpointErrors on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dream_callbacks.checkpoint import CheckpointError
from dream_callbacks.checkpoint.manager import coordination
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import run_on_ranks
from dream_trainer.world import World


def errors(error: Exception) -> list[tuple[str, str]]:
    """Message and type of the cause, for each method of Coordination; the last rank fails."""
    world = World(DeviceParameters(device="cpu"))
    world.launch()
    ranks = coordination(world)
    is_last = world.rank == world.world_size - 1

    def fail(*values: Any) -> Any:
        raise error

    def fail_on_last() -> None:
        if is_last:
            raise error

    calls: list[Callable[[], Any]] = [
        lambda: ranks.each(fail_on_last),
        lambda: ranks.each_without_timeout(fail_on_last),
        lambda: ranks.gather(fail_on_last),
        lambda: ranks.on_rank_zero(fail),
        lambda: ranks.via_rank_zero(1, fail),
    ]
    found = []
    for call in calls:
        with pytest.raises(CheckpointError) as caught:
            call()
        found.append((str(caught.value), type(caught.value.__cause__).__name__))
    return found


def test_an_error_of_one_rank_is_a_checkpoint_error_on_all() -> None:
    first, second = run_on_ranks(errors, 2, PermissionError("/disk"))

    text, cause = "PermissionError: /disk", "PermissionError"
    assert first == [(f"rank 1: {text}", "NoneType")] * 3 + [(f"rank 0: {text}", cause)] * 2
    assert second == [(f"rank 1: {text}", cause)] * 3 + [(f"rank 0: {text}", "NoneType")] * 2


def test_in_one_process_the_message_names_no_rank() -> None:
    (found,) = run_on_ranks(errors, 1, PermissionError("/disk"))

    assert found == [("PermissionError: /disk", "PermissionError")] * 5


def test_a_checkpoint_error_keeps_its_message_without_its_type() -> None:
    first, second = run_on_ranks(errors, 2, CheckpointError("another run saves there"))

    messages = [f"rank {rank}: another run saves there" for rank in (1, 1, 1, 0, 0)]
    assert [message for message, _ in first] == [message for message, _ in second] == messages
