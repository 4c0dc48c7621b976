"""Coordination: an error of one rank is raised on all, and none waits forever."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import run_on_ranks
from dream_trainer.world import Coordination, RankFailure, World, coordination


def launched(train_timeout_s: float = 300.0) -> tuple[World, Coordination]:
    world = World(DeviceParameters(device="cpu", train_timeout_s=train_timeout_s))
    world.launch()
    return world, Coordination(world, "test")


def fails_on(*ranks: int, error: Callable[[], Exception] | None = None) -> Callable[[], int]:
    def function() -> int:
        if int(os.environ.get("RANK", "0")) in ranks:
            raise error() if error else OSError(28, "No space left on device", "/disk")
        return 5

    return function


NO_SPACE = "OSError: [Errno 28] No space left on device: '/disk'"


def raised_by(call: Callable[[], Any]) -> tuple[str, str]:
    """Message of a RankFailure, and the type of its cause."""
    with pytest.raises(RankFailure) as caught:
        call()
    return str(caught.value), type(caught.value.__cause__).__name__


def errors_of_all_ways(failing_rank: int) -> list[tuple[str, str]]:
    _, ranks = launched()
    on_failing, on_zero = fails_on(failing_rank), fails_on(0)
    return [
        raised_by(lambda: ranks.each(on_failing)),
        raised_by(lambda: ranks.each_without_timeout(on_failing)),
        raised_by(lambda: ranks.gather(on_failing)),
        raised_by(lambda: ranks.on_rank_zero(on_zero)),
        raised_by(lambda: ranks.via_rank_zero(1, lambda values: [on_zero()] * len(values))),
    ]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_an_error_of_one_rank_is_raised_on_all(num_ranks: int) -> None:
    last = num_ranks - 1
    results = run_on_ranks(errors_of_all_ways, num_ranks, last)

    for rank, found in enumerate(results):
        failing = [last, last, last, 0, 0]
        assert found == [
            (f"rank {failed}: {NO_SPACE}", "OSError" if rank == failed else "NoneType")
            for failed in failing
        ]


def errors_of_the_world() -> list[tuple[str, str]]:
    world, _ = launched()
    return [
        raised_by(lambda: world.each(fails_on(1))),
        raised_by(lambda: world.on_rank_zero(fails_on(0))),
    ]


def test_the_world_raises_an_error_of_one_rank_on_all() -> None:
    assert run_on_ranks(errors_of_the_world, 2) == [
        [(f"rank 1: {NO_SPACE}", "NoneType"), (f"rank 0: {NO_SPACE}", "OSError")],
        [(f"rank 1: {NO_SPACE}", "OSError"), (f"rank 0: {NO_SPACE}", "NoneType")],
    ]


def test_in_a_world_of_one_the_message_names_no_rank() -> None:
    (found,) = run_on_ranks(errors_of_all_ways, 1, 0)

    assert found == [(NO_SPACE, "OSError")] * 5


def test_in_a_world_of_one_the_world_calls_the_function_directly() -> None:
    world = World(DeviceParameters(device="cpu"))
    value = object()

    assert world.each(lambda: value) is value
    assert world.on_rank_zero(lambda: value) is value
    with pytest.raises(ZeroDivisionError):
        world.each(lambda: 1 // 0)


def errors_of_several() -> list[str]:
    _, ranks = launched()

    def own_error() -> None:
        raise KeyError(ranks.rank)

    return [
        raised_by(lambda: ranks.each(fails_on(0, 1, 2)))[0],
        raised_by(lambda: ranks.each(own_error))[0],
        raised_by(lambda: ranks.each(lambda: ranks.each(fails_on(1))))[0],
    ]


def test_the_message_has_the_errors_by_rank() -> None:
    results = run_on_ranks(errors_of_several, 6)

    assert all(found == results[0] for found in results)
    same, different, nested = results[0]
    assert same == f"rank 0–2: {NO_SPACE}"
    assert different == "; ".join(f"rank {n}: KeyError: {n}" for n in range(4)) + "; and 2 more"
    assert nested == f"rank 1: {NO_SPACE}", "an error of all ranks names its ranks already"


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("has a lock")
        self.lock = threading.Lock()


def with_what_cannot_be_pickled() -> list[tuple[str, str]]:
    _, ranks = launched()
    lock = threading.Lock()
    own = lock if ranks.rank == 1 else None
    found = [
        raised_by(lambda: ranks.each(fails_on(1, error=Unpicklable))),
        raised_by(lambda: ranks.gather(lambda: own)),
        raised_by(lambda: ranks.on_rank_zero(lambda: lock)),
        raised_by(lambda: ranks.via_rank_zero(own, lambda values: values)),
        raised_by(lambda: ranks.via_rank_zero(1, lambda values: [lock] * len(values))),
        raised_by(lambda: ranks.via_rank_zero(1, lambda values: values[1:])),
        raised_by(lambda: ranks.agree({"lock": own})),
        raised_by(lambda: ranks.agree({"lock": lock})),
    ]
    assert ranks.gather(lambda: ranks.rank) == [0, 1], "the ranks are still in step"
    return found


def test_a_value_that_cannot_be_pickled_is_an_error_on_all_ranks() -> None:
    first, second = run_on_ranks(with_what_cannot_be_pickled, 2)

    assert [text for text, _ in first] == [text for text, _ in second]
    no_lock = "TypeError: cannot pickle '_thread.lock' object"
    assert first == [
        ("rank 1: Unpicklable: has a lock", "NoneType"),
        (f"rank 1: {no_lock}", "NoneType"),
        (f"rank 0: {no_lock}", "TypeError"),
        (f"rank 1: {no_lock}", "NoneType"),
        (f"rank 0: {no_lock}", "TypeError"),
        (
            "rank 0: there are 1 answers for 2 ranks; the function must return one for each rank",
            "ValueError",
        ),
        (f"rank 1: {no_lock}", "NoneType"),
        (f"rank 0, 1: {no_lock}", "TypeError"),
    ]
    assert second[0] == ("rank 1: Unpicklable: has a lock", "Unpicklable")


def results() -> list[Any]:
    world, ranks = launched()
    rank = ranks.rank
    return [
        ranks.each(lambda: rank),
        ranks.each_without_timeout(lambda: rank),
        ranks.gather(lambda: {"rank": rank}),
        ranks.gather(lambda: "ab" * rank),
        ranks.on_rank_zero(lambda: f"from {rank}"),
        ranks.on_rank_zero(lambda: None),
        ranks.via_rank_zero(rank, lambda values: ["x" * (value * 10) for value in values]),
        world.each(lambda: rank),
        world.on_rank_zero(lambda: f"from {rank}"),
    ]


def test_each_method_returns_the_documented_result() -> None:
    found = run_on_ranks(results, 2)

    both = [{"rank": 0}, {"rank": 1}]
    assert found[0] == [0, 0, both, ["", "ab"], "from 0", None, "", 0, "from 0"]
    assert found[1] == [1, 1, both, ["", "ab"], "from 0", None, "x" * 10, 1, "from 0"]


def test_in_a_world_of_one_nothing_is_pickled() -> None:
    _, ranks = launched()
    lock = threading.Lock()

    assert ranks.each(lambda: lock) is lock
    assert ranks.each_without_timeout(lambda: lock) is lock
    assert ranks.gather(lambda: lock) == [lock]
    assert ranks.on_rank_zero(lambda: lock) is lock
    assert ranks.via_rank_zero(lock, lambda values: values) is lock
    ranks.agree({"lock": lock})
    assert not dist.is_initialized()


def slow_rank() -> float:
    """Rank 1 takes longer than the timeout of collectives."""
    world, ranks = launched(train_timeout_s=1.0)
    world.barrier()  # both have started
    world.tighten_timeouts()
    coordination._HEARTBEAT_S = 0.2  # noqa: SLF001
    began_s = time.monotonic()
    ranks.each_without_timeout(lambda: time.sleep(2.5 * ranks.rank))
    return time.monotonic() - began_s


def test_a_slow_function_may_take_longer_than_a_collective() -> None:
    first, second = run_on_ranks(slow_rank, 2)

    assert first == pytest.approx(second, abs=0.5)
    assert first >= 2.5


def two_threads() -> list[int]:
    """A thread and the main thread with a group each, in another order on each rank."""
    world, ranks = launched()
    in_thread = Coordination(world, "in a thread")
    found: list[int] = []

    def sum_of_ranks() -> None:
        time.sleep(0.1 * world.rank)
        found.extend(sum(in_thread.gather(lambda: world.rank)) for _ in range(20))

    thread = threading.Thread(target=sum_of_ranks)
    thread.start()
    for step in range(20):
        assert ranks.gather(lambda step=step: step) == [step, step]
    thread.join()
    return found


def test_each_thread_has_its_own_group() -> None:
    assert run_on_ranks(two_threads, 2) == [[1] * 20] * 2


class Sent:
    """Counts the collectives of this process, and the bytes that a rank sends."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        for name in ("all_reduce", "all_gather", "broadcast", "gather", "scatter"):
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            own = args[0] if name == "all_gather" else tensor
            self.calls.append((name, own.nbytes))
            return collective(tensor, *args, **kwargs)

        return call

    def take(self) -> list[tuple[str, int]]:
        calls, self.calls = self.calls, []
        return calls


