"""Finding the learning rate schedulers of a trainer: in attributes, and in what is returned."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from dream_trainer.interface.lr_schedule import LRSchedule, is_scheduler
from dream_trainer.world import torch_private

_MAX_DEPTH = 4
_MAX_ITEMS = 1000
"""Longer lists and dicts hold data."""

_OPTIONS = ("scheduler", "interval", "monitor")
_LIGHTNINGS_OPTIONS = {"frequency": 1, "strict": True, "name": None, "reduce_on_plateau": None}
"""Options that only Lightning has, each with the value that means the same here; None: any."""

Found = tuple[str | None, LRSchedule, bool]
"""Name, if it has one; the schedule; whether its options were given explicitly."""


def split_returned(returned: Any) -> tuple[list[Optimizer], list[Any]]:
    """What `configure_optimizers` returned: optimizers, and schedulers in Lightning's forms.

    Raises:
        TypeError: If there is anything else.
        ValueError: If it isn't said how often a scheduler is stepped.
    """
    optimizers: list[Optimizer] = []
    schedules: list[Any] = []
    for part in _parts(returned):
        if isinstance(part, Optimizer):
            optimizers.append(part)
        elif isinstance(part, LRSchedule) or _has_options(part):
            schedules.append(part)
        elif is_scheduler(part):
            raise ValueError(
                f"configure_optimizers returned a {type(part).__name__}, as for Lightning, which "
                "steps it once per epoch, while configure_schedulers here means once per step; "
                'say which: {"scheduler": scheduler, "interval": "epoch"} or "step"'
            )
        else:
            raise TypeError(
                "configure_optimizers returned "
                f"{part!r:.80}; optimizers are required, alone, in a list or as the values of a "
                "dict"
            )
    return optimizers, schedules


def candidates(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What may be a scheduler among a trainer's attributes, by attribute and keys, as "warmup/0".

    Looks into lists, tuples and dicts. Any object with a method `step` may be one, unless it is an
    optimizer; and a dict of options with a scheduler.
    """
    return {path: each for name, value in attributes.items() for path, each in _within(name, value)}


def find_schedules(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    returned: list[Any],
    optimizers: Mapping[str, Optimizer],
) -> dict[str, LRSchedule]:
    """The schedules of a trainer by name: the attribute and keys, or "scheduler" if returned.

    Schedulers that are parts of others, as in SequentialLR, aren't among them.

    Args:
        before: The candidates before `configure_schedulers`. Of these, schedulers of torch count.
        after: Those after it.
        returned: What `configure_optimizers` and `configure_schedulers` returned.
        optimizers: The trainer's optimizers by name.

    Raises:
        TypeError: If something else was returned, or a scheduler can't be saved or stepped.
        ValueError: If options contradict each other, or aren't known here.
        RuntimeError: If a scheduler changes no optimizer of the trainer, or wasn't found.
    """
    known = {id(value) for value in before.values()}
    found: list[Found] = []
    for name, value in after.items():
        if id(value) not in known or isinstance(value, (LRScheduler, LRSchedule, dict)):
            found.append((name, *_schedule_of(value)))
        elif is_scheduler(value) and _optimizers_in(value, optimizers.values()):
            raise RuntimeError(
                f"self.{name} ({type(value).__name__}) looks like a scheduler, and isn't one of "
                "torch's; assign it in configure_schedulers, where it is stepped with each step "
                "and saved, or return it there as LRSchedule(self."
                f'{name}, interval="manual") and call its step yourself'
            )
    found += [(None, *_schedule_of(part)) for part in _parts(returned)]
    schedules = _merged(found)
    parts = {id(part) for _, each, _ in found for part in _parts_of(each.scheduler, set())}
    explicit = {id(each.scheduler) for _, each, is_explicit in found if is_explicit}
    for name, each in schedules.items():
        if id(each.scheduler) in parts & explicit:
            raise ValueError(
                f"scheduler {name!r} is a part of another one, which steps it; give options to the "
                "other one alone"
            )
    _refuse_lost([each.scheduler for _, each, _ in found], optimizers)
    return {
        name: _with_optimizer(name, each, optimizers)
        for name, each in schedules.items()
        if id(each.scheduler) not in parts
    }


