"""The limit of open files fits the number of ranks."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import run_on_ranks
from dream_trainer.world import World
from dream_trainer.world.open_files import raise_open_file_limit


def limits_for(world_size: int, soft: int, hard: int) -> tuple[int, int]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    raise_open_file_limit(world_size)
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def test_the_soft_limit_is_raised_to_what_many_ranks_take() -> None:
    assert run_on_ranks(limits_for, 1, 2, 1024, 4096) == [(1024, 4096)]
    assert run_on_ranks(limits_for, 1, 300, 1024, 4096) == [(1756, 4096)]


def warnings_for(world_size: int, hard: int) -> list[str]:
    import logging

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dream_trainer.world.open_files").addHandler(handler)
    limits_for(world_size, hard, hard)
    return messages


def test_a_limit_that_is_too_low_is_warned_of() -> None:
    ((message,),) = run_on_ranks(warnings_for, 1, 1024, 4096)

    assert "1024 ranks take about 5376 open files each, and the limit is 4096" in message
    assert run_on_ranks(warnings_for, 1, 256, 4096) == [[]]


def sockets() -> tuple[int, int]:
    """Sockets of this process before, and with each group that a run makes."""
    world = World(DeviceParameters(device="cpu"))
    before = num_sockets()
    world.launch()
    for kind in ("control", "requests", "checkpoint-background"):
        world.group(kind)
    return before, num_sockets()


def num_sockets() -> int:
    return sum(file.is_socket() for file in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_sockets_of_a_run_are_fewer_than_what_is_allowed(num_ranks: int) -> None:
    for before, after in run_on_ranks(sockets, num_ranks):
        assert 3 * num_ranks < after - before < 5 * num_ranks + 16
