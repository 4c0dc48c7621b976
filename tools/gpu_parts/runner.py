"""Runs the parts of `tools/gpu`, each in its own process with a time limit, and writes reports."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.packages import ROOT, source_folders

LIMIT_S = 525.0
"""Seconds for all parts; less than nine minutes by the time to start and to write."""
_END_S = 3.0
"""Seconds between SIGTERM and SIGKILL to a part that exceeds its limit."""
_LOG_LINES = 30


@dataclasses.dataclass(frozen=True)
class Planned:
    """A part.

    Args:
        module: Its module, with a function `run(part)`.
        title: For the report.
        limit_s: Seconds until it is stopped.
    """

    module: str
    title: str
    limit_s: float


PARTS = (
    Planned("tools.gpu_parts.versions", "versions and probes", 35),
    Planned("tools.gpu_parts.one_rank", "one rank on NCCL", 85),
    Planned("tools.gpu_parts.never_waits", "steps never wait for the device", 45),
    Planned("tools.gpu_parts.resume", "resuming", 85),
    Planned("tools.gpu_parts.failures", "failures", 75),
    Planned("tools.gpu_parts.batch_types", "batch types", 30),
    Planned("tools.gpu_parts.cuda_graphs", "CUDA graphs", 60),
    Planned("tools.gpu_parts.speed", "speed and saves", 140),
    Planned("tools.gpu_parts.profiles", "the profile package", 35),
)


@dataclasses.dataclass
class Result:
    """What became of a part.

    Attributes:
        number: From 1.
        title: As planned.
        seconds: How long it ran.
        checks: As `Part` recorded them.
        problem: Why it ended early, with the last lines that it printed; None if it didn't.
    """

    number: int
    title: str
    seconds: float
    checks: list[dict[str, Any]]
    problem: str | None = None

    def count(self, status: str) -> int:
        """Number of checks with a status."""
        return sum(check["status"] == status for check in self.checks)

    @property
    def has_failed(self) -> bool:
        return self.problem is not None or self.count("failed") > 0


def run(
    out: Path,
    numbers: Sequence[int] | None = None,
    *,
    quick: bool = False,
    parts: Sequence[Planned] = PARTS,
    limit_s: float = LIMIT_S,
) -> list[Result]:
    """Run parts one after the other, and write `gpu.json` and `gpu.txt` after each.

    Args:
        out: Folder for the reports.
        numbers: Which parts, from 1. Default: all.
        quick: Small sizes.
        parts: All parts.
        limit_s: Seconds for all of them.
    """
    out.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    results: list[Result] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for number, planned in enumerate(parts, 1):
            if numbers is not None and number not in numbers:
                continue
            left_s = limit_s - (time.monotonic() - began_s)
            results.append(_run_part(number, planned, Path(folder), left_s, quick=quick))
            write_reports(out, results, time.monotonic() - began_s)
            print(_summary(results[-1]), flush=True)
    return results


def _run_part(number: int, planned: Planned, folder: Path, left_s: float, *, quick: bool) -> Result:
    records, log = folder / f"{number}.jsonl", folder / f"{number}.log"
    records.touch()
    if left_s < 1:
        return Result(number, planned.title, 0.0, [], "not started: no time was left")
    limit_s = min(planned.limit_s, left_s)
    command = [sys.executable, "-m", "tools.gpu_parts.part", planned.module, folder, records]
    began_s, problem = time.monotonic(), None
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*map(str, command), *(["--quick"] if quick else [])],
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # its processes are one group, which can be ended
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            problem = f"stopped after {limit_s:.0f} s"
        else:
            problem = f"ended with exit code {code}" if code else None
        _end_group(process)
    if problem is not None:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        problem = "\n".join([problem, *lines[-_LOG_LINES:]])
    checks = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    return Result(number, planned.title, time.monotonic() - began_s, checks, problem)


def environment() -> dict[str, str]:
    """The variables of a part: the packages of this checkout first, no network, no installs."""
    paths = [*map(str, source_folders()), str(ROOT)]
    before = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *([before] if before else [])]),
        "WANDB_MODE": "offline",
        "KINETO_LOG_LEVEL": "6",
    }


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a part and every process that it left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
        if number == signal.SIGTERM and not _group_lives(process.pid):
            return


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# Reports


def write_reports(out: Path, results: Sequence[Result], seconds: float) -> None:
    """Write `gpu.json` and `gpu.txt`, each by a rename."""
    document = {
        "machine": platform.platform(),
        "python": platform.python_version(),
        "seconds": round(seconds, 1),
        "parts": [dataclasses.asdict(result) for result in results],
    }
    text = "\n".join([_heading(results, seconds), *map(_shown, results), ""])
    for name, content in (("gpu.json", json.dumps(document, indent=2)), ("gpu.txt", text)):
        temporary = out / f"{name}.new"
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(out / name)


def _heading(results: Sequence[Result], seconds: float) -> str:
    counts = collections.Counter(check["status"] for each in results for check in each.checks)
    failed = [str(result.number) for result in results if result.has_failed]
    outcome = f"parts with failures: {', '.join(failed)}" if failed else "no failures"
    found = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    return f"tools/gpu: {outcome}; {found}; {seconds:.0f} s\n"


def _summary(result: Result) -> str:
    statuses = ("passed", "failed", "measured", "not run")
    counts = ", ".join(f"{result.count(status)} {status}" for status in statuses)
    ended = "" if result.problem is None else f"; {result.problem.splitlines()[0]}"
    return f"{result.number} {result.title}: {counts}; {result.seconds:.0f} s{ended}"


def _shown(result: Result) -> str:
    lines = [_summary(result)]
    for check in result.checks:
        status = "FAILED" if check["status"] == "failed" else check["status"]
        line = f"  {status:<9}{check['name']}: {_in_line(check['found'])}"
        expected = f"  (expected: {check['expected']})" if check["expected"] else ""
        lines.append(line + expected)
    if result.problem is not None:
        lines += [f"  | {line}" for line in result.problem.splitlines()]
    return "\n".join([*lines, ""])


def _in_line(found: Any) -> str:
    if isinstance(found, dict):
        return ", ".join(f"{key} {_in_line(value)}" for key, value in found.items())
    return f"{found:.4g}" if isinstance(found, float) else str(found)
