"""Who runs before whom: `before`/`after` to a stable order or the cycle, and the printed plan."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dream_trainer.callbacks.callback import Callback


def ordered(callbacks: Mapping[str, Callback[Any]]) -> list[str]:
    """Names of the callbacks in the order in which they run.

    As listed, except where `before` and `after` ask for something else. `after = {Callback}`
    means after everyone, except for those that ask for the same or have to come after it.

    Raises:
        ValueError: If the wishes contradict each other; it shows the cycle.
    """
    if not any(callback.before or callback.after for callback in callbacks.values()):
        return list(callbacks)
    earlier = _earlier(callbacks)
    ranks = _ranks(callbacks, earlier)
    order: list[str] = []
    waiting = sorted(callbacks, key=ranks.__getitem__)  # stable
    while waiting:
        name = next((name for name in waiting if earlier[name] <= set(order)), None)
        if name is None:
            raise ValueError(_cycle_message({each: earlier[each] for each in waiting}))
        order.append(name)
        waiting.remove(name)
    return order


def _earlier(callbacks: Mapping[str, Callback[Any]]) -> dict[str, set[str]]:
    """For each callback those that must run before it, as far as wishes name them."""
    earlier: dict[str, set[str]] = {name: set() for name in callbacks}
    for one in callbacks:
        for other in callbacks:
            if one != other and _asks("after", one, other, callbacks):
                earlier[one].add(other)
            if one != other and _asks("before", one, other, callbacks):
                earlier[other].add(one)
    return earlier


def _asks(where: str, one: str, other: str, callbacks: Mapping[str, Callback[Any]]) -> bool:
    """Whether one callback wants to be `where` another is concerned, "before" or "after" it.

    Two that ask for the same about a class that both belong to leave each other alone.
    """
    wishes: Collection[type | str] = getattr(callbacks[one], where)
    others: Collection[type | str] = getattr(callbacks[other], where)
    return any(
        _is_about(wish, other, callbacks)
        and not (wish in others and _is_about(wish, one, callbacks))
        for wish in wishes
    )


def _is_about(
    wish: type | str | Callback[Any], name: str, callbacks: Mapping[str, Callback[Any]]
) -> bool:
    """Whether a wish is this callback, its name, or a class of it other than Callback."""
    if isinstance(wish, Callback):
        return wish is callbacks[name]
    bases = [cls for cls in type(callbacks[name]).__mro__ if cls not in Callback.__mro__]
    if isinstance(wish, str):
        return wish == name or wish in (cls.__name__ for cls in bases)
    return wish in bases


def _ranks(
    callbacks: Mapping[str, Callback[Any]], earlier: Mapping[str, set[str]]
) -> dict[str, int]:
    """-1 for those that want to be before everyone, 1 for after everyone, else 0.

    Whoever must come before a first one has its rank. So no wish about everyone can contradict
    one that names a callback.
    """
    ranks = dict.fromkeys(callbacks, 0)
    for name, callback in callbacks.items():
        if _is_about_everyone(callback.before):
            ranks.update(dict.fromkeys(_with_all_before(name, earlier), -1))
    for name, callback in callbacks.items():
        if _is_about_everyone(callback.after):
            ranks[name] = 1
    return ranks


def _is_about_everyone(wishes: Collection[type | str]) -> bool:
    return Callback in wishes or Callback.__name__ in wishes


def _with_all_before(name: str, earlier: Mapping[str, set[str]]) -> set[str]:
    found, frontier = {name}, [name]
    while frontier:
        new = earlier[frontier.pop()] - found
        found |= new
        frontier += new
    return found


def _cycle_message(earlier: Mapping[str, set[str]]) -> str:
    """Says which callbacks wait for each other, given those that can't be placed."""
    path = [next(iter(earlier))]
    while path.count(path[-1]) == 1:
        path.append(next(name for name in earlier if name in earlier[path[-1]]))
    cycle = path[path.index(path[-1]) :]
    return (
        f"the callbacks can't be ordered: {' after '.join(cycle)}; "
        "change `before` or `after` of one of these classes"
    )


@dataclass(frozen=True, repr=False)
class Plan:
    """Which callback runs in which hook, in which order. Shown as a table.

    Attributes:
        hooks: Names of the callbacks that run in a hook, in order, by the hook's name, in the
            order of a run. Hooks that nobody overrides are left out.
        rank_zero: Names of the callbacks that run on global rank 0 alone.
    """

    hooks: Mapping[str, tuple[str, ...]]
    rank_zero: frozenset[str]

    def __repr__(self) -> str:
        if not self.hooks:
            return "no callback overrides a hook"
        indent = max(map(len, self.hooks)) + 2
        rows = [(hook, ", ".join(map(self._marked, names))) for hook, names in self.hooks.items()]
        if any(name in self.rank_zero for names in self.hooks.values() for name in names):
            rows.append(("", "* on global rank 0 alone"))
        return "\n".join(
            textwrap.fill(f"{hook:<{indent}}{names}", 100, subsequent_indent=" " * indent)
            for hook, names in rows
        )

    def _marked(self, name: str) -> str:
        return f"{name}*" if name in self.rank_zero else name
