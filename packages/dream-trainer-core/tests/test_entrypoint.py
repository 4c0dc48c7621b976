"""entrypoint, in scripts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys, time
from dream_trainer.utils.entrypoint import entrypoint

@entrypoint
def main(word="alone"):
    print("main", word, *sys.argv[1:], flush=True)
    if "fail" in sys.argv:
        raise ZeroDivisionError("planned")
    if "wait" in sys.argv:
        time.sleep(60)

if __name__ == "__main__":
    main()
"""


def test_it_runs_in_this_process_without_several_gpus(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, "--lr", "1"],
        capture_output=True,
        text=True,
        check=True,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""},
    )

    assert done.stdout == "main alone --lr 1\n"


def test_ctrl_c_exits_with_130_and_one_line(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, script, "wait"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "main alone wait\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)

    assert process.returncode == 130
    assert stderr == "interrupted\n"


# As with several GPUs, on a machine without them.
BECOMES_TORCHRUN = """
import os, sys
from dream_trainer.entrypoint import _become_torchrun, entrypoint

@entrypoint
def main():
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    sys.stdout.write(f"{rank} of {size}, {sys.argv[1:]}, {__name__}\\n")

if __name__ == "__main__":
    if "RANK" not in os.environ:
        sys.stdout.write("first\\n")
        _become_torchrun(2)
    main()
"""


@pytest.mark.parametrize(
    "as_module", [False, pytest.param(True, marks=pytest.mark.full)], ids=["script", "module"]
)
def test_it_starts_the_script_again_with_its_arguments(tmp_path: Path, as_module: bool) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "train.py").write_text(BECOMES_TORCHRUN)
    start = ["-m", "package.train"] if as_module else ["package/train.py"]
    done = subprocess.run(
        [sys.executable, *start, "--name", "two words"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    assert done.returncode == 0, done.stderr
    rest = "of 2, ['--name', 'two words'], __main__"
    assert sorted(done.stdout.splitlines()) == [f"0 {rest}", f"1 {rest}", "first"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_uses_every_visible_gpu(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, "--lr", "1"], capture_output=True, text=True, check=True
    )

    assert done.stdout == "main alone --lr 1\n" * torch.cuda.device_count()


def test_torchrun_gets_an_error_outside_of_training(tmp_path: Path) -> None:
    script, error_file = tmp_path / "train.py", tmp_path / "error.json"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, "fail"],
        capture_output=True,
        check=False,
        env=os.environ | {"TORCHELASTIC_ERROR_FILE": str(error_file), "CUDA_VISIBLE_DEVICES": ""},
    )

    assert done.returncode == 1
    message = json.loads(error_file.read_text())["message"]
    assert message["message"] == "ZeroDivisionError: planned"
    assert "in main" in message["extraInfo"]["py_callstack"]
