"""Prefetch lists from orders of execution."""

from __future__ import annotations

import pytest

from dream_callbacks.fsdp.prefetch import Event, Phase, backward_lists, forward_lists

PHASES: dict[str, Phase] = {"f": "forward", "r": "recompute", "b": "backward"}


def events(text: str) -> list[Event[str]]:
    """Events from "f: a b  b: b a": phases and the modules in them."""
    found: list[Event[str]] = []
    phase: Phase = "forward"
    for word in text.split():
        if word.endswith(":"):
            phase = PHASES[word[0]]
        else:
            found.append(Event(phase, word))
    return found


def lists(text: str) -> dict[str, tuple[str, ...]]:
    """Lists from "a:b,c b:c c:"."""
    pairs = (item.split(":") for item in text.split())
    return {name: tuple(filter(None, others.split(","))) for name, others in pairs}


@pytest.mark.parametrize(
    ("order", "depth", "expected"),
    [
        pytest.param("", 1, "", id="nothing ran"),
        pytest.param("f: r a b c", 1, "r:a a:b b:c", id="a chain, one ahead"),
        pytest.param("f: r a b c", 2, "r:a,b a:b,c b:c", id="a chain, two ahead"),
        pytest.param("f: a b c", 9, "a:b,c b:c", id="deeper than the model"),
        pytest.param("f: r b m t b2 m2", 1, "r:b b:m m:t t:b2 b2:m2", id="nested modules"),
        pytest.param("f: a b a c", 1, "b:a", id="called twice, with different successors"),
        pytest.param("f: a b a b", 1, "a:b", id="called twice, with the same successor"),
        pytest.param("f: a b a b a b", 2, "a:b", id="a loop, not past its own next call"),
        pytest.param("f: a a b", 1, "", id="called twice in a row"),
        pytest.param("f: a b c a b d", 2, "a:b c:a,b", id="called twice, partly alike"),
        pytest.param("f: r a b  b: b a", 3, "r:a,b a:b", id="not across the end of forward"),
        pytest.param(
            "f: a b  b: b a  f: a b  b: b a", 1, "a:b", id="the same in the next microbatch"
        ),
        pytest.param(
            "f: a b c  b: c b a  f: a c  b: c a", 1, "b:c", id="left out in the next microbatch"
        ),
        pytest.param("f: a b f: a b c  b: c b a", 1, "a:b", id="a first pass stops early"),
        pytest.param("f: r a b  r: b  b: b  r: a  b: a", 1, "r:a", id="recomputed in backward"),
    ],
)
def test_forward_prefetches_what_always_follows(order, depth, expected):
    assert forward_lists(events(order), depth) == lists(expected)


@pytest.mark.parametrize(
    ("order", "depth", "kept", "expected"),
    [
        pytest.param("f: a b", 1, "", "", id="no backward"),
        pytest.param("f: r a b c  b: r c b a", 1, "r", "r:c c:b b:a a:", id="a chain, one ahead"),
        pytest.param(
            "f: r a b c  b: r c b a", 2, "r", "r:c,b c:b,a b:a a:", id="a chain, two ahead"
        ),
        pytest.param("f: r a b c  b: r c b", 1, "r", "r:c c:b b:", id="the first is frozen"),
        pytest.param(
            "f: b m t  b: b t m", 1, "", "b:t t:m m:", id="nested, not the reverse of forward"
        ),
        pytest.param("f: a b c  b: c b a", 1, "b", "c:a b:a a:", id="kept ones take no place"),
        pytest.param("f: a b  b: b a", 1, "a b", "b: a:", id="all are kept"),
        pytest.param("f: a b a c  b: c a b a", 1, "", "c:a b:a", id="called twice: torch's own"),
        pytest.param("f: a b a b  b: b a b a", 1, "", "b:a", id="a loop: torch's own at its end"),
        pytest.param(
            "f: r a b  r: b  b: b  r: a  b: a", 1, "", "b:a a:", id="recomputed in between"
        ),
        pytest.param(
            "f: a b  b: b a  f: a b  b: b a", 1, "", "b:a a:", id="the same in the next microbatch"
        ),
        pytest.param(
            "f: a b c  b: c b a  f: a c  b: c a", 1, "", "b:a a:", id="left out in the next one"
        ),
    ],
)
def test_backward_prefetches_what_always_follows_and_marks_the_end(order, depth, kept, expected):
    assert backward_lists(events(order), depth, kept.split()) == lists(expected)
