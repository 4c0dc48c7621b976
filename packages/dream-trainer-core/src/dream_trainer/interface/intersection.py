"""`A & B` and `@intersection`: requirements of several trainer mixins."""

from __future__ import annotations

from typing import Any, TypeVar, get_origin

from typing_extensions import Protocol

T = TypeVar("T", bound=type)

_MARK = "__dream_trainer_intersection__"


class Intersection:
    """The run-time value of `A & B` for trainer mixins.

    Args:
        members: The classes that a trainer must derive from.
    """

    def __init__(self, members: tuple[type, ...]) -> None:
        self.members = members

    def __and__(self, other: Any) -> Intersection:
        return Intersection((*self.members, *members_of(other)))

    def __rand__(self, other: Any) -> Intersection:
        return Intersection((*members_of(other), *self.members))

    def __repr__(self) -> str:
        return " & ".join(member.__name__ for member in self.members)


class TrainerMeta(type(Protocol)):  # type: ignore[misc]  # a metaclass only known at run time
    """Metaclass of trainers and mixins: ABCMeta with `A & B`.

    Derives from the metaclass of Protocol, so that a trainer may also derive from a protocol such
    as torch's `Stateful`.
    """

    def __and__(cls, other: Any) -> Intersection:
        return Intersection((*members_of(cls), *members_of(other)))

    def __instancecheck__(cls, instance: Any) -> bool:
        # Protocol's own check reads attributes that only protocols have.
        return type.__instancecheck__(cls, instance)


def intersection(cls: T) -> T:
    """Mark a class as the intersection of its bases.

    The form of `A & B` that every type checker understands. A trainer that derives from all the
    bases meets it, even if it doesn't derive from the class itself::

        @intersection
        class MetricsAndLogs(EvalMetricMixin, LoggerMixin): ...

        class MyCallback(Callback[MetricsAndLogs]): ...
    """
    setattr(cls, _MARK, True)
    return cls


def members_of(requirement: Any) -> tuple[type, ...]:
    """The classes of a requirement; none if it can't be checked, such as `Any`."""
    if isinstance(requirement, Intersection):
        return requirement.members
    requirement = get_origin(requirement) or requirement  # MyTrainer[int]
    if requirement is Any or not isinstance(requirement, type):
        return ()
    if _MARK in vars(requirement):
        return tuple(member for base in requirement.__bases__ for member in members_of(base))
    return (requirement,)
