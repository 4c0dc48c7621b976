"""Who runs before whom: `before`/`after` to a stable order or the cycle, and the printed plan."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from dream_trainer.callbacks.callback import Callback


def ordered(callbacks: Mapping[str, Callback]) -> list[str]:
    """Names of the callbacks in the order in which they run.

    As listed, except where `before` and `after` ask for something else. `after = {Callback}`
    means after everyone that doesn't ask for the same or for the opposite.

    Raises:
        ValueError: If the wishes contradict each other; it shows the cycle.
    """
    earlier = {name: set(_earlier(name, callbacks)) for name in callbacks}
    order: list[str] = []
    while len(order) < len(callbacks):
        ready = (name for name in callbacks if name not in order and earlier[name] <= set(order))
        name = next(ready, None)
        if name is None:
            raise ValueError(_cycle_message({n: earlier[n] for n in callbacks if n not in order}))
        order.append(name)
    return order


def _earlier(name: str, callbacks: Mapping[str, Callback]) -> Iterator[str]:
    """Names of the callbacks that must run before `name`."""
    for other in callbacks:
        if other == name:
            continue
        if _explicitly_before(other, name, callbacks):
            yield other
        elif _explicitly_before(name, other, callbacks):
            continue
        # Wishes about everyone give way to explicit ones and cancel each other out.
        elif _last(callbacks[name]) and not _last(callbacks[other]):
            yield other
        elif _first(callbacks[other]) and not _first(callbacks[name]):
            yield other


def _explicitly_before(first: str, second: str, callbacks: Mapping[str, Callback]) -> bool:
    return _matches(callbacks[first].before, second, callbacks[second]) or _matches(
        callbacks[second].after, first, callbacks[first]
    )


def _matches(wishes: Collection[type | str], name: str, callback: Callback) -> bool:
    class_names = {cls.__name__ for cls in type(callback).__mro__}
    return any(
        wish == name or wish in class_names
        if isinstance(wish, str)
        else wish is not Callback and isinstance(callback, wish)
        for wish in wishes
    )


def _last(callback: Callback) -> bool:
    return Callback in callback.after


def _first(callback: Callback) -> bool:
    return Callback in callback.before


def _cycle_message(earlier: Mapping[str, set[str]]) -> str:
    """Says which callbacks wait for each other, given those that can't be placed."""
    path = [next(iter(earlier))]
    while path.count(path[-1]) == 1:
        path.append(next(name for name in earlier if name in earlier[path[-1]]))
    cycle = path[path.index(path[-1]) :]
    shown = " after ".join(cycle)
    return (
        f"the callbacks can't be ordered: {shown}; "
        "change `before` or `after` of one of these classes"
    )


@dataclass(frozen=True)
class Plan:
    """Which callback runs in which hook, in which order. Printing it shows a table.

    Attributes:
        hooks: Names of the callbacks that run in a hook, in order, by the hook's name. Hooks
            that nobody overrides are left out.
        rank_zero: Names of the callbacks that run on global rank 0 alone.
    """

    hooks: Mapping[str, tuple[str, ...]]
    rank_zero: frozenset[str]

    def __str__(self) -> str:
        if not self.hooks:
            return "no callback overrides a hook"
        width = max(map(len, self.hooks))
        lines = [
            f"{hook:<{width}}  {' → '.join(self._marked(name) for name in names)}"
            for hook, names in self.hooks.items()
        ]
        if self.rank_zero & {name for names in self.hooks.values() for name in names}:
            lines.append("⁰ on global rank 0 alone")
        return "\n".join(lines)

    def _marked(self, name: str) -> str:
        return f"{name}⁰" if name in self.rank_zero else name
