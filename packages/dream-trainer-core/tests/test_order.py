"""Order of callbacks by `before` and `after`, errors of cycles, and the plan."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from dream_trainer.callbacks import Callback, CallbackCollection, RankZeroCallback


class Base(Callback[Any]):
    def post_fit(self) -> None: ...


class A(Base): ...


class B(Base): ...


class C(Base): ...


class Last(Base):
    after = {Callback}


class First(Base):
    before = {Callback}


def placed(name: str, base: type = Base, **constraints: Any) -> Any:
    return type(name, (base,), constraints)()


def order(*callbacks: Any) -> list[str]:
    return list(CallbackCollection(list(callbacks)).plan().hooks["post_fit"])


def test_without_constraints_the_order_is_as_listed() -> None:
    assert order(C(), A(), B(), A()) == ["C", "A", "B", "A_2"]


@pytest.mark.parametrize("constraint", [B, "B"], ids=["class", "name"])
def test_before_and_after_move_a_callback_as_little_as_needed(constraint: Any) -> None:
    assert order(A(), B(), placed("X", before={constraint}), C()) == ["A", "X", "B", "C"]
    assert order(placed("X", after={constraint}), A(), B(), C()) == ["A", "B", "X", "C"]
    assert order(placed("X", before={constraint}), A(), B()) == ["X", "A", "B"]


def test_a_name_in_the_collection_counts_as_well_as_a_class_name() -> None:
    collection = CallbackCollection([placed("X", after={"mine"}), ("mine", A()), B()])

    assert collection.plan().hooks["post_fit"] == ("mine", "X", "B")


def test_subclasses_count() -> None:
    class A2(A): ...

    for constraint in (A, "A"):
        assert order(placed("X", after={constraint}), A2(), A(), B()) == ["A2", "A", "X", "B"]


def test_constraints_on_absent_callbacks_have_no_effect() -> None:
    assert order(placed("X", after={"Nobody", C}), A()) == ["X", "A"]


def test_constraints_may_be_any_collection_and_set_on_an_instance() -> None:
    x = placed("X", after=[A, "B"])
    collection = CallbackCollection([x, A(), B(), C()])

    assert collection.plan().hooks["post_fit"] == ("A", "B", "X", "C")
    x.after = (C,)
    collection.refresh()
    assert collection.plan().hooks["post_fit"] == ("A", "B", "C", "X")


def test_a_constraint_on_one_callback_does_not_affect_others_of_its_class() -> None:
    first, second, x = A(), A(), placed("X")
    x.after = (second,)

    assert order(first, x, second, B()) == ["A", "A_2", "X", "B"]
    x.before = (first,)
    x.after = ()
    assert order(first, second, x) == ["A_2", "X", "A"]


def test_hooks_are_called_in_that_order() -> None:
    called: list[str] = []

    class Notes(Callback[Any]):
        def pre_launch(self) -> None:
            called.append(type(self).__name__)

    class Early(Notes): ...

    class Late(Notes):
        after = {Early}

    CallbackCollection([Late(), Notes(), Early()]).pre_launch()

    assert called == ["Notes", "Early", "Late"]


# All callbacks


@pytest.mark.parametrize("all_others", [Callback, "Callback"], ids=["class", "name"])
def test_after_callback_means_after_all_others(all_others: Any) -> None:
    assert order(placed("X", after={all_others}), A(), B()) == ["A", "B", "X"]
    assert order(A(), B(), placed("X", before={all_others})) == ["X", "A", "B"]


def test_callbacks_with_equal_constraints_stay_as_listed() -> None:
    assert order(Last(), A(), First(), Last(), First()) == [
        "First",
        "First_2",
        "A",
        "Last",
        "Last_2",
    ]


def test_a_callback_can_run_after_the_last() -> None:
    assert order(placed("X", after={Last}), Last(), A()) == ["A", "Last", "X"]
    assert order(placed("Y", after={"X"}), placed("X", after={Last}), Last(), A(), B()) == [
        "A",
        "B",
        "Last",
        "X",
        "Y",
    ]


def test_a_callback_can_run_before_the_first() -> None:
    assert order(A(), First(), placed("X", before={First})) == ["X", "First", "A"]


def test_two_that_are_last_may_each_have_a_follower() -> None:
    other = placed("Other", after={Callback})
    followers = placed("X", after={Last}), placed("Y", after={"Other"})

    assert order(*followers, Last(), other, A()) == ["A", "Last", "X", "Other", "Y"]


def test_a_constraint_on_a_callback_overrides_one_on_all() -> None:
    assert order(placed("X", before={"Last"}, after={Callback}), Last(), A()) == [
        "A",
        "X",
        "Last",
    ]
    assert order(placed("X", before={Callback}, after={"A"}), B(), A()) == ["A", "X", "B"]


def test_callbacks_with_a_constraint_on_their_own_class_do_not_conflict() -> None:
    class Upload(RankZeroCallback[Any]):
        after = {RankZeroCallback}

        def post_fit(self) -> None: ...

    class Print(RankZeroCallback[Any]):
        def post_fit(self) -> None: ...

    assert order(Upload(), A(), Upload(), Print()) == ["A", "Print", "Upload", "Upload_2"]


def test_all_constraints_without_a_cycle_are_met() -> None:
    """Random constraints that are consistent with a hidden order, listed in another order."""
    generator = random.Random(0)
    for _ in range(200):
        hidden = [f"N{i}" for i in range(7)]
        constraints: dict[str, dict[str, set[Any]]] = {
            n: {"before": set(), "after": set()} for n in hidden
        }
        for early, late in itertools.combinations(hidden, 2):
            if generator.random() < 0.2:
                constraints[early]["before"].add(late)
            if generator.random() < 0.2:
                constraints[late]["after"].add(early)
        for name in hidden:
            if generator.random() < 0.15:
                constraints[name][generator.choice(["before", "after"])].add(Callback)
        listed = generator.sample(hidden, len(hidden))

        found = order(*(placed(name, **constraints[name]) for name in listed))

        for name in hidden:
            assert all(
                found.index(name) < found.index(n) for n in constraints[name]["before"] - {Callback}
            )
            assert all(
                found.index(name) > found.index(n) for n in constraints[name]["after"] - {Callback}
            )


# Cycles


def test_a_cycle_is_an_error_that_shows_it() -> None:
    with pytest.raises(
        ValueError, match=r"can't be ordered: (X after Y after X|Y after X after Y);"
    ):
        order(A(), placed("X", after={"Y"}), B(), placed("Y", after={"X"}))
    with pytest.raises(ValueError, match="X after Z after Y after X"):
        order(
            placed("Follower", after={"X"}),
            placed("X", after={"Z"}),
            placed("Y", before={"Z"}, after={"X"}),
            placed("Z"),
        )


def test_a_change_that_makes_a_cycle_changes_nothing() -> None:
    x = placed("X", after={"Y"})
    collection = CallbackCollection([x, A()])

    with pytest.raises(ValueError, match="can't be ordered"):
        collection.append(placed("Y", after={"X"}))
    assert collection.keys() == ("X", "A")
    assert collection.plan().hooks["post_fit"] == ("X", "A")


def test_a_temporary_cycle_during_an_update_is_allowed() -> None:
    collection = CallbackCollection([placed("X", after={"Y"}), placed("Y")])
    collection |= {"Y": placed("Y", after={"X"}), "X": placed("X")}

    assert collection.plan().hooks["post_fit"] == ("X", "Y")


# The plan


class Prints(RankZeroCallback[Any]):
    def pre_fit(self) -> None: ...

    def post_train_step(self, result: Any, batch_idx: int) -> None: ...


class Saves(Callback[Any]):
    after = {Callback}

    def post_setup(self) -> None: ...

    def post_train_step(self, result: Any, batch_idx: int) -> None: ...

    def post_fit(self) -> None: ...


def test_the_plan_is_data() -> None:
    plan = CallbackCollection([Saves(), Prints(), A()]).plan()

    assert plan.hooks == {
        "post_setup": ("Saves",),
        "pre_fit": ("Prints",),
        "post_train_step": ("Prints", "Saves"),
        "post_fit": ("A", "Saves"),
    }
    assert plan.rank_zero == {"Prints"}


def test_the_plan_is_shown_as_a_table() -> None:
    plan = CallbackCollection([Saves(), Prints(), A()]).plan()

    assert str(plan).splitlines() == [
        "post_setup       Saves",
        "pre_fit          Prints*",
        "post_train_step  Prints*, Saves",
        "post_fit         A, Saves",
        "                 * on global rank 0 alone",
    ]
    assert repr(plan) == str(plan)
    assert str(plan).isascii()


def test_plans_without_callbacks_or_rank_zero_ones_are_short() -> None:
    assert str(CallbackCollection().plan()) == "no callback overrides a hook"
    assert str(CallbackCollection([A()]).plan()) == "post_fit  A"
