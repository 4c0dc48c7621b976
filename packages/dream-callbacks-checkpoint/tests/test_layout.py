"""Names: each has one meaning, and none leads out of the directory."""

from __future__ import annotations

import pytest

from dream_callbacks.checkpoint import layout


@pytest.mark.parametrize("step", [0, 1, 200, 9_999_999_999, 10_000_000_000, 10**15])
def test_a_step_comes_back_from_its_name(step: int) -> None:
    assert layout.step_of(layout.checkpoint_name(step)) == step
    assert layout.step_of_metrics(layout.metrics_name(step)) == step
    assert layout.step_of_replaced(layout.replaced_name(step, "0f" * 16)) == step


def test_names_sort_as_steps_do() -> None:
    steps = [0, 9, 10, 99, 100, 12345, 9_999_999_999]

    names = [layout.checkpoint_name(step) for step in steps]

    assert names == sorted(names)


@pytest.mark.parametrize(
    "name",
    [
        "step-1",
        "step-00000000001",  # another spelling of step-0000000001
        "step-0000000001 ",
        "step-0000000001\n",
        "step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661",
        "step--000000001",
        ".tmp-step-0000000001-ab",
        ".old-step-0000000001-ab",
        "STEP-0000000001",
        "step-0000000001.bak",
        "metrics-0000000001.json",
        "",
    ],
)
def test_other_names_are_no_checkpoints(name: str) -> None:
    assert layout.step_of(name) is None


def test_only_unfinished_things_are_leftovers() -> None:
    unique = "0123456789abcdef"
    leftovers = [
        layout.temporary_name(3, unique),
        layout.trash_name(unique),
        layout.probe_name(unique),
        f"{layout.metrics_name(3)}.{unique}.tmp",
    ]
    others = [
        layout.checkpoint_name(3),
        layout.replaced_name(3, unique),
        layout.metrics_name(3),
        layout.LOCK,
        ".trash",
        "notes.tmp",
        ".tmp-mine",
    ]

    assert [name for name in [*leftovers, *others] if layout.is_leftover(name)] == leftovers


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "", "a\\b", "a\0b", "é", "x" * 129])
def test_a_file_name_leads_nowhere_else(name: str) -> None:
    assert not layout.is_file_name(name)


def test_the_files_of_a_checkpoint_have_file_names() -> None:
    names = [layout.MANIFEST, layout.STATE, layout.INDEX, layout.DCP_METADATA, layout.rank_name(7)]

    assert all(map(layout.is_file_name, [*names, "__0_0.distcp", "__1023_15.distcp"]))


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step=-1"):
        layout.checkpoint_name(-1)
