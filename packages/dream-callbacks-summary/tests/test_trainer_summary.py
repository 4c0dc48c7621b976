"""TrainerSummary and the facts that it prints."""

import contextlib
import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

from dream_callbacks.summary import ProgressBar, TrainerSummary
from dream_callbacks.summary.run_facts import run_facts
from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.trainer import BaseTrainer, LRSchedule


def facts(
    tmp_path: Path | str,
    trainer_class: type[TinyTrainer] = TinyTrainer,
    callbacks: Any = (),
    **settings: Any,
) -> dict[str, list[str]]:
    trainer = trainer_class(tiny_config(tmp_path, callbacks, **settings))
    trainer.setup()
    return run_facts(trainer)


def printed(root_dir: str, device: DeviceParameters | None = None) -> list[str]:
    config = tiny_config(root_dir, [TrainerSummary(), ProgressBar()], device=device)
    config.debug = True  # a collective in a rank-zero hook is an error then
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        TinyTrainer(config).setup()
    text = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())  # if the environment enables colors
    return [line.rstrip() for line in text.splitlines()]


def test_facts_and_models_are_printed_after_setup(tmp_path: Path):
    lines = printed(str(tmp_path))
    names = [line.split()[0] for line in lines if line and not line.startswith(" ")]

    assert names == [
        *("run", "directory", "seed", "device", "layout", "precision", "training", "data"),
        *("validation", "optimizers", "callbacks", "module", "model"),
    ]
    assert any(line.startswith("  blocks.0-1 (2 ×)") for line in lines)


def test_the_run_and_its_directory_are_shown(tmp_path: Path):
    config = tiny_config(tmp_path)
    config.project, config.group, config.experiment = "[bold]p", "g", "e"
    trainer = TinyTrainer(config)
    trainer.setup()
    found = run_facts(trainer)

    assert found["run"] == ["[bold]p / g / e"]
    assert found["directory"] == [str(tmp_path / "[bold]p" / "g" / "e")]
    assert found["seed"] == ["42"]


def test_a_random_seed_is_shown(tmp_path: Path):
    config = tiny_config(tmp_path)
    config.seed = None
    trainer = TinyTrainer(config)
    trainer.setup()

    assert run_facts(trainer)["seed"] == [str(trainer.seed)]


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({}, "1 epoch, 8 steps per epoch"),
        ({"max_steps": 1}, "at most 1 step, 8 steps per epoch"),
        (
            {"n_epochs": 1200, "gradient_accumulation_steps": 3, "gradient_clip_val": 1.0},
            "1,200 epochs, 3 steps per epoch, 3 batches per step, gradients clipped to norm 1",
        ),
        ({"max_time": 90.0}, "at most 90 s, 8 steps per epoch"),
    ],
    ids=str,
)
def test_the_length_of_training_is_shown(tmp_path: Path, training: dict[str, Any], expected: str):
    assert facts(tmp_path, **training)["training"] == [expected]


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({}, "DataLoader, 2 batches of 4, each epoch"),
        ({"val_every_n_steps": 5}, "DataLoader, 2 batches of 4, every 5 steps"),
        (
            {"val_steps_per_epoch": 1, "num_sanity_val_steps": 2},
            "DataLoader, 1 batch of 4, each epoch, sanity check of 2 batches",
        ),
        ({"val_every_n_steps": 0}, "disabled, the loader is not used"),
        ({"val_steps_per_epoch": 0}, "disabled, the loader is not used"),
    ],
    ids=str,
)
def test_the_validation_schedule_is_shown(tmp_path: Path, training: dict[str, Any], expected: str):
    assert facts(tmp_path, **training)["validation"] == [expected]


