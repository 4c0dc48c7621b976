"""Rank-local values after a change of the number of ranks."""

from __future__ import annotations

import pytest

from dream_callbacks.checkpoint.restore import (
    Source,
    resharded_position,
    resharded_totals,
    source_of,
)


def test_the_same_layout_restores_each_ranks_own_values() -> None:
    found = [source_of(rank, 4, (0, 1, 2, 3)) for rank in range(4)]

    assert found == [Source(rank, is_same=True, is_own=True) for rank in range(4)]


def test_ranks_with_the_same_data_restore_the_first_of_them() -> None:
    # Tensor parallelism of 2 before, none now: ranks 0 and 1 read part 0.
    found = [source_of(dp_rank, 2, (0, 0, 1, 1)) for dp_rank in range(2)]

    assert found == [Source(0, is_same=True, is_own=True), Source(2, is_same=True, is_own=True)]


def test_additional_ranks_restore_modulo_the_saved_size() -> None:
    found = [source_of(rank, 4, (0, 1)) for rank in range(4)]

    assert [source.rank for source in found] == [0, 1, 0, 1]
    assert [source.is_own for source in found] == [True, True, False, False]
    assert not any(source.is_same for source in found)


@pytest.mark.parametrize(
    ("done", "before", "now", "accumulation", "expected"),
    [
        (3, 6, 6, 1, (3, True)),  # same global batch: half the size on each of twice as many ranks
        (3, 6, 3, 1, (1, False)),  # twice as many ranks, each with the same batches
        (4, 6, 3, 1, (2, True)),
        (3, 6, 12, 1, (6, True)),  # half as many ranks
        (3, 6, 12, 4, (4, False)),  # a step is 4 batches now
        (6, 6, 7, 4, (7, True)),  # a complete epoch stays complete
        (0, 6, 3, 2, (0, True)),
    ],
)
def test_the_fraction_of_the_epoch_is_kept(
    done: int, before: int, now: int, accumulation: int, expected: tuple[int, bool]
) -> None:
    assert resharded_position(done, before, now, accumulation) == expected


def test_sums_of_the_epoch_are_kept() -> None:
    saved = [{"loss": [1.0, 4]}, {"loss": [2.0, 4]}]

    assert resharded_totals(saved, rank=0, ranks_per_part=1) == {"loss": [3.0, 8]}
    assert resharded_totals(saved, rank=1, ranks_per_part=1) == {"loss": [0.0, 0]}


def test_sums_are_kept_if_several_ranks_read_the_same_data() -> None:
    found = resharded_totals([{"loss": [1.0, 4]}], rank=0, ranks_per_part=2)

    assert found == {"loss": [2.0, 8]}
