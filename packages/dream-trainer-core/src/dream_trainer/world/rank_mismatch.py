"""Values that differ between ranks: found by digests, shown short for any number of ranks."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_PICKLE_PROTOCOL = 5
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_MAX_DISAGREEMENTS = 4


def value_digest(value: Any) -> bytes:
    """SHA-256 of a value: of the content of plain data, of the pickle of anything else.

    Equal digests mean equal values. Equal values may have different digests: `1` and `1.0`, or
    objects whose pickles depend on the order of a set. The order of insertion of dicts and sets has
    no effect.

    Raises:
        Exception: The error of pickle, if a part of the value can't be pickled.
    """
    return hashlib.sha256(_canonical(value)).digest()


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


def _canonical(value: Any) -> bytes:
    kind = type(value)
    # Not isinstance: a subclass may compare differently, as OrderedDict does.
    if kind in _SCALARS:
        return f"{kind.__name__}:{value!r}".encode(errors="surrogatepass")
    if kind in (list, tuple):
        return _joined(kind.__name__, map(_canonical, value))
    if kind in (set, frozenset):
        return _joined("set", sorted(map(_canonical, value)))
    if kind is dict:
        items = (_joined("", map(_canonical, item)) for item in value.items())
        return _joined("dict", sorted(items))
    return b"pickle:" + pickle.dumps(value, _PICKLE_PROTOCOL)


def _joined(kind: str, parts: Iterable[bytes]) -> bytes:
    # Length-prefixed, so that different parts never give the same bytes.
    return kind.encode() + b"".join(b":%d:%b" % (len(part), part) for part in parts)


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
