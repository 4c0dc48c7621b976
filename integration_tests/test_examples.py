from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHAR_GPT = Path(__file__).resolve().parent.parent / "docs" / "examples" / "char_gpt.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run_char_gpt(folder: Path, *arguments: str, launcher: list[str] | None = None) -> str:
    """Run the example for a few steps in a folder; return what it printed."""
    command = [sys.executable, *(launcher or []), str(CHAR_GPT), "--max-steps=12", *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def validation_loss(printed: str) -> float:
    match = re.search(r"^validation loss +(\d+\.\d+) nats per character$", printed, re.MULTILINE)
    assert match, printed
    return float(match[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("char-gpt")


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """What the example prints in one process."""
    return run_char_gpt(folder)


def test_char_gpt_learns_and_writes_the_files_that_it_names(printed: str, folder: Path) -> None:
    run_dir = Path("runs/quickstart/default/char-gpt")

    assert 3.0 < validation_loss(printed) < 4.6  # log(103 characters) is 4.63
    assert f"tensorboard --logdir {run_dir}\n" in printed
    assert list((folder / run_dir / "checkpoints").glob("step-*12"))
    assert list((folder / run_dir / "profile").glob("*.json.gz"))
    assert list((folder / run_dir / "tensorboard").glob("events.*"))
    assert list((folder / run_dir / "wandb" / "latest-run").glob("*.wandb"))
    assert (folder / run_dir / "log.jsonl").stat().st_size > 0


def test_char_gpt_started_again_prints_the_same_results(printed: str, folder: Path) -> None:
    again = run_char_gpt(folder)

    assert validation_loss(again) == validation_loss(printed)
    assert again.partition("The statement")[2] == printed.partition("The statement")[2]


@pytest.mark.parametrize(
    "layout", [pytest.param([], marks=pytest.mark.full), ["--fsdp"]], ids=["ddp", "fsdp"]
)
def test_char_gpt_reaches_the_same_loss_on_two_ranks(
    printed: str, tmp_path: Path, layout: list[str]
) -> None:
    together = run_char_gpt(tmp_path, *layout, launcher=TORCHRUN)

    # Printed with three digits.
    assert validation_loss(together) == pytest.approx(validation_loss(printed), abs=2e-3)
