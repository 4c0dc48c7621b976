"""Number of samples in a batch, found in the batch itself."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

_LEAVES = frozenset({str, bytes, int, float, bool, complex, type(None)})
"""Types that are passed over in long lists of ids or texts, at the cost of one look-up."""

_MAX_CHECKS = 64
"""Batches whose sizes are compared; one of each number of samples is enough."""


class SampleCounter:
    """Counts the samples of batches, and warns once where that is doubtful.

    Args:
        trainer_name: Class of the trainer, for the warning.
        warns: Whether this rank warns.
    """

    def __init__(self, trainer_name: str, *, warns: bool) -> None:
        self._trainer_name = trainer_name
        self._checks = warns
        self._checked: set[int] = set()

    def count(self, batch: Any) -> int:
        """Leading size of the first tensor or array in a batch; 1 if there is none."""
        first = batch[0] if type(batch) in (tuple, list) and batch else batch
        # The usual batch, without the half of a microsecond that a generator takes.
        is_usual = type(first) is Tensor and first.dim() > 0
        size = first.size(0) if is_usual else next(leading_sizes(batch), None)
        if self._checks and size not in self._checked:
            self._check(batch, size)
        return 1 if size is None else size

    def _check(self, batch: Any, size: int | None) -> None:
        if size is None:
            self._warn(
                f"no tensor or array with a leading dimension was found in a batch "
                f"({type(batch).__qualname__}), so each batch counts as 1 sample in means"
            )
            return
        sizes = list(dict.fromkeys(leading_sizes(batch)))
        if len(sizes) > 1:
            self._warn(
                f"tensors of a batch have different leading sizes ({', '.join(map(str, sizes))}), "
                f"and the first, {size}, counts as its number of samples in means"
            )
            return
        self._checked.add(size)
        self._checks = len(self._checked) < _MAX_CHECKS

    def _warn(self, problem: str) -> None:
        self._checks = False
        logger.warning(
            "%s; to count otherwise, write num_samples(self, batch) in %s, or return "
            "WeightedMean(value, weight) from the step",
            problem,
            self._trainer_name,
        )


def leading_sizes(batch: Any) -> Iterator[int]:
    """Leading sizes of the tensors and arrays in a batch, in order.

    Looks into tuples, lists, mappings, dataclasses and SimpleNamespaces. Passes over texts,
    numbers, tensors without dimensions and other objects.
    """
    pending, seen = [batch], set()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            if value.dim() > 0:
                yield value.size(0)
            continue
        parts = _parts(value)
        if parts is None:
            shape = getattr(value, "shape", ()) if hasattr(type(value), "__array__") else ()
            if shape:
                yield int(shape[0])
        elif id(value) not in seen:  # a structure may contain itself
            seen.add(id(value))
            pending.extend(part for part in reversed(parts) if type(part) not in _LEAVES)


def _parts(value: Any) -> list[Any] | tuple[Any, ...] | None:
    """The values in a container; None if it isn't one."""
    if isinstance(value, (tuple, list)):
        return value
    if isinstance(value, Mapping):
        return list(value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    if isinstance(value, SimpleNamespace):
        return list(vars(value).values())
    return None
