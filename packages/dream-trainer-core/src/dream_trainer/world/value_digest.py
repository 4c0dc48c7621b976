"""Digest of a value, to compare values between processes without sending them.

Equal digests mean equal values. Equal values may have different digests: `1` and `1.0`, or objects
whose pickles depend on the order of a set. If digests differ, the values must be compared.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable
from typing import Any

_PICKLE_PROTOCOL = 5
_SCALARS = (bool, int, float, complex, str, bytes, type(None))


def value_digest(value: Any) -> bytes:
    """SHA-256 of a value: of the content of plain data, of the pickle of anything else.

    Independent of the insertion order of dicts and sets.

    Raises:
        Exception: The error of pickle, if a part of the value can't be pickled.
    """
    return hashlib.sha256(_canonical(value)).digest()


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
