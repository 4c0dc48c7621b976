"""One line about a run: pieces, the most important of which fit into its width."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rich.text import Text

GAP = "  "
MIN_BAR, MAX_BAR = 8, 40
_BAR_STEP = 4
"""Bars change their width in steps, so that a digit more beside one doesn't make it tremble."""


@dataclass(frozen=True)
class Piece:
    """A part of a line.

    Args:
        text: What it says.
        style: In rich's words.
        importance: The least important pieces are left out where there is no room.
    """

    text: str
    style: str = ""
    importance: int = 0

    @property
    def min_width(self) -> int:
        return Text(self.text).cell_len


@dataclass(frozen=True)
class Bar:
    """A part of a line that takes what room there is, from MIN_BAR to MAX_BAR columns.

    Args:
        fraction: How much is done, 0 to 1.
        importance: As that of a piece.
    """

    fraction: float
    importance: int = 0
    min_width: int = MIN_BAR


def fitted(parts: Iterable[Piece | Bar], width: int, *, ascii_only: bool = False) -> Text:
    """The parts beside each other in one line of at most `width` columns.

    Args:
        parts: In their order.
        width: Columns.
        ascii_only: Draw bars with characters that every terminal has.
    """
    kept = list(parts)
    while (room := width - _min_width(kept)) < 0 and len(kept) > 1:
        del kept[min(range(len(kept)), key=lambda index: kept[index].importance)]
    bar_width = min(MIN_BAR + max(room, 0) // _BAR_STEP * _BAR_STEP, MAX_BAR)
    line = Text(GAP).join(
        drawn(part.fraction, bar_width, ascii_only=ascii_only)
        if isinstance(part, Bar)
        else Text(part.text, part.style)
        for part in kept
    )
    line.truncate(width)
    line.no_wrap = True
    return line


def plain(parts: Iterable[Piece | Bar]) -> Text:
    """The pieces beside each other, however long that gets, without bars."""
    return Text(GAP).join(Text(p.text, p.style) for p in parts if isinstance(p, Piece))


def drawn(fraction: float, width: int, *, ascii_only: bool = False) -> Text:
    """A bar of `width` columns, of which a fraction is done."""
    full, half, rest = ("=", ">", "-") if ascii_only else ("━", "╸", "─")
    num_halves = int(min(max(fraction, 0.0), 1.0) * width * 2)
    done = full * (num_halves // 2) + half * (num_halves % 2)
    return Text.assemble((done, "cyan"), (rest * (width - len(done)), "dim"))


def number(value: float) -> str:
    """A number with four significant digits; a whole number with all of them."""
    return f"{value:,}" if isinstance(value, int) else f"{value:#.4g}".removesuffix(".")


def duration(seconds: float) -> str:
    """A time span as "1:05", "2:01:05" or "3 d 2:01:05"."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02}"
    return f"{f'{days} d ' if days else ''}{hour}:{minute:02}:{second:02}"


def speed(steps_per_s: float) -> str:
    """A rate in steps per second; in seconds per step if it is lower than one."""
    if steps_per_s >= 1:
        return f"{_three_digits(steps_per_s)} steps/s"
    return f"{_three_digits(1 / steps_per_s)} s/step"


def _three_digits(value: float) -> str:
    return f"{value:,.{max(0, 2 - int(math.log10(value)))}f}"


def _min_width(parts: list[Piece | Bar]) -> int:
    return sum(part.min_width for part in parts) + len(GAP) * (len(parts) - 1)
