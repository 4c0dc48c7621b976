"""Messages that show the values of ranks that differ, short for any number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def disagreements(values_of_ranks: Sequence[Mapping[str, Any]]) -> str:
    """The message for values that differ between ranks.

    Args:
        values_of_ranks: Values by name, by rank.
    """
    names = dict.fromkeys(name for values in values_of_ranks for name in values)
    first = values_of_ranks[0]
    different = [
        name
        for name in names
        if any(
            name not in each or name not in first or each[name] != first[name]
            for each in values_of_ranks
        )
    ]
    parts = []
    for name in different[:_MAX_DISAGREEMENTS]:
        values = [repr(values[name]) if name in values else "nothing" for values in values_of_ranks]
        parts.append(f"ranks disagree on {name}:\n  " + grouped(values, "\n  "))
    more = len(different) - len(parts)
    parts.append(
        f"{f'and on {more} more; ' if more else ''}it must be the same on all ranks: check "
        "for rank-, host- or randomness-dependent configuration"
    )
    return "\n".join(parts)


_MAX_DISAGREEMENTS = 4


def grouped(values: Sequence[str], separator: str = "; ") -> str:
    """The values of all ranks, equal ones together: `rank 0–6: 10; rank 7: 11`."""
    return separator.join(by_value(dict(enumerate(values))))


def by_value(values: Mapping[int, str]) -> list[str]:
    """Each distinct value with its ranks, such as `rank 0–6: 10`.

    Args:
        values: Values by rank.
    """
    ranks_by_value: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks_by_value.setdefault(value, []).append(rank)
    return [f"rank {_ranges(ranks)}: {value}" for value, ranks in ranks_by_value.items()]


def _ranges(ranks: Sequence[int]) -> str:
    """Ranks as a list with ranges such as `0–6`."""
    parts: list[str] = []
    start = 0
    for end in range(1, len(ranks) + 1):
        if end < len(ranks) and ranks[end] == ranks[end - 1] + 1:
            continue
        row = ranks[start:end]
        parts += [f"{row[0]}–{row[-1]}"] if len(row) > 2 else map(str, row)
        start = end
    return ", ".join(parts)
