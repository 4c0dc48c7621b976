"""Anything as plain nested data, for a log to hold. Never raises."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import math
import types
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

from dream_trainer.callbacks import Callback, CallbackCollection

_MAX_DEPTH = 12
_MAX_ITEMS = 1000
_MAX_TEXT = 10_000


def plain(value: Any) -> Any:
    """The value as None, booleans, numbers, strings, and lists and string-keyed dicts of them.

    Dataclasses become dicts of their fields, callbacks dicts of what their constructors took;
    what has no such form becomes text. Long text and lists are cut, cycles end in "…".
    """
    return _plain(value, ())


def as_number(value: Any) -> float | int | None:
    """A number for anything that is one, in any sense; None for what isn't. Waits for the device.

    Whole numbers that no float can hold become infinite.
    """
    try:
        number = float(value)
        return value if type(value) is int else number
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except Exception:  # noqa: BLE001  # whatever a strange type's __float__ raises, it's no number
        return None


def spelled(value: Any) -> Any:
    """Plain data as JSON can hold it: NaN and infinities as the strings that float() takes."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: spelled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [spelled(item) for item in value]
    return value


def _plain(value: Any, inside: tuple[int, ...]) -> Any:
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) is str:
        return _cut(value)
    if id(value) in inside or len(inside) >= _MAX_DEPTH:
        return "…"
    try:
        return _converted(value, (*inside, id(value)))
    except Exception as error:  # noqa: BLE001  # a config may hold anything
        return f"<{type(value).__name__} that can't be shown: {type(error).__name__}>"


def _converted(value: Any, inside: tuple[int, ...]) -> Any:
    if isinstance(value, CallbackCollection):
        return {name: _plain(callback, inside) for name, callback in value.items()}
    if isinstance(value, Callback):
        return _constructed(value, inside)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (field.name for field in dataclasses.fields(value))
        return {name: _plain(getattr(value, name, None), inside) for name in fields}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (bool, int, float)):
        return as_number(value)
    if isinstance(value, (str, PurePath)):
        return _cut(str(value))
    if isinstance(value, Mapping):
        pairs = _some(value.items())
        return {_cut(str(_plain(key, inside))): _plain(item, inside) for key, item in pairs}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _converted(value._asdict(), inside)
    if isinstance(value, Tensor):
        return f"tensor({tuple(value.shape)}, {value.dtype})"
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item, inside) for item in _some(value)]
    if isinstance(value, functools.partial):
        return {
            "function": _plain(value.func, inside),
            "args": _plain(value.args, inside),
            "keywords": _plain(value.keywords, inside),
        }
    return _named(value, inside)


def _named(value: Any, inside: tuple[int, ...]) -> Any:
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (torch.dtype, torch.device, bytes)):
        return _cut(repr(value) if isinstance(value, bytes) else str(value))
    if isinstance(value, nn.Module):
        return type(value).__qualname__
    kind: Any = type(value)
    if kind.__repr__ is object.__repr__:
        return _constructed(value, inside)  # the default shows an address, new in every run
    return _cut(repr(value))


def _constructed(value: Any, inside: tuple[int, ...]) -> dict[str, Any]:
    """The class, and what its constructor took, as far as it was stored under the same names."""
    attributes = getattr(value, "__dict__", {})
    parameters = list(inspect.signature(type(value).__init__).parameters)[1:]
    taken = {name: attributes[name] for name in parameters if name in attributes}
    return {"class": type(value).__qualname__} | {
        name: _plain(item, inside) for name, item in taken.items()
    }


def _some(items: Iterable[Any]) -> list[Any]:
    listed = list(items)
    return listed[:_MAX_ITEMS]


def _cut(text: str) -> str:
    # Lone surrogates can't be written as UTF-8.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "…"
