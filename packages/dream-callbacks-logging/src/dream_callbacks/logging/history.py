"""Reading a log of JSON lines back: the one true history, without what a resume superseded."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

LOG_NAME = "log.jsonl"
"""Name of the log in a run's directory."""

START = "start"
"""The event that begins a session; its step tells what it supersedes."""

_NON_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
_RESERVED = ("step", "time")


def read_jsonl(path: str | os.PathLike[str], event: str | None = None) -> list[dict[str, Any]]:
    """Lines of a log as they would be if the run had never crashed.

    A session that resumed at step N does the steps after N again, so what was logged for them
    before is left out; so are values for step N itself that were logged again. A line that was
    cut off by a full disk or a power failure is left out.

    Args:
        path: Of the log, or of the run's directory.
        event: Read lines of this event instead of those with numbers: "start", "config",
            "code", "images", "videos", "plot", "histogram", "end".

    Returns:
        A dict for each line, in the order of the file: "step" and "time" (seconds since 1970),
        and the values by name. NaN and infinities are floats.
    """
    path = Path(path)
    lines = list(_lines(path / LOG_NAME if path.is_dir() else path))
    if event in (START, "end"):
        return [line for line in lines if line.get("event") == event]
    return [line for line in _without_superseded(lines) if line.get("event") == event]


def series(rows: Iterable[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """One value over the steps.

    Args:
        rows: From `read_jsonl`.
        name: Such as "train/loss".

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
    """Lines of all sessions, without those that a later session logged anew."""
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
    again: set[tuple[int, str]] = set()  # what later sessions say of the steps they began at
    for session, start in zip(reversed(sessions), reversed(starts), strict=True):
        survivors = [line for line in session if line.get("step", 0) <= limit]
        kept.append([line for line in map(partial(_without, again), survivors) if line])
        limit = min(limit, start)
        again.update(
            (start, name) for line in session if line.get("step") == start for name in _names(line)
        )
    return [line for session in reversed(kept) for line in session]


def _without(again: set[tuple[int, str]], line: dict[str, Any]) -> dict[str, Any] | None:
    """A line without what is said again; None if nothing is left of it."""
    step, names = line.get("step", 0), _names(line)
    said_again = {name for name in names if (step, name) in again}
    if not said_again:
        return line
    if len(said_again) == len(names):
        return None
    return {name: value for name, value in line.items() if name not in said_again}


def _names(line: dict[str, Any]) -> list[str]:
    """What a line says something about."""
    if "event" in line:
        return [f"{line['event']} {line.get('name', '')}"]
    return [name for name in line if name not in _RESERVED]
