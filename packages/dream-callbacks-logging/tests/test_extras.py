"""Behaviour without optional libraries, which are hidden from a new process."""

from __future__ import annotations

import subprocess
import sys

import pytest


def python(code: str, *hidden: str) -> subprocess.CompletedProcess[str]:
    finder = f"""
import importlib.machinery, sys
class Hidden(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            return None
        return super().find_spec(name, path, target)
sys.meta_path[:] = [Hidden if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""
    return subprocess.run(
        [sys.executable, "-c", finder + code], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("sink", "library", "extra"),
    [("WandBSink", "wandb", "wandb"), ("TensorBoardSink", "tensorboard", "tensorboard")],
)
def test_a_missing_library_is_an_error_before_launch(tmp_path, sink, library, extra):
    result = python(
        f"""
from dream_callbacks.logging import LoggerCallback, {sink}
from dream_trainer.testing import TinyTrainer, tiny_config
class Trainer(TinyTrainer):
    def configure_models(self):
        print("configured")
        super().configure_models()
Trainer(tiny_config({str(tmp_path)!r}, [LoggerCallback(sinks=[{sink}()])])).fit()
""",
        library,
    )

    assert result.returncode == 1
    message = f"{sink} needs {library}: pip install 'dream-callbacks-logging[{extra}]'"
    assert f"ImportError: {message}" in result.stderr
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_json_lines_need_only_torch(tmp_path):
    result = python(
        f"""
import torch
from dream_callbacks.logging import LoggerCallback, LRLoggerCallback, MediaLoggerCallback
from dream_trainer.testing import TinyTrainer, tiny_config
class Trainer(TinyTrainer):
    def validation_step(self, batch, batch_idx):
        return super().validation_step(batch, batch_idx) | {{"pictures": torch.rand(2, 3, 4, 4)}}
callbacks = [LoggerCallback(), LRLoggerCallback(), MediaLoggerCallback()]
Trainer(tiny_config({str(tmp_path)!r}, callbacks)).fit()
print({{"wandb", "tensorboard", "numpy", "PIL", "rich"}} & set(sys.modules))
""",
        "wandb",
        "tensorboard",
        "numpy",
        "PIL",
        "rich",
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "set()"
    assert list(tmp_path.glob("**/*.png"))


def test_importing_the_package_imports_no_tracker():
    result = python("import dream_callbacks.logging; print(*sys.modules)")

    assert result.returncode == 0, result.stderr
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert not loaded & {"wandb", "tensorboard", "PIL", "rich"}
    assert "torch.distributed.fsdp" not in result.stdout.split()
