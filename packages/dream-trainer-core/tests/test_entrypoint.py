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


# A machine with four GPUs, as far as `entrypoint` looks. The ranks are on the CPU.
FOUR_GPUS = """
import os, sys
import torch
from dream_trainer.configs import DeviceParameters
from dream_trainer.entrypoint import entrypoint
from dream_trainer.testing import TinyTrainer, tiny_config

@entrypoint
def main():
    device = eval(os.environ["LAYOUT"])
    sys.stdout.write("begins\\n")
    trainer = TinyTrainer(tiny_config(os.environ["ROOT"], device=device))
    trainer.configure()
    trainer.world.barrier()
    rank, size = trainer.world.rank, trainer.world.world_size
    sys.stdout.write(f"{rank} of {size}, {sys.argv[1:]}, {__name__}\\n")
    TinyTrainer(tiny_config(os.environ["ROOT"]))  # a second one doesn't start ranks
    sys.stdout.write("ends\\n")

def pretend():
    from dream_trainer.world import torchrun

    torchrun.num_devices = lambda: 4

if __name__ == "__main__":
    pretend()
    main()
"""


def output_on_four_gpus(folder: Path, layout: str, *start: str) -> list[str]:
    (folder / "package").mkdir()
    (folder / "package/train.py").write_text(FOUR_GPUS)
    done = subprocess.run(
        [sys.executable, *start, "--name", "two words"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LAYOUT": layout, "ROOT": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


@pytest.mark.parametrize(
    "start",
    [
        ["package/train.py"],
        pytest.param(["-m", "package.train"], marks=pytest.mark.full),
    ],
    ids=["script", "module"],
)
def test_the_trainer_starts_the_script_again_on_each_rank(tmp_path: Path, start: list[str]) -> None:
    layout = "DeviceParameters(dp_replicate=1, dp_shard=2)"  # of the four

    rest = "of 2, ['--name', 'two words'], __main__"
    expected = [f"0 {rest}", f"1 {rest}", *["begins"] * 3, *["ends"] * 2]
    assert output_on_four_gpus(tmp_path, layout, *start) == expected


@pytest.mark.parametrize(
    "layout",
    ["DeviceParameters.SINGLE_DEVICE()", "DeviceParameters(device='cpu')"],
    ids=["single", "cpu"],
)
def test_a_trainer_for_one_rank_starts_none(tmp_path: Path, layout: str) -> None:
    expected = ["0 of 1, ['--name', 'two words'], __main__", "begins", "ends"]
    assert output_on_four_gpus(tmp_path, layout, "package/train.py") == expected


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_uses_every_visible_gpu(tmp_path: Path) -> None:
    num_devices = torch.cuda.device_count()
    without_pretence = FOUR_GPUS.replace("pretend()\n    main()", "main()")
    assert without_pretence != FOUR_GPUS
    (tmp_path / "train.py").write_text(without_pretence)
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LAYOUT": "DeviceParameters()", "ROOT": str(tmp_path)},
    )

    assert done.stdout.count("ends") == num_devices


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
