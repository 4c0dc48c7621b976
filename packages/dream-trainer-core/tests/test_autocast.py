"""Autocast is on in the forward alone, and a forward after a step uses the new weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, tiny_config

BFLOAT16 = DeviceParameters(device="cpu", param_dtype=torch.bfloat16)
ONES = [torch.ones(2, 4)] * 2


class LinearTrainer(TinyTrainer):
    """A linear layer, so that one step of a large learning rate is seen in its output."""

    def configure_models(self) -> None:
        self.model: Any = nn.Linear(4, 1, bias=False)

    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=10.0)

    def configure_dataloaders(self) -> Any:
        return ONES


def autocast(enabled: bool = True) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


@pytest.mark.parametrize(
    ("device", "forward_in", "step_in"),
    [
        (BFLOAT16, contextlib.nullcontext(), contextlib.nullcontext()),
        (BFLOAT16, contextlib.nullcontext(), autocast(enabled=False)),
        (None, autocast(), contextlib.nullcontext()),
    ],
    ids=["by param_dtype", "turned off for the step", "by the user"],
)
def test_a_forward_after_the_step_uses_the_new_weights(
    tmp_path: Path, device: Any, forward_in: Any, step_in: Any
) -> None:
    outputs: list[tuple[float, float]] = []

    class StepsFirst(LinearTrainer):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            with forward_in:
                loss: Tensor = self.model(batch).mean()
                self.backward(loss)
                with step_in:
                    self.step(self.optimizer)
                found = self.model(batch)[0]
                with autocast(enabled=False):
                    expected = self.model(batch)[0]
            outputs.append((found.item(), expected.item()))
            return loss

    StepsFirst(tiny_config(tmp_path, device=device)).fit()

    # A step of rate 10 lowers the output by 10 * 4 * 1.
    assert [found for found, _ in outputs] == pytest.approx([-40, -80], abs=2.0)
    for found, expected in outputs:
        assert found == pytest.approx(expected, rel=2**-7)  # bfloat16 has 8 bits


class GAN(TinyTrainer):
    """The discriminator's step, then the generator's, which needs the new discriminator."""

    def configure_models(self) -> None:
        self.generator, self.discriminator = nn.Linear(4, 4), nn.Linear(4, 1)

    def configure_optimizers(self) -> None:
        self.optimizer_g = torch.optim.SGD(self.generator.parameters(), lr=0.5)
        self.optimizer_d = torch.optim.SGD(self.discriminator.parameters(), lr=0.5)

    def configure_dataloaders(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(8, 4, generator=generator) for _ in range(3)]

    def losses(self, batch: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        def of_discriminator() -> Tensor:
            fake = self.generator(batch).detach()
            return (self.discriminator(fake) - self.discriminator(batch)).mean().square()

        return of_discriminator, lambda: self.discriminator(self.generator(batch)).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        of_discriminator, of_generator = self.losses(batch)
        self.backward(loss_d := of_discriminator())
        self.step(self.optimizer_d)
        self.backward(loss_g := of_generator())
        self.optimizer_d.zero_grad()
        self.step(self.optimizer_g)
        return {"d": loss_d, "g": loss_g}


def test_a_gan_in_bfloat16_trains_as_in_plain_torch(tmp_path: Path) -> None:
    trainer = GAN(tiny_config(tmp_path, device=BFLOAT16))
    trainer.setup()
    plain = GAN(tiny_config(tmp_path, device=BFLOAT16))
    plain.setup()
    plain.generator.load_state_dict(trainer.generator.state_dict())
    plain.discriminator.load_state_dict(trainer.discriminator.state_dict())
    trainer.fit()
    for batch in plain.configure_dataloaders():
        of_discriminator, of_generator = plain.losses(batch)
        for loss_of, optimizer in (
            (of_discriminator, plain.optimizer_d),
            (of_generator, plain.optimizer_g),
        ):
            with autocast():
                loss = loss_of()
            loss.backward()
            optimizer.step()
            plain.optimizer_d.zero_grad()
            plain.optimizer_g.zero_grad()

    for model in ("generator", "discriminator"):
        weights, expected = getattr(trainer, model).state_dict(), getattr(plain, model).state_dict()
        for name in expected:
            torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=0)


class Products(Callback[LinearTrainer]):
    """Records the dtype of a product in each hook of the optimizer, and in the backward."""

    def __init__(self, in_training_step: bool) -> None:
        self.in_training_step = in_training_step
        self.dtypes: list[torch.dtype] = []

    def train_context(self) -> contextlib.AbstractContextManager[Any]:
        if self.in_training_step:
            return autocast()
        return contextlib.nullcontext()

    def look(self, *args: Any) -> None:
        self.dtypes.append((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)

    def pre_optimizer_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.look()

    def post_optimizer_zero_grad(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.look()


@pytest.mark.parametrize("by", ["param_dtype", "train_context"])
def test_the_optimizer_and_its_hooks_are_outside_of_autocast(tmp_path: Path, by: str) -> None:
    products = Products(in_training_step=by == "train_context")

    class Multiplies(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            products.look()
            super().step()

    class Sees(LinearTrainer):
        def configure_optimizers(self) -> None:
            self.optimizer = Multiplies(self.model.parameters(), lr=0.1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            products.look()  # in the forward
            out = self.model(batch)
            out.register_hook(products.look)
            loss: Tensor = out.mean()
            self.backward(loss)
            self.step(self.optimizer)
            products.look()
            return loss

    device = BFLOAT16 if by == "param_dtype" else None
    Sees(tiny_config(tmp_path, [products], device=device, max_steps=1)).fit()

    low, full = torch.bfloat16, torch.float32
    backward = full if by == "param_dtype" else low  # a callback's context is around it
    assert products.dtypes == [low, backward, full, full, full, low]
