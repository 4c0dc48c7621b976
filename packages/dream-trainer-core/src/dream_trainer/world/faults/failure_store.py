"""FailureRecord: what the ranks write into their store about failing and ending."""

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

ASKS_PER_S = 5000
"""How often all ranks together may ask the store."""
_ANSWER_S = 3.0
_PLACES_S = 1.0
_STARTED_AT_S = time.time()
_OLDER_S = 2.0


class FailureRecord:
    """The first failure, and who knows of it, in the store of all ranks.

    Nothing raises if the store is gone: `is_lost` tells.

    Args:
        store: A connection of its own is made to it: a client waits for its answer before it asks
            again, and the process group's may wait for long.
        world_size: Number of ranks.
    """

    def __init__(self, store: Store, world_size: int) -> None:
        self.store: Store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
        self.store.set_timeout(timedelta(seconds=_ANSWER_S))
        self.is_lost = False
        self._world_size = world_size
        # torchrun keeps the keys of ranks that it started before, for another number of nodes.
        self._stale = b""
        with self.may_be_lost():
            if self.store.check(["first"]):
                found = self.store.get("first")
                if _failure(found).time_s < _STARTED_AT_S - _OLDER_S:
                    self._stale = found

    def first(self, *, wait_s: float = 0.0) -> Failure | None:
        """The first failure, if there is one; waits for it if asked to."""
        give_up_s = time.monotonic() + wait_s
        while True:
            with self.may_be_lost():
                if self.store.check(["first"]):
                    found = self.store.get("first")
                    if found != self._stale:
                        return _failure(found)
            if self.is_lost or time.monotonic() >= give_up_s:
                return None
            time.sleep(0.05)

    def publish(self, failure: Failure) -> Failure:
        """Write a failure down, if none is there; returns the one that is."""
        text = json.dumps(asdict(failure))
        record = text.encode()
        with self.may_be_lost():
            record = self.store.compare_set("first", self._stale.decode(), text)
        return _failure(record)

    def where_ranks_are(self) -> list[str]:
        """Ask all ranks where their main threads are; "no answer" of those that give none soon."""
        places = ["no answer"] * self._world_size
        keys = [f"place/{rank}" for rank in range(self._world_size)]
        with self.may_be_lost():
            self.store.set("where", "")
            give_up_s = time.monotonic() + _PLACES_S
            while not self.store.check(keys) and time.monotonic() < give_up_s:
                time.sleep(0.05)
            for rank, key in enumerate(keys):
                if self.store.check([key]):
                    places[rank] = self.store.get(key).decode()
        return places

    def is_asked_where(self) -> bool:
        """Whether a rank wants to know where the others are."""
        return self.store.check(["where"])

    def tell_place(self, rank: int, place: str) -> None:
        """Answer `where_ranks_are`."""
        with self.may_be_lost():
            self.store.set(f"place/{rank}", place)

    def say_goodbye(self, rank: int, span: int) -> None:
        """Note that a rank may end from here on, in a span of the run, without being missed."""
        with self.may_be_lost():
            self.store.set(f"goodbye/{span}/{rank}", "")

    def has_said_goodbye(self, rank: int, span: int) -> bool:
        """Whether a rank may have ended by itself."""
        return self.store.check([f"goodbye/{span}/{rank}"])

    def tell_termination(self, rank: int) -> None:
        """Note that SIGTERM is about to end a rank."""
        with self.may_be_lost():
            self.store.set(f"terminated/{rank}", "")

    def was_terminated(self, rank: int) -> bool:
        """Whether SIGTERM ended a rank."""
        return self.store.check([f"terminated/{rank}"])

    def count(self, key: str) -> None:
        """Add one."""
        with self.may_be_lost():
            self.store.add(key, 1)

    def wait_for_all(
        self, key: str, *, look: Callable[[], None] | None = None, limit_s: float = math.inf
    ) -> None:
        """Wait until all ranks have counted under a key, or time has passed.

        Args:
            key: As for `count`.
            look: Called again and again; may raise.
            limit_s: Seconds to wait at most.
        """
        give_up_s = time.monotonic() + limit_s
        while not self.is_lost and time.monotonic() < give_up_s:
            with self.may_be_lost():
                if self.store.add(key, 0) >= self._world_size:
                    return
            if look is not None:
                look()
            time.sleep(max(0.02, self._world_size / ASKS_PER_S))

    @contextlib.contextmanager
    def may_be_lost(self) -> Iterator[None]:
        """Where the store is asked: if it is gone, that is noted and nothing else."""
        try:
            yield
        except dist.DistError:
            self.is_lost = True


def _failure(record: bytes) -> Failure:
    return Failure(**json.loads(record))
