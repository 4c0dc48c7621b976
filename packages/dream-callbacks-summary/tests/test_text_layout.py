import math

import pytest

from dream_callbacks.summary.text_layout import (
    MAX_BAR,
    Bar,
    Piece,
    draw_bar,
    fit_line,
    format_duration,
    format_number,
    format_speed,
    plain_line,
)

PARTS = [
    Piece("where", importance=9),
    Bar(0.5, importance=2),
    Piece("unimportant", importance=1),
    Piece("number", importance=8),
]


@pytest.mark.parametrize("width", range(1, 90))
def test_a_line_is_never_wider_than_the_width(width: int):
    assert fit_line(PARTS, width).cell_len <= width


def test_the_bar_fills_the_remaining_width_up_to_a_limit():
    narrow, wide = fit_line(PARTS, 60).plain, fit_line(PARTS, 200).plain

    assert narrow == "where  " + "━" * 16 + "─" * 16 + "  unimportant  number"
    assert wide.count("━") + wide.count("─") == MAX_BAR


def test_a_small_change_of_width_keeps_the_bar():
    assert len({fit_line(PARTS, width).plain for width in (60, 59, 58, 57)}) <= 2


def test_the_least_important_parts_are_left_out_first():
    assert fit_line(PARTS, 24).plain == "where  ━━━━────  number"
    assert fit_line(PARTS, 20).plain == "where  number"
    assert fit_line(PARTS, 8).plain == "where"


def test_wide_characters_count_double():
    parts = [Piece("損失 0.5", importance=2), Piece("x", importance=1)]

    assert fit_line(parts, 10).plain == "損失 0.5"
    assert fit_line(parts, 11).plain == "損失 0.5  x"


def test_a_plain_line_has_all_pieces_but_no_bar():
    assert plain_line(PARTS).plain == "where  unimportant  number"


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
    assert draw_bar(fraction, 4).plain == expected


def test_a_bar_can_be_drawn_in_ascii():
    assert draw_bar(0.375, 4, ascii_only=True).plain == "=>--"


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
def test_floats_have_four_digits_and_integers_all(value: float, expected: str):
    assert format_number(value) == expected


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
def test_durations_omit_leading_units(seconds: float, expected: str):
    assert format_duration(seconds) == expected


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
def test_slow_steps_are_formatted_in_seconds_per_step(steps_per_s: float, expected: str):
    assert format_speed(steps_per_s) == expected
