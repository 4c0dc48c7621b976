"""BatchCadence: at which steps values of training batches are logged."""

from __future__ import annotations

from dream_trainer.callbacks import Every


class BatchCadence:
    """Tells once per n batches that a step is due: the one that contains the n-th batch.

    Args:
        every: Number of batches.
        num_batches: Batches of this rank so far.
        with_first: Whether the step that contains the first batch of the run is due, too.
    """

    def __init__(self, every: int, num_batches: int, *, with_first: bool = False) -> None:
        self._cadence = Every(steps=every).start(num_batches)
        self._first_is_ahead = with_first and num_batches == 0

    def due(self, num_batches: int) -> bool:
        """Whether the step that has just been made is due. Call it once per step."""
        is_first, self._first_is_ahead = self._first_is_ahead, False
        return self._cadence.due(num_batches) or is_first


def check_cadence(name: str, value: int | None) -> None:
    """Validate a number of batches.

    Raises:
        ValueError: If it is neither None nor a whole number of at least 1.
    """
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value is not None and not is_count:
        raise ValueError(f"{name}={value!r}: a whole number of at least 1 is required, or None")
