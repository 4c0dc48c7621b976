"""EarlyExchange: ranks agree through their store on an earlier tick for the next exchange.

The schedule of `Requests` assumes that ticks (steps, validation batches) take as long as before. If
they suddenly take longer, a rank whose request waits announces it in the store. The monitor thread
of each rank then answers with the tick that its main thread completes next, or with that of the
event (the start or the read of an exchange) if it has happened there. It happens after the latest
of these ticks, or as scheduled if that is not later. A main thread that completes its own tick
before all ranks have answered waits for them, since it may be the latest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dream_trainer.world.faults.failure_store import FailureStore

_NUM_KEPT = 16
"""Past events whose ticks are kept; more than can happen between an announcement and an answer."""
_LIMIT_S = 60.0
"""Longest wait for the answers of all ranks."""


class EarlyExchange:
    """The events of one run. All ranks count the same ticks and events.

    Args:
        store: This rank's client of the ranks' store.
        rank: This rank.
        run: Number of the run, for the keys.
        would_be_late: Whether a request of this rank would wait too long if ticks took so many
            seconds.
    """

    def __init__(
        self, store: FailureStore, rank: int, run: int, would_be_late: Callable[[float], bool]
    ) -> None:
        self._store = store
        self._rank = rank
        self._run = run
        self._would_be_late = would_be_late
        self._lock = threading.Lock()
        self._tick = 0
        self._tick_s = time.perf_counter()
        self._duration_s = 0.0  # of the last tick
        self._event = 0  # the next one
        self._happened: dict[int, int] = {}  # ticks of the last events
        self._answers: dict[int, int] = {}  # this rank's, by event
        self._agreed: dict[int, int] = {}  # ticks, by event
        self._num_questions = 0  # when the announcements were last read

    # Main thread

    def count_tick(self) -> None:
        """A tick is complete."""
        now_s = time.perf_counter()
        with self._lock:
            self._tick += 1
            self._tick_s, self._duration_s = now_s, now_s - self._tick_s

    def is_agreed_now(self) -> bool:
        """Whether all ranks agreed that the next event happens after this tick.

        Blocks from the tick that this rank has answered until all ranks have answered.

        Raises:
            RuntimeError: If they don't, or the store is gone: guessing could deadlock.
        """
        event = self._event
        answer = self._answers.get(event)
        if answer is None or self._tick < answer:
            return False
        give_up_s = time.monotonic() + _LIMIT_S
        while event not in self._agreed:
            if self._store.is_lost or time.monotonic() > give_up_s:
                why = "the ranks' store is gone" if self._store.is_lost else "some don't answer"
                raise RuntimeError(
                    f"rank {self._rank} can't find out after which step all ranks exchange their "
                    f"requests ({why}); look at the other ranks' output, and resume from the last "
                    "checkpoint"
                )
            time.sleep(0.005)
        return self._tick == self._agreed[event]

    def record_event(self) -> None:
        """The next event happens after this tick."""
        with self._lock:
            self._happened[self._event] = self._tick
            self._happened.pop(self._event - _NUM_KEPT, None)
            self._event += 1

    # Monitor thread

    @property
    def is_agreeing(self) -> bool:
        """Whether this rank has answered for the next event and doesn't know all answers."""
        return self._event in self._answers and self._event not in self._agreed

    def poll(self, num_questions: int) -> None:
        """Announce, answer, and read the answers, if there is a reason to.

        Args:
            num_questions: `FailureStore.num_questions()`.
        """
        event = self._event
        if event not in self._answers and self._would_be_late(self._pace_s()):
            self._answer(event)
            self._store.announce_early(self._run, event)
        if num_questions != self._num_questions:
            for announced in self._store.announced_early(self._run):
                if announced not in self._answers:
                    self._answer(announced)
            self._num_questions = num_questions
        if self.is_agreeing:
            self._read_answers(event)

    def _pace_s(self) -> float:
        """Duration of the last tick, or of the current one if that takes longer already."""
        return max(self._duration_s, time.perf_counter() - self._tick_s)

    def _answer(self, event: int) -> None:
        with self._lock:
            answer = self._happened.get(event, self._tick + 1)
            self._answers[event] = answer
        self._store.answer_early(self._run, event, self._rank, answer)

    def _read_answers(self, event: int) -> None:
        answers = self._store.early_answers(self._run, event)
        if len(answers) == self._store.world_size:
            self._agreed[event] = max(answers.values())