def free_name(kind: str, taken: Container[str]) -> str:
    """A name for a part without an attribute: "optimizer", "optimizer_2", …"""
    numbered = (f"{kind}_{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([kind], numbered) if name not in taken)


def _within(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, LRSchedule) or _has_options(value):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        if name.count("/") < _MAX_DEPTH and len(value) <= _MAX_ITEMS:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for index, (key, part) in enumerate(items):
                yield from _within(f"{name}/{key if isinstance(key, (str, int)) else index}", part)
    elif callable(getattr(type(value), "step", None)):
        if not isinstance(value, Optimizer) and not hasattr(type(value), "zero_grad"):
            yield name, value


def _schedule_of(value: Any) -> tuple[LRSchedule, bool]:
    """The schedule, and whether its options were given."""
    if isinstance(value, LRSchedule):
        return value, True
    if _has_options(value):
        return _from_options(value), True
    if is_scheduler(value):
        return LRSchedule(value), False
    if callable(getattr(type(value), "step", None)) and not isinstance(value, Optimizer):
        raise TypeError(
            f"a {type(value).__name__} in configure_schedulers has a method step, and no "
            "state_dict and load_state_dict, so a resumed run would start its schedule again; "
            "write both"
        )
    raise TypeError(
        f"configure_schedulers returned {value!r:.80}; schedulers are required, or LRSchedule(…), "
        "alone, in a list or as the values of a dict"
    )


def _parts(returned: Any) -> Iterator[Any]:
    """What was returned alone, in lists, tuples and as the values of dicts."""
    if isinstance(returned, Mapping) and not _has_options(returned):
        scheduler = returned.get("lr_scheduler")
        if "optimizer" in returned and "monitor" in returned and is_scheduler(scheduler):
            # Lightning's short form for ReduceLROnPlateau.
            yield returned["optimizer"]
            yield LRSchedule(scheduler, monitor=returned["monitor"])
            return
        for value in returned.values():
            yield from _parts(value)
    elif isinstance(returned, (list, tuple)):
        for value in returned:
            yield from _parts(value)
    elif returned is not None:
        yield returned


def _has_options(value: Any) -> bool:
    """Whether a value is a dict of a scheduler's options, as Lightning's."""
    return isinstance(value, dict) and is_scheduler(value.get("scheduler"))


def _from_options(options: Mapping[str, Any]) -> LRSchedule:
    scheduler = options["scheduler"]
    kind = type(scheduler).__name__
    for name, value in options.items():
        if name in _OPTIONS:
            continue
        same = _LIGHTNINGS_OPTIONS.get(name, ...)
        if same is ... or (same is not None and value != same):
            raise ValueError(
                f"option {name!r}: {value!r} of {kind} isn't known here; write LRSchedule("
                'scheduler, interval=…, monitor=…), or with interval="manual" call its step in a '
                "callback"
            )
    is_by_result = (
        isinstance(scheduler, ReduceLROnPlateau)
        or not isinstance(scheduler, LRScheduler)
        or options.get("reduce_on_plateau")
    )  # Lightning ignores the monitor of others
    monitor = options.get("monitor") if is_by_result else None
    if "interval" not in options and monitor is None:
        raise ValueError(
            f'{{"scheduler": {kind}}} has no "interval": Lightning\'s default is "epoch", while a '
            'scheduler alone is stepped with each step here; add "interval": "epoch" or "step"'
        )
    return LRSchedule(scheduler, interval=options.get("interval"), monitor=monitor)


def _merged(found: list[Found]) -> dict[str, LRSchedule]:
    """Each scheduler once, by its first name, with the options that were given."""
    names: dict[int, str] = {}
    schedules: dict[str, LRSchedule] = {}
    explicit: dict[str, LRSchedule] = {}
    for name, schedule, is_explicit in found:
        own_name = names.get(id(schedule.scheduler))
        if own_name is None:
            own_name = name or free_name("scheduler", schedules)
            names[id(schedule.scheduler)] = own_name
        if is_explicit:
            other = explicit.setdefault(own_name, schedule)
            if other.options != schedule.options:
                raise ValueError(
                    f"scheduler {own_name!r} has two intervals or monitors: {other.options} and "
                    f"{schedule.options}; give one LRSchedule for it"
                )
        if is_explicit or own_name not in schedules:
            schedules[own_name] = schedule
    return schedules


def _parts_of(scheduler: Any, seen: set[int]) -> Iterator[Any]:
    """The schedulers that a scheduler has in its attributes, and their parts."""
    for value in getattr(scheduler, "__dict__", {}).values():
        is_dict, is_list = isinstance(value, dict), isinstance(value, (list, tuple))
        for part in value.values() if is_dict else value if is_list else [value]:
            if is_scheduler(part) and id(part) not in seen:
                seen.add(id(part))
                yield part
                yield from _parts_of(part, seen)


def _optimizers_in(scheduler: Any, optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    values = [*getattr(scheduler, "__dict__", {}).values(), getattr(scheduler, "optimizer", None)]
    return [each for each in optimizers if any(value is each for value in values)]


def _with_optimizer(
    name: str, schedule: LRSchedule, optimizers: Mapping[str, Optimizer]
) -> LRSchedule:
    scheduler, own = schedule.scheduler, list(optimizers.values())
    given = [] if schedule.optimizer is None else [schedule.optimizer]
    followed = given or _optimizers_in(scheduler, own)
    if not followed and not isinstance(scheduler, LRScheduler) and len(own) == 1:
        followed = own
    if not any(optimizer is each for optimizer in followed for each in own):
        several = "LRSchedule(scheduler, optimizer=…) says which it follows; "
        raise RuntimeError(
            f"scheduler {name!r} ({type(scheduler).__name__}) refers to none of the optimizers "
            f"({', '.join(optimizers)}), so training wouldn't follow its schedule; "
            f"{several if not isinstance(scheduler, LRScheduler) else ''}make schedulers from "
            "optimizers of configure_optimizers"
        )
    return dataclasses.replace(schedule, optimizer=followed[0])


def _refuse_lost(found: list[Any], optimizers: Mapping[str, Optimizer]) -> None:
    """Refuse a scheduler of torch that was made and isn't among those found."""
    schedulers = [*found, *(part for each in found for part in _parts_of(each, set()))]
    for name, optimizer in optimizers.items():
        if not torch_private.has_scheduler(optimizer):
            continue
        if not any(_optimizers_in(each, [optimizer]) for each in schedulers):
            raise RuntimeError(
                f"a scheduler was made of optimizer {name!r}, and it is neither assigned to an "
                "attribute of the trainer nor returned, so it would be neither stepped nor saved; "
                "assign it, as in self.scheduler = …, or return it from configure_schedulers"
            )
