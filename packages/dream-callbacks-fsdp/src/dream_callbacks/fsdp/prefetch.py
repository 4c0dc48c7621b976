"""Computes which modules each module should prefetch from the order of execution. Pure.

A prefetch starts the next module's all-gather while this one computes. It must always be used: an
unused all-gather costs communication, and without gradients the gathered weights even stay until
the module runs next, when they are stale. So a module prefetches another only if that one followed
it each time.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

ModuleT = TypeVar("ModuleT", bound=Hashable)

Phase = Literal["forward", "recompute", "backward"]
"""Phase of a module; "recompute" is a forward that activation checkpointing runs in backward."""


@dataclass(frozen=True)
class Event(Generic[ModuleT]):
    """The start of a phase, for which a module needs its full parameters.

    Attributes:
        phase: The phase that starts.
        module: Hashable key of the module.
    """

    phase: Phase
    module: ModuleT


def forward_lists(
    events: Sequence[Event[ModuleT]], depth: int
) -> dict[ModuleT, tuple[ModuleT, ...]]:
    """The modules that each module should prefetch in forward.

    Args:
        events: Events of one step, in order, of the modules below one root.
        depth: How many modules ahead.

    Returns:
        Lists in the order of execution; modules with nothing to prefetch are left out.
    """
    runs = list(_runs(events, "forward"))
    # A recomputed forward is followed by its own backward. Prefetching in forward order would be
    # wrong there, so a recompute counts as a run without successor.
    runs += [[event.module] for event in events if event.phase == "recompute"]
    return {module: followers for module, followers in _always_next(runs, depth) if followers}


def backward_lists(
    events: Sequence[Event[ModuleT]], depth: int, kept: Collection[ModuleT] = ()
) -> dict[ModuleT, tuple[ModuleT, ...]]:
    """The modules that each module should prefetch in backward.

    Args:
        events: As for `forward_lists`.
        depth: How many modules ahead.
        kept: Modules that aren't resharded after forward and need no all-gather.

    Returns:
        Lists in the order of execution; an empty list if nothing ever follows. A module is left
        out if no list is always correct for it; torch's own prefetch, which uses the order of the
        current step, is better then.
    """
    runs = list(_runs(events, "backward"))
    is_followed = {
        module
        for run in runs
        for index, module in enumerate(run)
        if _next_distinct(run, index, depth, kept)
    }
    return {
        module: followers
        for module, followers in _always_next(runs, depth, kept)
        if followers or module not in is_followed
    }


def _runs(events: Iterable[Event[ModuleT]], phase: Phase) -> Iterator[list[ModuleT]]:
    """Modules of consecutive events of a phase; a recompute doesn't interrupt a backward."""
    run: list[ModuleT] = []
    for event in events:
        if event.phase == phase:
            run.append(event.module)
        elif event.phase != "recompute" and run:
            yield run
            run = []
    if run:
        yield run


def _always_next(
    runs: Sequence[Sequence[ModuleT]], depth: int, leave_out: Collection[ModuleT] = ()
) -> Iterator[tuple[ModuleT, tuple[ModuleT, ...]]]:
    """For each module, those that are among the next `depth` each time it runs."""
    followers: dict[ModuleT, list[ModuleT]] = {}
    for run in runs:
        for index, module in enumerate(run):
            following = _next_distinct(run, index, depth, leave_out)
            if module in followers:
                followers[module] = [m for m in followers[module] if m in following]
            else:
                followers[module] = following
    for module, always in followers.items():
        yield module, tuple(always)


def _next_distinct(
    run: Sequence[ModuleT], index: int, depth: int, leave_out: Collection[ModuleT]
) -> list[ModuleT]:
    """The next distinct modules in a run, until the one at `index` repeats."""
    found: list[ModuleT] = []
    for module in run[index + 1 :]:
        if module == run[index] or len(found) == depth:
            break
        if module not in found and module not in leave_out:
            found.append(module)
    return found
