"""Output of the command line: tables and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def json_text(document: Any) -> str:
    """Format JSON; NaN and infinities are strings."""
    return json.dumps(_without_non_finite(document), indent=2, allow_nan=False)


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


def _without_non_finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by "nan", "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_non_finite(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(cell: str) -> bool:
    number = cell.split(" ", 1)[0]
    try:
        float(number or "0")
    except ValueError:
        return False
    return True
