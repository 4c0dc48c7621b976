"""float16 trains as with torch's GradScaler, skips steps on all ranks alike, and resumes."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from test_several_optimizers import Plain, assert_equal_models, batches
from torch import Tensor

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import run_on_ranks, tiny_config

FLOAT16 = DeviceParameters(device="cpu", param_dtype=torch.float16)
TINY, HUGE = 1e-6, 1e4


class Half(Plain):
    """Gradients that underflow without a loss scale; those of one batch overflow with it."""

    overflows_at = 1

    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def configure_schedulers(self) -> None:
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.9)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        factor = HUGE if batch_idx == self.overflows_at else TINY
        loss = self.model(batch).float().square().mean() * factor
        self.backward(loss)
        if not self.is_accumulating_gradients:
            self.step(self.optimizer)
        return {"loss": loss, "loss_scale": self.loss_scale}


@pytest.mark.parametrize("clip", [None, 1e-7])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_float16_equals_a_plain_loop_with_a_scaler(
    tmp_path: Path, accumulation: int, clip: float | None
) -> None:
    training = {"gradient_accumulation_steps": accumulation, "gradient_clip_val": clip}
    trainer = Half(tiny_config(tmp_path, device=FLOAT16, **training))
    trainer.setup()
    model = copy.deepcopy(trainer.model)
    trainer.fit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    scaler = torch.amp.GradScaler("cpu")
    for index, batch in enumerate(batches()):
        with torch.autocast("cpu", torch.float16):
            output = model(batch)
        loss = output.float().square().mean() * (HUGE if index == 1 else TINY)
        scaler.scale(loss / accumulation).backward()
        if index % accumulation == accumulation - 1:
            scaler.unscale_(optimizer)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() == before:
                schedule.step()
            optimizer.zero_grad()

    assert_equal_models(trainer.model, model)
    assert trainer.global_step == trainer.scheduler.last_epoch == len(batches()) // accumulation - 1
    if accumulation == 1:  # else the last step's update comes with the next backward
        assert trainer.loss_scale == scaler.get_scale() == 2.0**15


def test_float16_resumes_with_its_scale(tmp_path: Path) -> None:
    straight = Half(tiny_config(tmp_path, device=FLOAT16))
    straight.fit()
    first = Half(tiny_config(tmp_path, device=FLOAT16, max_steps=1))
    first.fit()
    second = Half(tiny_config(tmp_path, device=FLOAT16))
    second.setup()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.fit()

    assert_equal_models(second.model, straight.model)
    assert second.loss_scale == straight.loss_scale == 2.0**15


class OverflowsOnRankOne(Half):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.overflows_at = 1 if self.world.rank == 1 else -1
        return super().training_step(batch, batch_idx)


def half_on_ranks(layout: str) -> tuple[int, float, list[Tensor]]:
    device = getattr(DeviceParameters, layout)(device="cpu", param_dtype=torch.float16)
    with tempfile.TemporaryDirectory() as root:
        trainer = OverflowsOnRankOne(tiny_config(root, device=device))
        trainer.fit()
        weights = [
            w.full_tensor() if hasattr(w, "full_tensor") else w
            for w in trainer.model_state_dict()["model"].values()
        ]
    assert trainer.loss_scale is not None
    return trainer.global_step, trainer.loss_scale.item(), weights


@pytest.mark.parametrize("layout", ["DDP", "FSDP"])
def test_an_overflow_on_one_rank_skips_the_step_of_all(layout: str) -> None:
    first, second = run_on_ranks(half_on_ranks, 2, layout)

    assert first[:2] == second[:2] == (len(batches()) - 1, 2.0**15)
    for one, other in zip(first[2], second[2], strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


def test_a_run_that_only_overflows_is_refused(tmp_path: Path) -> None:
    class Broken(Half):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            for _ in range(30):
                self.backward(self.model(batch).float().sum() * float("inf"))
                self.step(self.optimizer)
            return {}

    with pytest.raises(FloatingPointError, match=r"51 steps in a row had gradients that aren't"):
        Broken(tiny_config(tmp_path, device=FLOAT16)).fit()


def test_a_scaler_of_the_users_own_is_refused(tmp_path: Path) -> None:
    class Own(Half):
        def configure_optimizers(self) -> None:
            super().configure_optimizers()
            self.scaler = torch.amp.GradScaler("cpu")

    with pytest.raises(
        TypeError, match=r"self\.scaler is a GradScaler.*param_dtype=torch\.float16"
    ):
        Own(tiny_config(tmp_path)).setup()
