"""Order of callbacks: a stable sort by `before` and `after`, and the printed plan."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dream_trainer.callbacks.callback import Callback


def ordered(callbacks: Mapping[str, Callback[Any]]) -> list[str]:
    """Names of the callbacks in the order in which they run.

    As listed, except where `before` and `after` constrain it. `after = {Callback}` means after all
    others, except those that declare the same or must come after it.

    Raises:
        ValueError: If the constraints contradict each other; it shows the cycle.
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
    """For each callback, those that its constraints or theirs put before it."""
    earlier: dict[str, set[str]] = {name: set() for name in callbacks}
    for one in callbacks:
        for other in callbacks:
            if one != other and _must_run("after", one, other, callbacks):
                earlier[one].add(other)
            if one != other and _must_run("before", one, other, callbacks):
                earlier[other].add(one)
    return earlier


def _must_run(where: str, one: str, other: str, callbacks: Mapping[str, Callback[Any]]) -> bool:
    """Whether one callback must run before or after (`where`) another.

    Two with the same constraint on a class that both belong to don't constrain each other.
    """
    constraints: Collection[type | str] = getattr(callbacks[one], where)
    others: Collection[type | str] = getattr(callbacks[other], where)
    return any(
        _matches(constraint, other, callbacks)
        and not (constraint in others and _matches(constraint, one, callbacks))
        for constraint in constraints
    )


def _matches(
    constraint: type | str | Callback[Any], name: str, callbacks: Mapping[str, Callback[Any]]
) -> bool:
    """Whether a constraint is this callback, its name, or a class of it other than Callback."""
    if isinstance(constraint, Callback):
        return constraint is callbacks[name]
    bases = [cls for cls in type(callbacks[name]).__mro__ if cls not in Callback.__mro__]
    if isinstance(constraint, str):
        return constraint == name or constraint in (cls.__name__ for cls in bases)
    return constraint in bases


def _ranks(
    callbacks: Mapping[str, Callback[Any]], earlier: Mapping[str, set[str]]
) -> dict[str, int]:
    """-1 for callbacks before all others, 1 for those after all others, else 0.

    A callback that must precede a first one gets its rank, so `before = {Callback}` never
    contradicts a constraint that names a callback.
    """
    ranks = dict.fromkeys(callbacks, 0)
    for name, callback in callbacks.items():
        if _includes_all(callback.before):
            ranks.update(dict.fromkeys(_with_all_before(name, earlier), -1))
    for name, callback in callbacks.items():
        if _includes_all(callback.after):
            ranks[name] = 1
    return ranks


def _includes_all(constraints: Collection[type | str]) -> bool:
    return Callback in constraints or Callback.__name__ in constraints


def _with_all_before(name: str, earlier: Mapping[str, set[str]]) -> set[str]:
    found, frontier = {name}, [name]
    while frontier:
        new = earlier[frontier.pop()] - found
        found |= new
        frontier += new
    return found


def _cycle_message(earlier: Mapping[str, set[str]]) -> str:
    """The message about a cycle, given the callbacks that can't be placed."""
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
    """Which callbacks run in which hook, in order. Prints as a table.

    Attributes:
        hooks: For each hook, in the order of a run, the names of its callbacks in order. Hooks
            that no callback overrides are left out.
        rank_zero: Names of the callbacks that run on global rank 0 only.
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
