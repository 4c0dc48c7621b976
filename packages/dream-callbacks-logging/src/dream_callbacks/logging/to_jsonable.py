"""Conversion of any value to JSON-like nested data for the log. Never raises."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import itertools
import math
import types
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

from dream_trainer.callbacks import Callback, CallbackCollection
from dream_trainer.numbers import as_float, is_number

_MAX_DEPTH = 12
_MAX_ITEMS = 1000
_MAX_TEXT = 10_000


def to_jsonable(value: Any) -> Any:
    """Convert to None, booleans, numbers, strings, and lists and string-keyed dicts of them.

    Dataclasses become dicts of their fields, callbacks become dicts of their constructor
    arguments, other types become text. Long text and lists are truncated; a cycle becomes "…".
    """
    return _convert(value, ())


def as_number(value: Any) -> float | int | None:
    """Convert to an int or a float; None if it isn't a number. Device tensors sync. Never raises.

    Integers beyond the range of a float become infinite.
    """
    try:
        number = as_float(value)
    except Exception:  # noqa: BLE001  # a user type may raise anything; it isn't a number then
        return None
    is_exact = type(value) is int and number is not None and math.isfinite(number)
    return value if is_exact else number


def encode_non_finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by strings that float() parses."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: encode_non_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [encode_non_finite(item) for item in value]
    return value


def _convert(value: Any, parents: tuple[int, ...]) -> Any:
    if value is None or type(value) in (bool, int, float):
        return value
    if type(value) is str:
        return _truncate(value)
    if id(value) in parents or len(parents) >= _MAX_DEPTH:
        return "…"
    try:
        return _convert_by_type(value, (*parents, id(value)))
    except Exception as error:  # noqa: BLE001  # user types in a config may raise anything
        return f"<{type(value).__name__} that can't be converted: {type(error).__name__}>"


def _convert_by_type(value: Any, parents: tuple[int, ...]) -> Any:
    if isinstance(value, CallbackCollection):
        return {name: _convert(callback, parents) for name, callback in value.items()}
    if isinstance(value, Callback):
        return _constructor_arguments(value, parents)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (field.name for field in dataclasses.fields(value))
        return {name: _convert(getattr(value, name, None), parents) for name in fields}
    if isinstance(value, enum.Enum):
        return value.name
    if not isinstance(value, Tensor) and is_number(value):
        return as_number(value)
    if isinstance(value, (str, PurePath)):
        return _truncate(str(value))
    if isinstance(value, Mapping):
        pairs = _first_items(value.items())
        return {
            _truncate(str(_convert(key, parents))): _convert(item, parents) for key, item in pairs
        }
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _convert_by_type(value._asdict(), parents)
    if isinstance(value, Tensor):
        return f"tensor({tuple(value.shape)}, {value.dtype})"
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_convert(item, parents) for item in _first_items(value)]
    if isinstance(value, functools.partial):
        return {
            "function": _convert(value.func, parents),
            "args": _convert(value.args, parents),
            "keywords": _convert(value.keywords, parents),
        }
    return _convert_other(value, parents)


def _convert_other(value: Any, parents: tuple[int, ...]) -> Any:
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (torch.dtype, torch.device, bytes)):
        return _truncate(repr(value) if isinstance(value, bytes) else str(value))
    if isinstance(value, nn.Module):
        return type(value).__qualname__
    kind: Any = type(value)
    if kind.__repr__ is object.__repr__:
        return _constructor_arguments(value, parents)  # the default repr shows an address
    return _truncate(repr(value))


def _constructor_arguments(value: Any, parents: tuple[int, ...]) -> dict[str, Any]:
    """The class and its constructor arguments that are stored as attributes of the same name."""
    attributes = getattr(value, "__dict__", {})
    parameters = list(inspect.signature(type(value).__init__).parameters)[1:]
    taken = {name: attributes[name] for name in parameters if name in attributes}
    return {"class": type(value).__qualname__} | {
        name: _convert(item, parents) for name, item in taken.items()
    }


def _first_items(items: Iterable[Any]) -> list[Any]:
    return list(itertools.islice(items, _MAX_ITEMS))


def _truncate(text: str) -> str:
    # Lone surrogates can't be written as UTF-8.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "…"
