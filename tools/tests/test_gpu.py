"""`tools/gpu` on the CPU: parts check themselves, and the others go on after a failure of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.gpu_parts import cases, runner
from tools.packages import ROOT

pytest.importorskip("torch", reason="without torch, tools/gpu says so and ends")

WITHOUT_GPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def gpu(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "gpu"), str(out), *arguments]
    return subprocess.run(command, env=WITHOUT_GPU, capture_output=True, text=True, check=False)


def test_without_a_gpu_parts_check_themselves_and_say_what_was_not_run(tmp_path: Path) -> None:
    done = gpu(tmp_path / "out", "--parts", "1", "6")

    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.json", "gpu.txt"]
    text = (tmp_path / "out" / "gpu.txt").read_text()
    assert text.startswith("tools/gpu: no failures; ")
    assert "not run  pinned memory of an exact size: no GPU" in text
    assert "passed   frozen dataclass: type Frozen" in text
    document = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [part["title"] for part in document["parts"]] == ["versions and probes", "batch types"]
    assert document["parts"][0]["checks"][0]["found"]["torch"]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_all_parts_check_themselves_without_a_gpu(tmp_path: Path) -> None:
    done = gpu(tmp_path / "out")

    assert done.returncode == 0, (tmp_path / "out" / "gpu.txt").read_text()
    document = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [part["problem"] for part in document["parts"]] == [None] * 9


PASSES = """
import os
from tools.gpu_parts import cases

def run(part):
    part.measured("variable", os.environ["WANDB_MODE"])
    with part.attempt("broken"):
        raise ZeroDivisionError("planned")
    part.expect("sum", 1 + 1 == 2, 1 + 1, "2")
"""
RAISES = """
def run(part):
    part.expect("before", True, 1, "1")
    raise ZeroDivisionError("planned")
"""
HANGS = """
import subprocess, time

def run(part):
    child = subprocess.Popen(["sleep", "600"])
    part.measured("child", child.pid)
    time.sleep(600)
"""


def test_a_part_that_fails_or_hangs_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, source in (("raises", RAISES), ("hangs", HANGS), ("passes", PASSES)):
        (tmp_path / f"part_that_{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    planned = [
        runner.Planned("part_that_raises", "raises", 60),
        runner.Planned("part_that_hangs", "hangs", 12),
        runner.Planned("part_that_passes", "passes", 60),
    ]
    raises, hangs, passes = runner.run(tmp_path / "out", parts=planned)

    assert [check["status"] for check in raises.checks] == ["passed"]
    assert raises.problem is not None
    assert raises.problem.startswith("ended with exit code 1")
    assert raises.problem.endswith("ZeroDivisionError: planned")
    assert hangs.problem is not None
    assert hangs.problem.startswith("stopped after 12 s")
    [child] = [check["found"] for check in hangs.checks]
    assert not Path(f"/proc/{child}/cmdline").exists() or not is_sleeping(child)
    assert passes.problem is None
    assert [(c["name"], c["status"]) for c in passes.checks] == [
        ("variable", "measured"),
        ("broken", "failed"),
        ("sum", "passed"),
    ]
    text = (tmp_path / "out" / "gpu.txt").read_text()
    assert text.startswith("tools/gpu: parts with failures: 1, 2, 3; 1 failed, 2 measured, 2 ")
    assert "FAILED   broken: ZeroDivisionError: planned  (expected: no error)" in text


def is_sleeping(pid: int) -> bool:
    """Whether the process still runs, rather than waiting to be reaped."""
    return b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_no_part_starts_when_the_time_is_over(tmp_path: Path) -> None:
    [result] = runner.run(tmp_path, parts=[runner.Planned("nothing", "late", 60)], limit_s=0.5)

    assert result.problem == "not started: no time was left"


def test_the_limits_leave_time_to_write_the_reports() -> None:
    assert runner.LIMIT_S <= 9 * 60 - 10
    assert all(part.limit_s < runner.LIMIT_S for part in runner.PARTS)


def test_cases_run_at_the_same_time_and_their_ends_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    port = str(cases.free_port())
    began_s = time.monotonic()
    found = cases.run_cases(
        {
            "returns": cases.Case("cases:rank_variables", {"rank": 1, "port": int(port)}),
            "raises": cases.Case("cases:free_port", {"no": "such argument"}),
        },
        tmp_path,
        timeout_s=60,
    )
    late = cases.run_cases({"late": cases.Case("cases:free_port")}, tmp_path / "late", timeout_s=0)

    assert found["returns"].value()["MASTER_PORT"] == port
    assert found["raises"].code == 1
    assert "unexpected keyword argument" in found["raises"].last_line
    with pytest.raises(RuntimeError, match=r"ended with 1 after \d+ s: TypeError"):
        found["raises"].value()
    assert late["late"].code is None
    assert time.monotonic() - began_s < 60
