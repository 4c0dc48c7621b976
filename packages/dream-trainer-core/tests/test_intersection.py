"""`A & B` and `@intersection` of trainer mixins; other bases of a trainer."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pytest
from torch.distributed.checkpoint.stateful import Stateful

from dream_trainer.callbacks import Callback, intersection
from dream_trainer.interface.intersection import Intersection, members_of
from dream_trainer.testing import TinyTrainer, tiny_config
from dream_trainer.trainer import AbstractTrainer


class A(AbstractTrainer): ...


class B(AbstractTrainer): ...


class C(AbstractTrainer): ...


@intersection
class Both(A, B): ...


def test_and_collects_members_in_order() -> None:
    assert (A & B).members == (A, B)  # type: ignore[operator]
    assert (A & B & C).members == (A, B, C)  # type: ignore[operator]
    assert (A & (B & C)).members == (A, B, C)  # type: ignore[operator]
    assert ((A & B) & (B & C)).members == (A, B, B, C)  # type: ignore[operator]
    assert (Both & C).members == (A, B, C)  # type: ignore[operator]
    assert repr(A & B) == "A & B"  # type: ignore[operator]


def test_and_ignores_requirements_that_cannot_be_checked() -> None:
    assert (A & Any).members == (A,)  # type: ignore[operator]


def test_members_of_an_intersection_class_are_its_bases() -> None:
    class Derived(Both): ...

    @intersection
    class Nested(Both, C): ...

    assert members_of(Both) == (A, B)
    assert members_of(Nested) == (A, B, C)
    assert members_of(Derived) == (Derived,)
    assert members_of(Any) == ()
    assert members_of(Intersection((A,))) == (A,)


def test_an_intersection_class_is_still_a_class() -> None:
    class Trainer(Both): ...

    assert issubclass(Trainer, Both)
    assert issubclass(Trainer, A)


def test_a_trainer_may_derive_from_protocols(tmp_path: Path) -> None:
    @runtime_checkable
    class HasName(Protocol):
        name: str

    class Trainer(TinyTrainer, Stateful, HasName):
        name = "mine"

    trainer = Trainer(tiny_config(tmp_path))

    assert isinstance(trainer, Trainer) and isinstance(trainer, Stateful)
    assert isinstance(trainer, HasName)
    assert not isinstance(3, Trainer)
    assert not isinstance(object(), AbstractTrainer)


def test_abstract_methods_are_still_required(tmp_path: Path) -> None:
    class Trainer(TinyTrainer):
        @abc.abstractmethod
        def something(self) -> None: ...

    with pytest.raises(TypeError, match="abstract"):
        Trainer(tiny_config(tmp_path))  # type: ignore[abstract]


def test_a_requirement_that_is_a_protocol_is_checked_by_its_members(tmp_path: Path) -> None:
    class Needs(Callback[Stateful]): ...  # type: ignore[type-var]

    TinyTrainer(tiny_config(tmp_path, [Needs()]))
