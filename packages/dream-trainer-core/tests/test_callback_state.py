"""States of callbacks: by name, plain, kept if no callback claims them."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from dream_trainer.callbacks import Callback, CallbackCollection, RankLocal, RankZeroCallback
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config


class Holds(Callback[Any]):
    """Has a value as its state, and records the trainer that it was loaded with."""

    loaded_with: Any = "nobody"

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any], trainer: Any) -> None:
        self.value = state_dict["value"]
        self.loaded_with = trainer


class HoldsWithoutTrainer(Holds):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        self.value = state_dict["value"]


class Stateless(Callback[Any]):
    def post_fit(self) -> None: ...


def test_two_callbacks_of_a_class_have_their_own_states() -> None:
    state = CallbackCollection([Holds(1), Stateless(), Holds(2)]).state_dict()
    collection = CallbackCollection([Holds(), Stateless(), Holds()])
    collection.load_state_dict(state)

    assert state == {"Holds": {"value": 1}, "Holds_2": {"value": 2}}
    assert [collection["Holds"].value, collection["Holds_2"].value] == [1, 2]


def test_a_state_is_loaded_by_name_not_by_order() -> None:
    state = CallbackCollection({"slow": Holds(1), "fast": Holds(2)}).state_dict()
    collection = CallbackCollection({"fast": Holds(), "slow": Holds()})
    collection.load_state_dict(state)

    assert (collection["slow"].value, collection["fast"].value) == (1, 2)


# With and without the trainer


def test_load_state_dict_gets_the_trainer_if_it_takes_it(tmp_path: Path) -> None:
    collection = CallbackCollection([Holds(), HoldsWithoutTrainer()])
    trainer = TinyTrainer(tiny_config(tmp_path, collection))
    collection.load_state_dict({"Holds": {"value": 1}, "HoldsWithoutTrainer": {"value": 2}})

    assert collection["Holds"].loaded_with is trainer
    assert (collection["Holds"].value, collection["HoldsWithoutTrainer"].value) == (1, 2)


def test_the_trainer_can_be_passed() -> None:
    collection = CallbackCollection([Holds()])
    trainer: Any = object()
    collection.load_state_dict({"Holds": {"value": 1}}, trainer)
    assert collection["Holds"].loaded_with is trainer

    collection.load_state_dict({"Holds": {"value": 1}})
    assert collection["Holds"].loaded_with is None


def test_an_option_with_a_default_is_not_the_trainer() -> None:
    class Module(Callback[Any]):
        seen: Any = None

        def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:  # type: ignore[override]
            self.seen = strict

    class Anything(Callback[Any]):
        seen: Any = None

        def load_state_dict(self, *args: Any) -> None:
            self.seen = args[1]

    collection = CallbackCollection([Module(), Anything()])
    trainer: Any = object()
    collection.load_state_dict({"Module": {}, "Anything": {}}, trainer)

    assert collection["Module"].seen is True
    assert collection["Anything"].seen is trainer


# Names that don't match


def test_unknown_and_missing_names_warn_and_list_both_sides() -> None:
    collection = CallbackCollection({"new": Holds(5), "kept": Holds()})
    expected = (
        "states were saved for old, kept, and the callbacks with a state are new, kept: "
        "old will be kept for a later run, and new will start without a state; "
        "give callbacks the names they were saved under"
    )
    with pytest.warns(UserWarning, match=f"^{expected}$") as caught:
        collection.load_state_dict({"old": {"value": 1}, "kept": {"value": 2}})

    assert caught[0].filename == __file__
    assert (collection["new"].value, collection["kept"].value) == (5, 2)


def test_the_warning_lists_only_what_applies() -> None:
    with pytest.warns(UserWarning, match=r": Holds will start without a state; give callbacks"):
        CallbackCollection([Holds()]).load_state_dict({})
    with pytest.warns(UserWarning, match=r": Gone will be kept for a later run; give callbacks"):
        CallbackCollection().load_state_dict({"Gone": {}})


def test_an_unclaimed_state_is_saved_again() -> None:
    collection = CallbackCollection([Holds(1)])
    with pytest.warns(UserWarning, match="Gone will be kept"):
        collection.load_state_dict({"Gone": {"n": 7}, "Holds": {"value": 2}})
    again = CallbackCollection([("Gone", Holds()), Holds()])
    again.load_state_dict({**collection.state_dict(), "Gone": {"value": 8}})

    assert collection.state_dict() == {"Gone": {"n": 7}, "Holds": {"value": 2}}
    assert again["Gone"].value == 8
    assert again.state_dict()["Gone"] == {"value": 8}


def test_a_state_of_a_callback_without_state_is_kept() -> None:
    collection = CallbackCollection({"x": Stateless()})
    with pytest.warns(UserWarning, match="x will be kept"):
        collection.load_state_dict({"x": {"n": 1}})

    assert collection.state_dict() == {"x": {"n": 1}}


def test_the_state_of_an_added_callback_replaces_an_unclaimed_one() -> None:
    collection = CallbackCollection()
    with pytest.warns(UserWarning, match="Holds will be kept"):
        collection.load_state_dict({"Holds": {"value": 1}})
    collection.append(Holds(2))

    assert collection.state_dict() == {"Holds": {"value": 2}}


@pytest.mark.parametrize("saved", [{}, {"Holds": {"value": 1}, "Gone": {}}])
def test_strict_raises_before_anything_is_loaded(saved: dict[str, Any]) -> None:
    collection = CallbackCollection([Holds(5)])
    with pytest.raises(KeyError, match="states were saved for"):
        collection.load_state_dict(saved, strict=True)

    assert collection["Holds"].value == 5


def test_matching_names_do_not_warn() -> None:
    collection = CallbackCollection([Holds(), Stateless()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collection.load_state_dict({"Holds": {"value": 1}}, strict=True)


# Plain data


class Opaque: ...


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (Opaque(), r"a Opaque at state_dict\(\)\['value'\]"),
        ({"best": [1, Opaque()]}, r"a Opaque at state_dict\(\)\['value'\]\['best'\]\[1\]"),
        (Path("x"), r"a PosixPath at state_dict\(\)\['value'\]"),
        (lambda: 1, r"a function at state_dict\(\)\['value'\]"),
    ],
    ids=["object", "nested", "path", "function"],
)
def test_a_state_that_is_not_plain_is_refused_with_callback_and_key(value: Any, place: str) -> None:
    with pytest.raises(TypeError, match=f"state of callback mine holds {place}.*return plain data"):
        CallbackCollection({"mine": Holds(value)}).state_dict()


@pytest.mark.parametrize("returned", [None, [("n", 1)], 3])
def test_a_state_that_is_not_a_dict_is_refused(returned: Any) -> None:
    class Forgets(Callback[Any]):
        def state_dict(self) -> Any:
            return returned

    with pytest.raises(TypeError, match=r"Forgets\.state_dict\(\) returned .*; a dict is required"):
        CallbackCollection([Forgets()]).state_dict()


def test_a_saved_state_loads_with_weights_only() -> None:
    value = {"n": 1, "best": float("inf"), "names": ("a", None), "average": torch.ones(2)}
    file = io.BytesIO()
    torch.save(CallbackCollection([Holds(value)]).state_dict(), file)
    file.seek(0)
    collection = CallbackCollection([Holds()])
    collection.load_state_dict(torch.load(file, weights_only=True))

    assert collection["Holds"].value.pop("average").equal(value.pop("average"))
    assert collection["Holds"].value == value


# Errors


def test_an_error_in_a_state_method_names_the_callback(tmp_path: Path) -> None:
    class Broken(Callback[Any]):
        def state_dict(self) -> dict[str, Any]:
            raise ZeroDivisionError

        def load_state_dict(self, state_dict: dict[str, Any], trainer: Any) -> None:
            state_dict["best"]

    trainer = TinyTrainer(tiny_config(tmp_path, CallbackCollection({"mine": Broken()})))
    for error, method, use in (
        (ZeroDivisionError, "state_dict", trainer.callbacks.state_dict),
        (KeyError, "load_state_dict", lambda: trainer.callbacks.load_state_dict({"mine": {}})),
    ):
        with pytest.raises(error) as caught:
            use()
        assert caught.value.__notes__ == [f"raised in mine.{method} on rank 0 at step 0 (epoch 0)"]


# Ranks


class Position(Callback[Any]):
    def __init__(self, value: int = -1) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"position": RankLocal(self.value), "deep": [RankLocal({"n": self.value})]}

    def load_state_dict(self, state_dict: dict[str, Any], trainer: Any) -> None:
        self.value = state_dict["position"] + state_dict["deep"][0]["n"]


def test_rank_local_values_are_loaded_unwrapped() -> None:
    collection = CallbackCollection([Position(3)])
    state = collection.state_dict()
    collection.load_state_dict(state)

    assert isinstance(state["Position"]["position"], RankLocal)
    assert collection["Position"].value == 6


class RankZeroHolds(RankZeroCallback[Any], Holds): ...


def states_on_rank(root: str) -> tuple[list[str], list[str], int]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collection = CallbackCollection([Holds(1), RankZeroHolds(2)])
        trainer = TinyTrainer(tiny_config(root, collection))
        own = sorted(collection.state_dict())
        collection.load_state_dict({"Holds": {"value": 5}, "RankZeroHolds": {"value": 6}})
        again = sorted(collection.state_dict())
        return own, again, collection["RankZeroHolds"].value + trainer.world.rank


def test_the_state_of_a_rank_zero_callback_is_that_of_rank_0(tmp_path: Path) -> None:
    zero, one = run_on_ranks(states_on_rank, 2, str(tmp_path))

    assert zero == (["Holds", "RankZeroHolds"], ["Holds", "RankZeroHolds"], 6)
    assert one == (["Holds"], ["Holds"], 2 + 1)