def exchanges() -> dict[str, Any]:
    world, ranks = launched()
    world.group()
    sent, large = Sent(), {f"parameter {n}": "x" * 100 for n in range(1000)}
    found: dict[str, Any] = {}

    def note(name: str, call: Callable[[], Any]) -> None:
        call()
        found[name] = sent.take()

    note("each", lambda: ranks.each(lambda: large))
    note("equal", lambda: world.agree(large))
    # Each rank fills it in another order; sets of text are ordered differently in each process.
    names = list(large)[:: 1 if world.rank else -1]
    note("other order", lambda: world.agree({"d": dict.fromkeys(names), "s": set(names)}))
    note("equal, of other types", lambda: world.agree(1 if world.rank else 1.0))
    note("a flag", lambda: world.any_rank(False))
    return found


def test_equal_values_are_compared_only_by_digests() -> None:
    for found in run_on_ranks(exchanges, 2):
        digests = [("all_reduce", 72)]
        assert found["equal"] == digests
        assert found["other order"] == digests
        assert found["equal, of other types"][:1] == digests
        assert len(found["equal, of other types"]) == 3
        assert found["each"] == [("all_gather", 8)]
        assert found["a flag"] == [("all_reduce", 8)]


class Box:
    """Compares by its content, and pickles in an order that differs between processes."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Box) and sorted(other.names) == sorted(self.names)

    def __repr__(self) -> str:
        return f"Box({self.names})"

    __hash__ = None  # type: ignore[assignment]  # as for a list


def disagreements() -> list[str]:
    world, _ = launched()
    rank = world.rank
    world.agree(Box(["a", "b"] if rank else ["b", "a"]), "the box")
    world.agree(float("nan"))
    cases: list[tuple[Any, str | None]] = [
        (rank, "the rank"),
        (rank, None),
        ({"same": 1, "other": rank}, None),
        ({"same": 1, "other": rank}, "the dict"),
        ({"same": 1} if rank else {"same": 1, "more": 2}, None),
        ([1, 2] if rank else (1, 2), "kinds"),
        ([["a"], "b"] if rank else [["a", "b"]], "nested"),
        (Box(["a"] * rank), "the box"),
    ]
    messages = []
    for value, what in cases:
        with pytest.raises(ValueError, match="ranks disagree on") as caught:
            world.agree(value, what)
        messages.append(str(caught.value))
    return messages


def test_disagreement_is_an_error_with_the_values_by_rank() -> None:
    first, second = run_on_ranks(disagreements, 2)

    assert first == second
    starts = [
        "ranks disagree on the rank:\n  rank 0: 0\n  rank 1: 1\n",
        "ranks disagree on a value:\n  rank 0: 0\n  rank 1: 1\n",
        "ranks disagree on other:\n  rank 0: 0\n  rank 1: 1\n",
        "ranks disagree on the dict:\n  rank 0: {'same': 1, 'other': 0}\n",
        "ranks disagree on more:\n  rank 0: 2\n  rank 1: nothing\n",
        "ranks disagree on kinds:\n  rank 0: (1, 2)\n  rank 1: [1, 2]\n",
        "ranks disagree on nested:\n  rank 0: [['a', 'b']]\n  rank 1: [['a'], 'b']\n",
        "ranks disagree on the box:\n  rank 0: Box([])\n  rank 1: Box(['a'])\n",
    ]
    for message, start in zip(first, starts, strict=True):
        assert message.startswith(start)
    assert all("same:" not in message for message in first)


def flags() -> dict[str, tuple[bool, ...]]:
    world, _ = launched()
    rank = world.rank
    element = torch.tensor([rank == 1, True])
    return {
        "any": (world.any_rank(rank == 1), world.any_rank(True), world.any_rank(False)),
        "all": (world.all_ranks(rank == 1), world.all_ranks(True), world.all_ranks(False)),
        "tensors": (world.any_rank(element), world.all_ranks(element)),
    }


def test_a_condition_holds_on_any_or_on_all_ranks() -> None:
    for found in run_on_ranks(flags, 2):
        assert found == {
            "any": (True, True, False),
            "all": (False, True, False),
            "tensors": (True, False),
        }
