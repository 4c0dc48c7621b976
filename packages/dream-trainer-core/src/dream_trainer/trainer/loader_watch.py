"""LoaderWatch: warns when the loop waits long for a loader."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dream_trainer.world.faults.failure import place_of_main_thread

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0


class LoaderWatch:
    """Warns when a batch doesn't arrive, and again each time the wait has doubled.

    Collective timeouts don't detect it: in one process there are none, and when a shared disk hangs
    all ranks wait. It is not an error, since the first batch of a large data set may be slow; for
    that there is `DataLoader(timeout=…)`.

    Args:
        rank: This rank.
        patience_s: Seconds before the first warning.

    Attributes:
        waits_for: The loader's name and the batch's index while the main thread waits; set to a
            new tuple before each `next`, and to None afterwards.
    """

    def __init__(self, rank: int = 0, patience_s: float | None = None) -> None:
        self.waits_for: tuple[str, int] | None = None
        self._rank = rank
        self._patience_s = PATIENCE_S if patience_s is None else patience_s

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Run a thread inside that warns."""
        has_ended = threading.Event()
        thread = threading.Thread(
            target=self._watch, args=(has_ended,), name="loader-watch", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            has_ended.set()
            thread.join()

    def _watch(self, has_ended: threading.Event) -> None:
        last, since_s, limit_s = None, 0.0, 0.0
        while not has_ended.wait(self._patience_s / 10):
            waits_for = self.waits_for
            if waits_for is None or waits_for is not last:
                last, since_s, limit_s = waits_for, time.monotonic(), self._patience_s
            elif time.monotonic() - since_s >= limit_s:
                name, position = waits_for
                logger.warning(
                    "rank %d has been waiting for batch %d of the %s loader for %.0f s, in %s; if "
                    "it should be an error, give the loader a timeout: DataLoader(timeout=…)",
                    self._rank,
                    position,
                    name,
                    time.monotonic() - since_s,
                    place_of_main_thread(),
                )
                limit_s *= 2
