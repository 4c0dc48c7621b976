"""Order: before and after, stable, with cycles shown; and the plan as data and as a table."""

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


def wishing(name: str, base: type = Base, **wishes: Any) -> Any:
    return type(name, (base,), wishes)()


def order(*callbacks: Any) -> list[str]:
    return list(CallbackCollection(list(callbacks)).plan().hooks["post_fit"])


def test_without_wishes_the_order_is_as_listed() -> None:
    assert order(C(), A(), B(), A()) == ["C", "A", "B", "A_2"]


@pytest.mark.parametrize("wish", [B, "B"], ids=["class", "name"])
def test_before_and_after_move_a_callback_as_little_as_needed(wish: Any) -> None:
    assert order(A(), B(), wishing("X", before={wish}), C()) == ["A", "X", "B", "C"]
    assert order(wishing("X", after={wish}), A(), B(), C()) == ["A", "B", "X", "C"]
    assert order(wishing("X", before={wish}), A(), B()) == ["X", "A", "B"]


def test_a_name_in_the_collection_counts_as_well_as_a_class_name() -> None:
    collection = CallbackCollection([wishing("X", after={"mine"}), ("mine", A()), B()])

    assert collection.plan().hooks["post_fit"] == ("mine", "X", "B")


def test_subclasses_count() -> None:
    class A2(A): ...

    for wish in (A, "A"):
        assert order(wishing("X", after={wish}), A2(), A(), B()) == ["A2", "A", "X", "B"]


def test_wishes_about_callbacks_that_arent_there_are_void() -> None:
    assert order(wishing("X", after={"Nobody", C}), A()) == ["X", "A"]


def test_wishes_may_be_any_collection_and_belong_to_an_instance() -> None:
    x = wishing("X", after=[A, "B"])
    collection = CallbackCollection([x, A(), B(), C()])

    assert collection.plan().hooks["post_fit"] == ("A", "B", "X", "C")
    x.after = (C,)
    collection.refresh()
    assert collection.plan().hooks["post_fit"] == ("A", "B", "C", "X")


def test_a_wish_about_one_callback_leaves_others_of_its_class_alone() -> None:
    first, second, x = A(), A(), wishing("X")
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


# Everyone


@pytest.mark.parametrize("everyone", [Callback, "Callback"], ids=["class", "name"])
def test_after_callback_means_after_everyone(everyone: Any) -> None:
    assert order(wishing("X", after={everyone}), A(), B()) == ["A", "B", "X"]
    assert order(A(), B(), wishing("X", before={everyone})) == ["X", "A", "B"]


def test_those_that_ask_for_the_same_stay_as_listed() -> None:
    assert order(Last(), A(), First(), Last(), First()) == [
        "First",
        "First_2",
        "A",
        "Last",
        "Last_2",
    ]


def test_whoever_asks_to_come_after_the_last_does() -> None:
    assert order(wishing("X", after={Last}), Last(), A()) == ["A", "Last", "X"]
    assert order(wishing("Y", after={"X"}), wishing("X", after={Last}), Last(), A(), B()) == [
        "A",
        "B",
        "Last",
        "X",
        "Y",
    ]


def test_whoever_asks_to_come_before_the_first_does() -> None:
    assert order(A(), First(), wishing("X", before={First})) == ["X", "First", "A"]


def test_two_that_are_last_may_each_have_a_follower() -> None:
    other = wishing("Other", after={Callback})
    followers = wishing("X", after={Last}), wishing("Y", after={"Other"})

    assert order(*followers, Last(), other, A()) == ["A", "Last", "X", "Other", "Y"]


def test_a_wish_that_names_a_callback_wins_over_one_about_everyone() -> None:
    assert order(wishing("X", before={"Last"}, after={Callback}), Last(), A()) == ["A", "X", "Last"]
    assert order(wishing("X", before={Callback}, after={"A"}), B(), A()) == ["A", "X", "B"]


def test_callbacks_that_want_to_be_after_their_own_kind_leave_each_other_alone() -> None:
    class Upload(RankZeroCallback[Any]):
        after = {RankZeroCallback}

        def post_fit(self) -> None: ...

    class Print(RankZeroCallback[Any]):
        def post_fit(self) -> None: ...

    assert order(Upload(), A(), Upload(), Print()) == ["A", "Print", "Upload", "Upload_2"]


def test_any_wishes_without_a_cycle_are_met() -> None:
    """Random wishes that follow a hidden order, listed in another: each of them is met."""
    generator = random.Random(0)
    for _ in range(200):
        hidden = [f"N{i}" for i in range(7)]
        wishes: dict[str, dict[str, set[Any]]] = {
            n: {"before": set(), "after": set()} for n in hidden
        }
        for early, late in itertools.combinations(hidden, 2):
            if generator.random() < 0.2:
                wishes[early]["before"].add(late)
            if generator.random() < 0.2:
                wishes[late]["after"].add(early)
        for name in hidden:
            if generator.random() < 0.15:
                wishes[name][generator.choice(["before", "after"])].add(Callback)
        listed = generator.sample(hidden, len(hidden))

        found = order(*(wishing(name, **wishes[name]) for name in listed))

        for name in hidden:
            assert all(
                found.index(name) < found.index(n) for n in wishes[name]["before"] - {Callback}
            )
            assert all(
                found.index(name) > found.index(n) for n in wishes[name]["after"] - {Callback}
            )


# Cycles


def test_a_cycle_is_an_error_that_shows_it() -> None:
    with pytest.raises(
        ValueError, match=r"can't be ordered: (X after Y after X|Y after X after Y);"
    ):
        order(A(), wishing("X", after={"Y"}), B(), wishing("Y", after={"X"}))
    with pytest.raises(ValueError, match="X after Z after Y after X"):
        order(
            wishing("Follower", after={"X"}),
            wishing("X", after={"Z"}),
            wishing("Y", before={"Z"}, after={"X"}),
            wishing("Z"),
        )


def test_a_change_that_makes_a_cycle_changes_nothing() -> None:
    x = wishing("X", after={"Y"})
    collection = CallbackCollection([x, A()])

    with pytest.raises(ValueError, match="can't be ordered"):
        collection.append(wishing("Y", after={"X"}))
    assert collection.keys() == ("X", "A")
    assert collection.plan().hooks["post_fit"] == ("X", "A")


def test_a_cycle_on_the_way_doesnt_matter() -> None:
    collection = CallbackCollection([wishing("X", after={"Y"}), wishing("Y")])
    collection |= {"Y": wishing("Y", after={"X"}), "X": wishing("X")}

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


def test_plans_without_callbacks_or_without_rank_zero_ones_say_no_more() -> None:
    assert str(CallbackCollection().plan()) == "no callback overrides a hook"
    assert str(CallbackCollection([A()]).plan()) == "post_fit  A"
