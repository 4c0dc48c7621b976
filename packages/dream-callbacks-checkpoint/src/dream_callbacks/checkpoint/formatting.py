"""Formatting of sizes, tables and JSON for the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def spelled_bytes(num_bytes: float) -> str:
    """Format a size, such as "1.9 GiB"."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while num_bytes >= 1024 and power + 1 < len(units):
        num_bytes, power = num_bytes / 1024, power + 1
    return f"{num_bytes:.{1 if power else 0}f} {units[power]}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format rows as aligned columns; numeric columns are right-aligned."""
    columns = list(zip(head, *rows, strict=True))
    lines = [[] for _ in columns[0]] if columns else []  # type: list[list[str]]
    for column in columns:
        width = max(map(len, column))
        is_numeric = all(_is_number(cell) for cell in column[1:]) and any(column[1:])
        for line, cell in zip(lines, column, strict=True):
            line.append(cell.rjust(width) if is_numeric else cell.ljust(width))
    return "\n".join("  ".join(line).rstrip() for line in lines)


def json_value(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by "nan", "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(cell: str) -> bool:
    number = cell.split(" ", 1)[0]
    try:
        float(number or "0")
    except ValueError:
        return False
    return True