def test_loaders_are_shown_with_known_sizes(tmp_path: Path):
    class Endless:
        def __iter__(self) -> Any:
            while True:
                yield torch.zeros(2, 4), torch.zeros(2, 1)

    class OtherData(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            return DataLoader([torch.zeros(4)] * 6, batch_size=2, num_workers=1), Endless()

    found = facts(tmp_path, OtherData, gradient_accumulation_steps=2)

    assert found["data"] == [
        "DataLoader, 3 batches of 2, 1 worker; 4 samples per step (2 × 2 batches)"
    ]
    assert found["validation"] == ["Endless, any number of batches, each epoch"]


def test_validation_sets_are_shown_by_name(tmp_path: Path):
    class Several(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            train, val = super().configure_dataloaders()
            return train, {"clean": val, "noisy": val}

    assert facts(tmp_path, Several)["validation"] == [
        "clean: DataLoader, 2 batches of 4, each epoch",
        "noisy: DataLoader, 2 batches of 4, each epoch",
    ]


def test_an_evaluation_is_named(tmp_path: Path):
    class Facts(TrainerSummary):
        def post_setup(self) -> None:
            self.facts = run_facts(self.trainer)

    summary = Facts()
    TinyTrainer(tiny_config(tmp_path, [summary])).validate()

    assert summary.facts["evaluation"] == ["validate()"]


def test_without_a_validation_loader_validation_is_none(tmp_path: Path):
    class NoValidation(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            return super().configure_dataloaders()[0]

    assert facts(tmp_path, NoValidation)["validation"] == ["none"]


def test_optimizers_and_schedulers_are_shown(tmp_path: Path):
    class TwoOptimizers(TinyTrainer):
        def configure_optimizers(self) -> None:
            self.slow = torch.optim.SGD(
                [
                    {"params": self.model.embed.parameters(), "lr": 0.1},
                    {"params": self.model.blocks.parameters()},
                ],
                lr=torch.tensor(0.01),
            )
            self.fast = torch.optim.AdamW(self.model.head.parameters(), lr=1e-4)

        def configure_schedulers(self) -> LRSchedule:
            self.warmup = LambdaLR(self.fast, lambda step: 0.5)
            self.plateau = ReduceLROnPlateau(self.slow)
            return LRSchedule(self.plateau, monitor="val_loss")

    found = facts(tmp_path, TwoOptimizers)

    assert found["optimizers"] == [
        "slow: SGD, lr 0.01 to 0.1, 184 parameters, 2 groups",
        "fast: AdamW, lr 5e-05, 9 parameters",
    ]
    assert found["schedulers"] == [
        "warmup: LambdaLR of fast",
        "plateau: ReduceLROnPlateau of slow, each epoch by val_loss",
    ]


def test_callbacks_are_listed_in_order_of_execution(tmp_path: Path):
    class Last(Callback[BaseTrainer]):
        after = {Callback}

        def post_setup(self) -> None: ...

        def pre_fit(self) -> None: ...

    class First(Callback[BaseTrainer]):
        before = {"ProgressBar"}

        def pre_fit(self) -> None: ...

    class Idle(Callback[BaseTrainer]):
        pass

    found = facts(tmp_path, callbacks=[Last(), ProgressBar(), Idle(), First(), TrainerSummary()])

    assert found["callbacks"] == [
        "Idle: no hooks",
        "First: pre_fit",
        "ProgressBar: pre_fit, pre_train_epoch, post_train_step, post_train_epoch and 5 more",
        "TrainerSummary: post_setup",
        "Last: post_setup, pre_fit",
    ]


def test_a_resumed_run_shows_its_step(tmp_path: Path):
    class Stop(Callback[BaseTrainer]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if batch_idx == 3:
                self.trainer.stop("enough")

    trainer = TinyTrainer(tiny_config(tmp_path, [Stop()], gradient_accumulation_steps=2))
    trainer.fit()

    assert run_facts(trainer)["resumes"] == ["after step 2, 4 batches of epoch 1 done"]
    assert "resumes" not in facts(tmp_path)


def test_the_summary_runs_after_the_checkpoint_callback(tmp_path: Path):
    class CheckpointCallback(Callback[BaseTrainer]):
        after = {Callback}

        def post_setup(self) -> None: ...

    found = facts(tmp_path, callbacks=[TrainerSummary(), CheckpointCallback()])

    assert found["callbacks"] == ["CheckpointCallback: post_setup", "TrainerSummary: post_setup"]


@pytest.mark.parametrize(
    ("device", "layout", "precision", "data"),
    [
        (
            DeviceParameters.DDP(device="cpu", param_dtype=torch.bfloat16),
            "ddp, 2 ranks, mesh dp_replicate 2",
            "float32 parameters, autocast to bfloat16",
            "DataLoader, 8 batches of 2; 4 samples per step (2 × 2 ranks)",
        ),
        (
            DeviceParameters.FSDP(
                device="cpu",
                param_dtype=torch.bfloat16,
                reduce_dtype=torch.float32,
                cpu_offload=True,
                compile_model=True,
            ),
            "fsdp, 2 ranks, mesh dp_shard 2, parameters offloaded to the host, compiled",
            "float32 parameters, computed in bfloat16, gradients reduced in float32",
            "DataLoader, 8 batches of 2; 4 samples per step (2 × 2 ranks)",
        ),
    ],
    ids=["ddp", "fsdp"],
)
def test_layout_and_precision_are_shown(
    tmp_path: Path, device: DeviceParameters, layout: str, precision: str, data: str
):
    found, _ = run_on_ranks(facts_on_rank, 2, str(tmp_path), device)

    assert found["layout"] == [layout]
    assert found["precision"] == [precision]
    assert found["data"] == [data]
    assert found["callbacks"] == ["TrainerSummary (rank 0): post_setup"]
    assert found["optimizers"] == ["optimizer: AdamW, lr 0.01, 193 parameters"]


def facts_on_rank(root_dir: str, device: DeviceParameters) -> dict[str, list[str]]:
    return facts(root_dir, callbacks=[TrainerSummary()], device=device)


def test_on_two_ranks_only_the_first_prints(tmp_path: Path):
    first, second = run_on_ranks(printed, 2, str(tmp_path), DeviceParameters.FSDP(device="cpu"))

    assert first[0].startswith("run")
    assert second == []


def test_copies_print_the_same(tmp_path: Path):
    summary = copy.deepcopy(TrainerSummary(depth=0))

    assert summary.depth == 0
    TinyTrainer(tiny_config(tmp_path, [summary])).setup()


def test_an_invalid_depth_is_rejected():
    with pytest.raises(ValueError, match="depth=-1: a whole number of at least 0 is required"):
        TrainerSummary(depth=-1)


def test_a_stream_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    trainer = TinyTrainer(tiny_config(tmp_path, [TrainerSummary()]))
    with Path("/dev/full").open("w") as full, contextlib.redirect_stdout(full):
        trainer.setup()
        with contextlib.suppress(OSError):  # flushing its buffer fails
            full.close()

    assert trainer.num_train_batches == 8
    assert "stdout can't be written" in caplog.text
