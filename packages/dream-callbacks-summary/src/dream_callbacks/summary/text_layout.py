"""Layout of a line: the most important pieces that fit into a width, and number formats."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rich.text import Text

GAP = "  "
MIN_BAR, MAX_BAR = 8, 40
_BAR_STEP = 4
"""Bar widths change in steps, so that an additional digit doesn't resize the bar."""


@dataclass(frozen=True)
class Piece:
    """A part of a line.

    Args:
        text: The text.
        style: Rich style.
        importance: The least important pieces are left out if the line is too long.
    """

    text: str
    style: str = ""
    importance: int = 0

    @property
    def min_width(self) -> int:
        return Text(self.text).cell_len


@dataclass(frozen=True)
class Bar:
    """A bar that fills the remaining width, from MIN_BAR to MAX_BAR columns.

    Args:
        fraction: Completed fraction, 0 to 1.
        importance: As for Piece.
    """

    fraction: float
    importance: int = 0
    min_width: int = MIN_BAR


def fit_line(parts: Iterable[Piece | Bar], width: int, *, ascii_only: bool = False) -> Text:
    """Join the parts into one line of at most `width` columns.

    Args:
        parts: Parts from left to right.
        width: Maximum number of columns.
        ascii_only: Draw bars with ASCII characters.
    """
    kept = list(parts)
    while (room := width - _min_width(kept)) < 0 and len(kept) > 1:
        del kept[min(range(len(kept)), key=lambda index: kept[index].importance)]
    bar_width = min(MIN_BAR + max(room, 0) // _BAR_STEP * _BAR_STEP, MAX_BAR)
    line = Text(GAP).join(
        draw_bar(part.fraction, bar_width, ascii_only=ascii_only)
        if isinstance(part, Bar)
        else Text(part.text, part.style)
        for part in kept
    )
    line.truncate(width)
    line.no_wrap = True
    return line


def plain_line(parts: Iterable[Piece | Bar]) -> Text:
    """Join the pieces into one line of any length, without bars."""
    return Text(GAP).join(Text(p.text, p.style) for p in parts if isinstance(p, Piece))


def draw_bar(fraction: float, width: int, *, ascii_only: bool = False) -> Text:
    """A bar of `width` columns."""
    full, half, rest = ("=", ">", "-") if ascii_only else ("━", "╸", "─")
    num_halves = int(min(max(fraction, 0.0), 1.0) * width * 2)
    done = full * (num_halves // 2) + half * (num_halves % 2)
    return Text.assemble((done, "cyan"), (rest * (width - len(done)), "dim"))


def format_number(value: float) -> str:
    """Format a float with four significant digits, an int with all digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:#.4g}".removesuffix(".")


def format_duration(seconds: float) -> str:
    """Format a duration as "1:05", "2:01:05" or "3 d 2:01:05"."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02}"
    return f"{f'{days} d ' if days else ''}{hour}:{minute:02}:{second:02}"


def format_speed(steps_per_s: float) -> str:
    """Format a speed in steps per second, or in seconds per step below one."""
    if steps_per_s >= 1:
        return f"{_three_digits(steps_per_s)} steps/s"
    return f"{_three_digits(1 / steps_per_s)} s/step"


def _three_digits(value: float) -> str:
    return f"{value:,.{max(0, 2 - int(math.log10(value)))}f}"


def _min_width(parts: list[Piece | Bar]) -> int:
    return sum(part.min_width for part in parts) + len(GAP) * (len(parts) - 1)
