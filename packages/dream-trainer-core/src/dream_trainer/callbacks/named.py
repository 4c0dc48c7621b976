"""NamedCallbacks: a mutable mapping from name to callback."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self, cast, overload

from dream_trainer.callbacks.callback import Callback

_AnyCallback = Callback[Any]
_RAISE = object()


class NamedCallbacks:
    """Callbacks by name, in insertion order.

    A mutable mapping, except that iterating yields the callbacks instead of their names. For that
    reason it isn't a `collections.abc.MutableMapping`: the mixin methods `keys`, `items`, `values`,
    `update`, `popitem`, `clear` and `==` iterate over names, and so would code that is given a
    Mapping.

    `keys`, `values`, `items` and iteration give a snapshot, so the body of a loop may change the
    collection. A change that raises changes nothing.

    Args:
        callbacks: Callbacks, or names and callbacks. Without a name, a callback gets the name
            of its class; a second one of that class gets a number, as in "EMACallback_2".

    Raises:
        TypeError: If a value isn't a Callback, or a name isn't a string.
        ValueError: If a name or a callback is given twice.
    """

    # Two overloads: mypy can't infer the type of a dict literal for a union with Iterable.
    @overload
    def __init__(self, callbacks: Mapping[str, _AnyCallback]) -> None: ...
    @overload
    def __init__(
        self, callbacks: Iterable[_AnyCallback | tuple[str, _AnyCallback]] = ()
    ) -> None: ...
    def __init__(
        self,
        callbacks: (
            Mapping[str, _AnyCallback] | Iterable[_AnyCallback | tuple[str, _AnyCallback]]
        ) = (),
    ) -> None:
        self._callbacks: dict[str, _AnyCallback] = {}
        after: dict[str, _AnyCallback] = {}
        items = callbacks.items() if isinstance(callbacks, _MAPPINGS) else callbacks
        for item in items:
            name, callback = item if isinstance(item, tuple) else (None, item)
            _add(after, callback, name)
        self._replace(after)

    def _replace(self, after: dict[str, _AnyCallback]) -> None:
        """Set changed callbacks, or raise and change nothing."""
        self._callbacks = after

    # Reading

    def __getitem__(self, name: str) -> _AnyCallback:
        try:
            return self._callbacks[name]
        except KeyError:
            raise KeyError(
                f"no callback is called {name!r}; there are {joined_names(self._callbacks)}"
            ) from None

    def __contains__(self, item: object) -> bool:
        """Whether a name, or this callback itself, is in the collection."""
        if isinstance(item, str):
            return item in self._callbacks
        return any(callback is item for callback in self._callbacks.values())

    def __len__(self) -> int:
        return len(self._callbacks)

    def __iter__(self) -> Iterator[_AnyCallback]:
        return iter(tuple(self._callbacks.values()))

    def __repr__(self) -> str:
        inside = ", ".join(f"{name!r}: {cb!r}" for name, cb in self._callbacks.items())
        return f"{type(self).__name__}({{{inside}}})"

    def keys(self) -> tuple[str, ...]:
        return tuple(self._callbacks)

    def values(self) -> tuple[_AnyCallback, ...]:
        return tuple(self._callbacks.values())

    def items(self) -> tuple[tuple[str, _AnyCallback], ...]:
        return tuple(self._callbacks.items())

    @overload
    def get(self, name: str, default: None = None) -> _AnyCallback | None: ...
    @overload
    def get(self, name: str, default: _AnyCallback) -> _AnyCallback: ...
    def get(self, name: str, default: _AnyCallback | None = None) -> _AnyCallback | None:
        return self._callbacks.get(name, default)

    # Changing

    def append(self, callback: _AnyCallback, name: str | None = None) -> None:
        """Add a callback at the end.

        Raises:
            TypeError: If it isn't a Callback.
            ValueError: If the name is taken, or the callback is in the collection already.
        """
        after = dict(self._callbacks)
        _add(after, callback, name)
        self._replace(after)

    def __setitem__(self, name: str, callback: _AnyCallback) -> None:
        self.update({name: callback})

    def __delitem__(self, name: str) -> None:
        self.pop(name)

    def update(
        self,
        other: Mapping[str, _AnyCallback] | NamedCallbacks | Iterable[tuple[str, _AnyCallback]],
    ) -> None:
        """Add callbacks; one with an existing name replaces the other in place."""
        after = dict(self._callbacks)
        for name, callback in other.items() if isinstance(other, _MAPPINGS) else other:
            if after.get(name) is not callback:
                _refuse_unusable(after, callback, name)
                after[name] = callback
        self._replace(after)

    def __ior__(self, other: Mapping[str, _AnyCallback] | NamedCallbacks) -> Self:
        self.update(other)
        return self

    def setdefault(self, name: str, callback: _AnyCallback) -> _AnyCallback:
        if name not in self._callbacks:
            self[name] = callback
        return self._callbacks[name]

    @overload
    def pop(self, name: str) -> _AnyCallback: ...
    @overload
    def pop(self, name: str, default: None) -> _AnyCallback | None: ...
    @overload
    def pop(self, name: str, default: _AnyCallback) -> _AnyCallback: ...
    def pop(self, name: str, default: Any = _RAISE) -> _AnyCallback | None:
        if default is not _RAISE and name not in self._callbacks:
            return cast(_AnyCallback | None, default)
        callback = self[name]
        self._replace({key: cb for key, cb in self._callbacks.items() if key != name})
        return callback

    def popitem(self) -> tuple[str, _AnyCallback]:
        """Remove the last callback."""
        if not self._callbacks:
            raise KeyError("there is no callback to pop")
        name = self.keys()[-1]
        return name, self.pop(name)

    def clear(self) -> None:
        self._replace({})


_MAPPINGS = (Mapping, NamedCallbacks)


def joined_names(names: Iterable[str]) -> str:
    """Names, for a message."""
    return ", ".join(names) or "none"


def _add(after: dict[str, _AnyCallback], callback: _AnyCallback, name: str | None) -> None:
    """Add a callback at the end, under its name or a free one."""
    if name is not None and name in after:
        raise ValueError(
            f"a callback is called {name!r} already ({after[name]!r}); give this one another "
            f"name, or assign collection[{name!r}] to replace it"
        )
    if name is None:
        base = type(callback).__name__
        candidates = (base if n == 1 else f"{base}_{n}" for n in range(1, len(after) + 2))
        name = next(candidate for candidate in candidates if candidate not in after)
    _refuse_unusable(after, callback, name)
    after[name] = callback


def _refuse_unusable(after: Mapping[str, _AnyCallback], callback: object, name: object) -> None:
    """Raise unless `callback` is a Callback not in `after`, and `name` a valid name."""
    if not isinstance(callback, Callback):
        hint = "; create an instance: add ()" if isinstance(callback, type) else ""
        raise TypeError(f"{callback!r} is a {type(callback).__qualname__}, not a Callback{hint}")
    if not isinstance(name, str) or not name:
        raise TypeError(f"{name!r} can't name a callback; a string that isn't empty is required")
    for other_name, other in after.items():
        if other is callback:
            raise ValueError(
                f"this {type(callback).__name__} is in the collection already, as "
                f"{other_name!r}; make a second one"
            )
