"""NamedCallbacks: names and the mapping protocol."""

from __future__ import annotations

from typing import Any

import pytest

from dream_trainer.callbacks import Callback, CallbackCollection


class A(Callback[Any]):
    def post_fit(self) -> None: ...


class B(Callback[Any]):
    def post_fit(self) -> None: ...


def test_callbacks_get_the_name_of_their_class_and_a_number() -> None:
    collection = CallbackCollection([A(), B(), A(), A()])

    assert collection.keys() == ("A", "B", "A_2", "A_3")


def test_a_number_in_use_is_skipped() -> None:
    collection = CallbackCollection([A(), ("A_2", B()), A()])
    collection.append(A())

    assert collection.keys() == ("A", "A_2", "A_3", "A_4")


def test_a_freed_number_is_reused() -> None:
    collection = CallbackCollection([A(), A(), A()])
    del collection["A_2"]
    collection.append(A())

    assert collection.keys() == ("A", "A_3", "A_2")


def test_callbacks_can_be_given_with_names() -> None:
    a, b = A(), B()

    assert CallbackCollection({"x": a, "y": b}).items() == (("x", a), ("y", b))
    assert CallbackCollection([("x", a), b]).items() == (("x", a), ("B", b))
    assert CallbackCollection(iter([("x", a)])).items() == (("x", a),)


def test_a_collection_made_from_a_collection_keeps_names() -> None:
    collection = CallbackCollection({"x": A(), "y": B()})

    assert CallbackCollection(collection).items() == collection.items()


def test_it_reads_like_a_mapping_but_iterates_over_callbacks() -> None:
    a, b = A(), B()
    collection = CallbackCollection([a, b])

    assert collection["A"] is a
    assert collection.get("A") is a
    assert collection.get("C") is None
    assert collection.get("C", b) is b
    assert len(collection) == 2
    assert list(collection) == [a, b] == list(collection.values())
    assert "A" in collection and "C" not in collection
    assert b in collection and A() not in collection
    assert dict(collection) == {"A": a, "B": b} == {**collection}  # type: ignore[call-overload]
    assert not CallbackCollection()
    assert repr(CallbackCollection({"x": a})) == f"CallbackCollection({{'x': {a!r}}})"


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    collection = CallbackCollection([A(), B()])
    for change in (
        lambda: collection["C"],
        lambda: collection.pop("C"),
        lambda: collection.__delitem__("C"),
    ):
        with pytest.raises(KeyError, match="no callback is called 'C'; there are A, B"):
            change()
    with pytest.raises(KeyError, match="there are none"):
        CallbackCollection()["C"]


def test_assigning_adds_at_the_end_or_replaces_in_place() -> None:
    a, b, c = A(), B(), A()
    collection = CallbackCollection([a, b])
    collection["C"] = c
    collection["A"] = replacement = B()
    collection["A"] = replacement

    assert collection.items() == (("A", replacement), ("B", b), ("C", c))


def test_appending_under_a_name() -> None:
    collection = CallbackCollection([A()])
    collection.append(A(), "mine")
    collection.append(A(), name="yours")

    assert collection.keys() == ("A", "mine", "yours")


def test_removing_returns_what_was_removed() -> None:
    a, b, c = A(), B(), A()
    collection = CallbackCollection({"a": a, "b": b, "c": c})

    assert collection.pop("a") is a
    assert collection.pop("a", None) is None
    assert collection.pop("a", b) is b
    assert collection.popitem() == ("c", c)
    del collection["b"]
    assert len(collection) == 0
    with pytest.raises(KeyError, match="no callback to pop"):
        collection.popitem()


def test_update_and_ior_take_mappings_collections_and_pairs() -> None:
    a, b, c, d = A(), B(), A(), B()
    collection = CallbackCollection({"a": a})
    same = collection
    collection |= {"b": b}
    collection |= CallbackCollection({"c": c})
    collection.update([("d", d)])

    assert collection is same
    assert collection.items() == (("a", a), ("b", b), ("c", c), ("d", d))


def test_setdefault_keeps_an_existing_callback() -> None:
    a, b = A(), B()
    collection = CallbackCollection({"a": a})

    assert collection.setdefault("a", b) is a
    assert collection.setdefault("b", b) is b
    assert collection.keys() == ("a", "b")


def test_clear() -> None:
    collection = CallbackCollection([A(), B()])
    collection.clear()

    assert collection.keys() == ()


@pytest.mark.parametrize(
    ("thing", "found"),
    [
        (A, r"A'> is a type, not a Callback; create an instance: add \(\)"),
        ("A", "'A' is a str, not a Cal"),
    ],
)
def test_a_value_that_is_not_a_callback_is_refused(thing: Any, found: str) -> None:
    collection = CallbackCollection()
    for change in (
        lambda: CallbackCollection([thing]),
        lambda: CallbackCollection({"x": thing}),
        lambda: collection.append(thing),
        lambda: collection.update({"x": thing}),
        lambda: collection.__setitem__("x", thing),
    ):
        with pytest.raises(TypeError, match=found):
            change()
    assert len(collection) == 0


def test_adding_a_callback_twice_is_refused() -> None:
    a = A()
    collection = CallbackCollection([a])
    for change in (
        lambda: CallbackCollection([a, a]),
        lambda: collection.append(a),
        lambda: collection.__setitem__("other", a),
    ):
        with pytest.raises(ValueError, match="this A is in the collection already, as 'A'"):
            change()


def test_using_a_name_twice_is_refused() -> None:
    collection = CallbackCollection({"x": A()})

    with pytest.raises(ValueError, match=r"called 'x' already.*assign collection\['x'\]"):
        collection.append(B(), "x")
    with pytest.raises(ValueError, match="called 'x' already"):
        CallbackCollection([("x", A()), ("x", B())])


@pytest.mark.parametrize("name", [3, "", None])
def test_an_invalid_name_is_refused(name: Any) -> None:
    with pytest.raises(TypeError, match="can't name a callback"):
        CallbackCollection()[name] = A()


def test_an_update_that_fails_changes_nothing() -> None:
    a, b = A(), B()
    collection = CallbackCollection({"a": a, "b": b})

    with pytest.raises(ValueError, match="in the collection already, as 'b'"):
        collection |= {"c": A(), "a": B(), "d": b}
    assert collection.items() == (("a", a), ("b", b))


def test_a_loop_over_the_collection_may_change_it() -> None:
    collection = CallbackCollection([A(), B(), A()])
    for name, callback in collection.items():
        if isinstance(callback, A):
            del collection[name]
    for _ in collection:
        collection.append(A())

    assert collection.keys() == ("B", "A")
