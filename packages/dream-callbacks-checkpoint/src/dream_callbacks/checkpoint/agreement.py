"""Agreement: what one rank wants becomes known to all at the same step, about once a second.

Clocks and signals differ between ranks, and a save needs all of them. Asking at every step would
cost an exchange per step; here the ranks agree also on how many steps to go until the next one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from dream_trainer.world import Coordination

_INTERVAL_S = 1.0
_MAX_STEPS = 10_000


@dataclass
class Wishes:
    """What ranks may want.

    Attributes:
        save: Some rank was asked to save by a signal.
        time_is_up: Rank 0's clock says that a save is due.
        failed: A save in the background has failed.
    """

    save: bool = False
    time_is_up: bool = False
    failed: bool = False


class Agreement:
    """Gathers the wishes of the ranks. Each rank calls `poll` at the same steps.

    Args:
        ranks: Who agrees.
    """

    def __init__(self, ranks: Coordination) -> None:
        self._ranks = ranks
        self._wishes = Wishes()
        self._steps_to_go = 1
        self._steps_since = 0
        self._asked_at_s = time.monotonic()

    def poll(self, *, save: bool = False, time_is_up: bool = False, failed: bool = False) -> Wishes:
        """What some rank has wanted since the last exchange; nothing between two exchanges.

        In a world of one there is nobody to ask, so that wishes come back at once.
        """
        if self._ranks.world_size == 1:
            return Wishes(save, time_is_up, failed)
        wishes = self._wishes
        wishes.save |= save
        wishes.time_is_up |= time_is_up
        wishes.failed |= failed
        self._steps_to_go -= 1
        self._steps_since += 1
        if self._steps_to_go > 0:
            return Wishes()
        agreed = self._ranks.maximum(
            [
                int(wishes.save),
                int(wishes.time_is_up and self._ranks.is_global_zero),
                int(wishes.failed),
                self._next_steps() if self._ranks.is_global_zero else 0,
            ]
        )
        self._wishes = Wishes()
        self._steps_to_go, self._steps_since = agreed[3], 0
        self._asked_at_s = time.monotonic()
        return Wishes(*map(bool, agreed[:3]))

    def forget(self) -> None:
        """Drop what was wanted and not yet agreed on: a save has just been made for all."""
        self._wishes = Wishes(failed=self._wishes.failed)

    def _next_steps(self) -> int:
        """How many steps take about as long as should pass between two exchanges."""
        elapsed_s = time.monotonic() - self._asked_at_s
        steps = self._steps_since * _INTERVAL_S / max(elapsed_s, 1e-6)
        return min(max(int(steps), 1), _MAX_STEPS)
