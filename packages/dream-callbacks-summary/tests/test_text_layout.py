import math

import pytest

from dream_callbacks.summary.text_layout import (
    MAX_BAR,
    Bar,
    Piece,
    drawn,
    duration,
    fitted,
    number,
    plain,
    speed,
)

PARTS = [
    Piece("where", importance=9),
    Bar(0.5, importance=2),
    Piece("unimportant", importance=1),
    Piece("number", importance=8),
]


@pytest.mark.parametrize("width", range(1, 90))
def test_a_line_never_is_wider_than_its_width(width: int):
    assert fitted(PARTS, width).cell_len <= width


def test_the_bar_takes_the_room_that_is_left_up_to_a_limit():
    narrow, wide = fitted(PARTS, 60).plain, fitted(PARTS, 200).plain

    assert narrow == "where  " + "━" * 16 + "─" * 16 + "  unimportant  number"
    assert wide.count("━") + wide.count("─") == MAX_BAR


def test_a_column_more_or_less_leaves_the_bar_as_it_is():
    assert len({fitted(PARTS, width).plain for width in (60, 59, 58, 57)}) <= 2


def test_the_least_important_parts_go_first():
    assert fitted(PARTS, 24).plain == "where  ━━━━────  number"
    assert fitted(PARTS, 20).plain == "where  number"
    assert fitted(PARTS, 8).plain == "where"


def test_wide_characters_count_double():
    parts = [Piece("損失 0.5", importance=2), Piece("x", importance=1)]

    assert fitted(parts, 10).plain == "損失 0.5"
    assert fitted(parts, 11).plain == "損失 0.5  x"


def test_a_plain_line_has_all_pieces_and_no_bar():
    assert plain(PARTS).plain == "where  unimportant  number"


@pytest.mark.parametrize(
    ("fraction", "expected"),
    [
        (0.0, "────"),
        (0.125, "╸───"),
        (0.5, "━━──"),
        (0.99, "━━━╸"),
        (1.0, "━━━━"),
        (1.5, "━━━━"),
        (-1.0, "────"),
    ],
)
def test_a_bar_is_full_only_at_the_end(fraction: float, expected: str):
    assert drawn(fraction, 4).plain == expected


def test_a_bar_can_do_with_ascii():
    assert drawn(0.375, 4, ascii_only=True).plain == "=>--"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.8, "1.800"),
        (0.0, "0.000"),
        (-0.05, "-0.05000"),
        (1234.5, "1234"),
        (3.2e-7, "3.200e-07"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (1234567, "1,234,567"),
    ],
)
def test_numbers_have_four_digits_and_whole_numbers_all(value: float, expected: str):
    assert number(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.9, "0:00"),
        (65, "1:05"),
        (3600, "1:00:00"),
        (90061, "1 d 1:01:01"),
        (86400, "1 d 0:00:00"),
    ],
)
def test_durations_are_as_long_as_they_must_be(seconds: float, expected: str):
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("steps_per_s", "expected"),
    [
        (12345.6, "12,346 steps/s"),
        (999.6, "1,000 steps/s"),
        (48.23, "48.2 steps/s"),
        (1.0, "1.00 steps/s"),
        (0.4, "2.50 s/step"),
        (0.01, "100 s/step"),
    ],
)
def test_slow_steps_are_told_in_seconds_per_step(steps_per_s: float, expected: str):
    assert speed(steps_per_s) == expected
