"""FailureStore: the keys in the ranks' store that report failures and exits."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from dream_trainer.world.faults.failure import Failure

if TYPE_CHECKING:
    from torch.distributed import Store

MAX_REQUESTS_PER_S = 5000
"""Store requests per second that all ranks together may send."""
_ANSWER_S = 3.0
_PLACES_S = 1.0
_STARTED_AT_S = time.time()
_OLDER_S = 2.0


class FailureStore:
    """The first failure of a run, and which ranks know it, in the store of all ranks.

    If the store is gone, methods set `is_lost` instead of raising.

    Args:
        store: Cloned to get a connection of its own: a client handles one request at a time, and
            the process group's may block for long.
        world_size: Number of ranks.
    """

    def __init__(self, store: Store, world_size: int) -> None:
        self.client: Store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        self.client.set_timeout(timedelta(seconds=_ANSWER_S))
        self.is_lost = False
        self.world_size = world_size
        # torchrun keeps the keys of an earlier attempt with another number of nodes.
        self._stale = b""
        with self.may_be_lost():
            if self.client.check(["first"]):
                found = self.client.get("first")
                if _failure(found).time_s < _STARTED_AT_S - _OLDER_S:
                    self._stale = found

    def first(self, *, wait_s: float = 0.0) -> Failure | None:
        """The first failure, if there is one; polls for it up to `wait_s`."""
        give_up_s = time.monotonic() + wait_s
        while True:
            with self.may_be_lost():
                if self.client.check(["first"]):
                    found = self.client.get("first")
                    if found != self._stale:
                        return _failure(found)
            if self.is_lost or time.monotonic() >= give_up_s:
                return None
            time.sleep(0.05)

    def publish(self, failure: Failure) -> Failure:
        """Write a failure unless there is one already; returns the one in the store."""
        text = json.dumps(asdict(failure))
        record = text.encode()
        with self.may_be_lost():
            record = self.client.compare_set("first", self._stale.decode(), text)
        return _failure(record)

    def where_ranks_are(self) -> list[str]:
        """Ask all ranks where their main threads are; "no answer" for those that don't reply."""
        places = ["no answer"] * self.world_size
        keys = [f"place/{rank}" for rank in range(self.world_size)]
        with self.may_be_lost():
            self.client.set("where", "")
            self.client.add("questions", 1)
            give_up_s = time.monotonic() + _PLACES_S
            while not self.client.check(keys) and time.monotonic() < give_up_s:
                time.sleep(0.05)
            for rank, key in enumerate(keys):
                if self.client.check([key]):
                    places[rank] = self.client.get(key).decode()
        return places

    def num_questions(self) -> int:
        """Number of questions that ranks have asked all ranks: where they are, early exchanges."""
        return self.client.add("questions", 0)

    def answer_early(self, run: int, event: int, tick: int) -> None:
        """Add this rank's tick for an event of an early exchange."""
        self.client.append(f"early/{run}/{event}", f"{tick}\n")  # type: ignore[attr-defined]

    def early_answers(self, run: int, event: int) -> list[int]:
        """The ticks of the ranks that have answered so far, in any order."""
        key = f"early/{run}/{event}"
        if not self.client.check([key]):
            return []
        return [int(line) for line in self.client.get(key).split()]

    def is_asked_where(self) -> bool:
        """Whether a rank has asked where the others are."""
        return self.client.check(["where"])

    def tell_place(self, rank: int, place: str) -> None:
        """Answer `where_ranks_are`."""
        with self.may_be_lost():
            self.client.set(f"place/{rank}", place)

    def say_goodbye(self, rank: int, span: int) -> None:
        """Report that the exit of a rank in this span of the run is no failure from now on."""
        with self.may_be_lost():
            self.client.set(f"goodbye/{span}/{rank}", "")

    def has_said_goodbye(self, rank: int, span: int) -> bool:
        """Whether a rank has reported that it may exit."""
        return self.client.check([f"goodbye/{span}/{rank}"])

    def tell_termination(self, rank: int) -> None:
        """Report that SIGTERM is about to end a rank."""
        with self.may_be_lost():
            self.client.set(f"terminated/{rank}", "")

    def was_terminated(self, rank: int) -> bool:
        """Whether a rank has reported SIGTERM."""
        return self.client.check([f"terminated/{rank}"])

    def count(self, key: str) -> None:
        """Add one to the counter of a key."""
        with self.may_be_lost():
            self.client.add(key, 1)

    def wait_for_all(
        self, key: str, *, look: Callable[[], None] | None = None, limit_s: float = math.inf
    ) -> None:
        """Wait until all ranks have counted under a key, or time has passed.

        Args:
            key: As for `count`.
            look: Called on every poll; may raise.
            limit_s: Longest time to wait, in seconds.
        """
        give_up_s = time.monotonic() + limit_s
        while not self.is_lost and time.monotonic() < give_up_s:
            with self.may_be_lost():
                if self.client.add(key, 0) >= self.world_size:
                    return
            if look is not None:
                look()
            time.sleep(max(0.02, self.world_size / MAX_REQUESTS_PER_S))

    @contextlib.contextmanager
    def may_be_lost(self) -> Iterator[None]:
        """Around requests to the store: sets `is_lost` if it is gone."""
        try:
            yield
        except dist.DistError:
            self.is_lost = True


def _failure(record: bytes) -> Failure:
    return Failure(**json.loads(record))
