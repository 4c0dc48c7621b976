"""Reading a JSON lines log, without the lines that a later session superseded."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

LOG_NAME = "log.jsonl"
"""File name of the log in a run directory."""

START = "start"
"""The first event of a session; the session supersedes earlier lines for later steps."""

_NON_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
_RESERVED = ("step", "time")


def read_jsonl(path: str | os.PathLike[str], event: str | None = None) -> list[dict[str, Any]]:
    """Read the lines of a log as if the run had never crashed.

    A session that resumed at step N repeats the steps after N, so lines that earlier sessions
    logged for these steps are left out. Values for step N are left out if they were logged again.
    Lines truncated by a full disk or a power failure are left out.

    Args:
        path: Path of the log or of the run directory.
        event: Read lines of this event instead of those with numbers: "start", "config",
            "code", "images", "videos", "plot", "histogram", "end".

    Returns:
        A dict for each line, in file order: "step", "time" (seconds since 1970) and the values by
        name. NaN and infinities are floats.
    """
    path = Path(path)
    lines = list(_lines(path / LOG_NAME if path.is_dir() else path))
    if event in (START, "end"):
        return [line for line in lines if line.get("event") == event]
    return [line for line in _without_superseded(lines) if line.get("event") == event]


def series(rows: Iterable[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """One logged value as a series over steps.

    Args:
        rows: Lines from `read_jsonl`.
        name: Name of the value, such as "train/loss".

    Returns:
        The steps at which it was logged, and the values.
    """
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line if "event" in line else {k: _number(v) for k, v in line.items()}


def _number(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _without_superseded(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of all sessions, without those that a later session logged again."""
    sessions: list[list[dict[str, Any]]] = [[]]
    starts = [0]
    for line in lines:
        if line.get("event") == START:
            sessions.append([])
            starts.append(line.get("step", 0))
        else:
            sessions[-1].append(line)
    kept: list[list[dict[str, Any]]] = []
    limit = math.inf
    relogged: set[tuple[int, str]] = set()  # (step, name) at the start steps of later sessions
    for session, start in zip(reversed(sessions), reversed(starts), strict=True):
        remaining = [line for line in session if line.get("step", 0) <= limit]
        kept.append([line for line in map(partial(_without, relogged), remaining) if line])
        limit = min(limit, start)
        relogged.update(
            (start, name) for line in session if line.get("step") == start for name in _names(line)
        )
    return [line for session in reversed(kept) for line in session]


def _without(relogged: set[tuple[int, str]], line: dict[str, Any]) -> dict[str, Any] | None:
    """The line without values that were logged again; None if none are left."""
    step, names = line.get("step", 0), _names(line)
    relogged_names = {name for name in names if (step, name) in relogged}
    if not relogged_names:
        return line
    if len(relogged_names) == len(names):
        return None
    return {name: value for name, value in line.items() if name not in relogged_names}


def _names(line: dict[str, Any]) -> list[str]:
    """Names of the values or the event in a line."""
    if "event" in line:
        return [f"{line['event']} {line.get('name', '')}"]
    return [name for name in line if name not in _RESERVED]
