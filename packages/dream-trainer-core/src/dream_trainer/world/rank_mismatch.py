"""What ranks that disagree said, by rank, in a text that is short however many they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def disagreements(said: Sequence[Mapping[str, Any]]) -> str:
    """Says of each value that differs which ranks said what.

    Args:
        said: What each rank said, by rank: values by name.
    """
    names = dict.fromkeys(name for values in said for name in values)
    first = said[0]
    different = [
        name
        for name in names
        if any(name not in each or name not in first or each[name] != first[name] for each in said)
    ]
    parts = []
    for name in different[:_MAX_DISAGREEMENTS]:
        values = [repr(values[name]) if name in values else "nothing" for values in said]
        parts.append(f"ranks disagree on {name}:\n  " + grouped(values, "\n  "))
    more = len(different) - len(parts)
    parts.append(
        f"{f'and on {more} more; ' if more else ''}it must be the same on all of them: look for "
        "what depends on the rank, the machine or chance"
    )
    return "\n".join(parts)


_MAX_DISAGREEMENTS = 4


def grouped(values: Sequence[str], separator: str = "; ") -> str:
    """What each rank said, once for all that said the same: `rank 0–6: 10; rank 7: 11`."""
    return separator.join(by_value(dict(enumerate(values))))


def by_value(values: Mapping[int, str]) -> list[str]:
    """What some ranks said, each value once with the ranks that said it: `rank 0–6: 10`.

    Args:
        values: By rank.
    """
    ranks_by_value: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks_by_value.setdefault(value, []).append(rank)
    return [f"rank {_ranges(ranks)}: {value}" for value, ranks in ranks_by_value.items()]


def _ranges(ranks: Sequence[int]) -> str:
    """Ranks in a row as `0–6`: there may be thousands."""
    parts: list[str] = []
    start = 0
    for end in range(1, len(ranks) + 1):
        if end < len(ranks) and ranks[end] == ranks[end - 1] + 1:
            continue
        row = ranks[start:end]
        parts += [f"{row[0]}–{row[-1]}"] if len(row) > 2 else map(str, row)
        start = end
    return ", ".join(parts)
