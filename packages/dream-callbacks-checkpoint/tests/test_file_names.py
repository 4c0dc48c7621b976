"""File names: each has one meaning, and none has path components."""

from __future__ import annotations

import pytest

from dream_callbacks.checkpoint.format import file_names


@pytest.mark.parametrize("step", [0, 1, 200, 9_999_999_999, 10_000_000_000, 10**15])
def test_a_step_round_trips_through_its_name(step: int) -> None:
    assert file_names.step_of(file_names.checkpoint_name(step)) == step
    assert file_names.step_of_metrics(file_names.metrics_name(step)) == step
    assert file_names.step_of_replaced(file_names.replaced_name(step, "0f" * 16)) == step


def test_names_sort_in_the_order_of_steps() -> None:
    steps = [0, 9, 10, 99, 100, 12345, 9_999_999_999]

    names = [file_names.checkpoint_name(step) for step in steps]

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
def test_other_names_are_not_checkpoints(name: str) -> None:
    assert file_names.step_of(name) is None


def test_only_interrupted_writes_are_leftovers() -> None:
    unique = "0123456789abcdef"
    leftovers = [
        file_names.temporary_name(3, unique),
        file_names.trash_name(unique),
        file_names.probe_name(unique),
        f"{file_names.metrics_name(3)}.{unique}.tmp",
    ]
    others = [
        file_names.checkpoint_name(3),
        file_names.replaced_name(3, unique),
        file_names.metrics_name(3),
        file_names.LOCK,
        ".trash",
        "notes.tmp",
        ".tmp-mine",
    ]

    assert [name for name in [*leftovers, *others] if file_names.is_leftover(name)] == leftovers


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "", "a\\b", "a\0b", "é", "x" * 129])
def test_a_file_name_has_no_path_components(name: str) -> None:
    assert not file_names.is_file_name(name)


def test_names_of_checkpoint_files_are_valid() -> None:
    names = [
        file_names.MANIFEST,
        file_names.STATE,
        file_names.INDEX,
        ".metadata",
        file_names.rank_name(7),
    ]

    assert all(map(file_names.is_file_name, [*names, "__0_0.distcp", "__1023_15.distcp"]))


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step=-1"):
        file_names.checkpoint_name(-1)
