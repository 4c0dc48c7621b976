"""EarlyExchange: ranks agree through their store on an earlier tick for the next exchange.

The schedule of `Requests` assumes that ticks (steps, validation batches) take as long as before. If
they suddenly take longer, a rank whose request waits announces it in the store. The monitor thread
of each rank then answers with the tick that its main thread completes next. The next event (the
start or the read of an exchange) happens at the latest of these ticks, unless the schedule is
earlier. A main thread that completes its own tick before all ranks have answered waits for them,
since it may be the latest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dream_trainer.world.faults.failure_store import FailureStore

_MAX_BEHIND = 3
"""Events by which the rank that announced can be behind this one; it can be one ahead."""
_NUM_KEPT = 16
"""Past events whose ticks are kept; more than can happen during a poll."""


class EarlyExchange:
    """The events of one run. All ranks count the same ticks and events.

    Args:
        store: Of all ranks.
        run: Number of the run, for the keys.
        is_late: Whether a request of this rank waits too long if a tick takes so many seconds.
    """

    def __init__(self, store: FailureStore, run: int, is_late: Callable[[float], bool]) -> None:
        self._store = store
        self._run = run
        self._is_late = is_late
        self._lock = threading.Lock()
        self._tick = 0
        self._tick_s = time.perf_counter()
        self._duration_s = 0.0  # of the last tick
        self._event = 0  # the next one
        self._happened: dict[int, int] = {}  # ticks of the last events
        self._answers: dict[int, int] = {}  # this rank's, by event
        self._agreed: dict[int, int] = {}  # ticks, by event
        self._looked_at = (0, 0)

    # Main thread

    def tick(self) -> bool:
        """Complete a tick. Blocks at this rank's answer until all ranks have answered.

        Returns:
            Whether the next event happens now by agreement of all ranks.
        """
        now_s = time.perf_counter()
        with self._lock:
            self._tick += 1
            self._tick_s, self._duration_s = now_s, now_s - self._tick_s
            event = self._event
            answer = self._answers.get(event)
        if answer is None or self._tick < answer:
            return False
        while event not in self._agreed and not self._store.is_lost:
            time.sleep(0.005)
        return self._tick == self._agreed.get(event)

    def happen(self) -> None:
        """Count the next event, which happens at this tick."""
        with self._lock:
            self._happened[self._event] = self._tick
            self._happened.pop(self._event - _NUM_KEPT, None)
            self._event += 1

    # Monitor thread

    @property
    def is_agreeing(self) -> bool:
        """Whether this rank has answered and not all others have."""
        return self._event in self._answers and self._event not in self._agreed

    def poll(self, num_questions: int) -> None:
        """Announce, answer, and read the answers, if there is a reason to.

        Args:
            num_questions: `FailureStore.num_questions()`.
        """
        event = self._event
        if event not in self._answers and self._is_late(self._pace_s()):
            self._answer(event)
            self._store.count("questions")
        if num_questions and (num_questions, event) != self._looked_at:
            for each in range(max(event - _MAX_BEHIND, 0), event + 2):
                if each not in self._answers and self._store.early_answers(self._run, each):
                    self._answer(each)
            self._looked_at = (num_questions, event)
        if self.is_agreeing:
            self._read_answers(event)

    def _pace_s(self) -> float:
        """Duration of the last tick, or of the current one if that takes longer already."""
        return max(self._duration_s, time.perf_counter() - self._tick_s)

    def _answer(self, event: int) -> None:
        with self._lock:
            answer = self._happened.get(event, self._tick + 1)
            self._answers[event] = answer
        self._store.answer_early(self._run, event, answer)

    def _read_answers(self, event: int) -> None:
        answers = self._store.early_answers(self._run, event)
        if len(answers) == self._store.world_size:
            self._agreed[event] = max(answers)
