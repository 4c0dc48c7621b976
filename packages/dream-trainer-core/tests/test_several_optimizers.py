"""Ports of loops with several optimizers or updates equal the plain loops bit for bit."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config

NUM_BATCHES = 4


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 4, generator=generator) for _ in range(NUM_BATCHES)]


class Plain(TinyTrainer):
    """Has its batches in a list, so that a plain loop can have them too."""

    validation_step = None  # type: ignore[assignment]

    def configure_dataloaders(self) -> Any:
        size, rank = self.world.dp_size, self.world.dp_rank
        return [batch.chunk(size)[rank] for batch in batches()]


def assert_equal_models(one: nn.Module, other: nn.Module) -> None:
    for (name, value), expected in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(value, expected), name


# GAN


class GAN(Plain):
    """Generator first, so that its backward leaves gradients in the discriminator of each batch."""

    port = "toggled"
    generator_first = False

    def configure_models(self) -> None:
        self.g = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        self.d = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def configure_optimizers(self) -> None:
        self.opt_g = torch.optim.AdamW(self.g.parameters(), lr=0.1)
        self.opt_d = torch.optim.AdamW(self.d.parameters(), lr=0.1)

    def update(self, optimizer: Any, loss_of: Callable[[], Tensor]) -> Tensor:
        if self.port == "toggled":
            with self.toggled(optimizer):
                loss = loss_of()
                self.backward(loss)
        else:
            if self.port == "zero_grad":
                optimizer.zero_grad()
            loss = loss_of()
            self.backward(loss)
        if not self.is_accumulating_gradients:
            self.step(optimizer)
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        updates = list(gan_updates(self.g, self.d, self.opt_g, self.opt_d, batch))
        for optimizer, loss_of in reversed(updates) if self.generator_first else updates:
            loss = self.update(optimizer, loss_of)
        return {"loss": loss}


def gan_updates(
    g: nn.Module, d: nn.Module, opt_g: Any, opt_d: Any, batch: Tensor
) -> Iterator[tuple[Any, Callable[[], Tensor]]]:
    def of_d() -> Tensor:
        fake = g(batch[:, :2]).detach()
        return F.softplus(-d(batch)).mean() + F.softplus(d(fake)).mean()

    yield opt_d, of_d
    yield opt_d, of_d
    yield opt_g, lambda: F.softplus(-d(g(batch[:, :2]))).mean()


@pytest.mark.parametrize("generator_first", [False, True])
@pytest.mark.parametrize("port", ["toggled", "zero_grad"])
def test_a_gan_equals_the_plain_loop(tmp_path: Path, port: str, generator_first: bool) -> None:
    trainer = GAN(tiny_config(tmp_path))
    trainer.port, trainer.generator_first = port, generator_first
    trainer.setup()
    g, d = copy.deepcopy(trainer.g), copy.deepcopy(trainer.d)
    trainer.fit()
    opt_g = torch.optim.AdamW(g.parameters(), lr=0.1)
    opt_d = torch.optim.AdamW(d.parameters(), lr=0.1)
    for batch in batches():
        updates = list(gan_updates(g, d, opt_g, opt_d, batch))
        for optimizer, loss_of in reversed(updates) if generator_first else updates:
            optimizer.zero_grad()
            loss_of().backward()
            optimizer.step()

    assert_equal_models(trainer.g, g)
    assert_equal_models(trainer.d, d)
    assert trainer.global_step == 2 * NUM_BATCHES


def test_a_gan_whose_gradients_mix_is_refused(tmp_path: Path) -> None:
    trainer = GAN(tiny_config(tmp_path))
    trainer.port = "as the table says"

    with pytest.raises(
        RuntimeError, match=r"adds to gradients of opt_d .*with self\.toggled\(optimizer\)"
    ):
        trainer.fit()


def test_zeroed_gradients_may_be_added_to(tmp_path: Path) -> None:
    class Zeroes(GAN):
        def update(self, optimizer: Any, loss_of: Callable[[], Tensor]) -> Tensor:
            optimizer.zero_grad(set_to_none=False)
            return super().update(optimizer, loss_of)

    trainer = Zeroes(tiny_config(tmp_path))
    trainer.port = "as the table says"
    trainer.fit()

    assert trainer.global_step == 2 * NUM_BATCHES


def test_only_the_toggled_optimizer_gets_gradients(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    class Looks(GAN):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.d[0].bias.requires_grad_(False)
            with self.toggled(self.opt_g):
                loss = self.d(self.g(batch[:, :2])).mean()
            self.backward(loss)  # outside: toggled is for forward and backward
            seen.append({n for n, p in self.d.named_parameters() if p.grad is not None})
            with self.toggled(self.opt_g):
                self.backward(self.d(self.g(batch[:, :2])).mean())
            assert all(p.requires_grad for p in self.g.parameters())
            seen.append({n for n, p in self.d.named_parameters() if not p.requires_grad})
            self.step(self.opt_g)
            return {"loss": loss}

    Looks(tiny_config(tmp_path, max_steps=1)).fit()

    assert seen == [set(), {"0.bias"}]


def test_toggled_is_refused_inside_itself(tmp_path: Path) -> None:
    class Nests(GAN):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            with self.toggled(self.opt_g), self.toggled(self.opt_d):
                pass

    with pytest.raises(RuntimeError, match=r"toggled\(opt_d\) inside toggled\(opt_g\)"):
        Nests(tiny_config(tmp_path)).fit()


class Alternating(GAN):
    """One update of each; the first forward of the discriminator is one without its gradients."""

    generator_first = True

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        _, of_d, of_g = gan_updates(self.g, self.d, self.opt_g, self.opt_d, batch)
        return {"loss_g": self.update(*of_g), "loss_d": self.update(*of_d)}


def gan_weights(device: DeviceParameters, accumulation: int = 1) -> list[Tensor]:
    with tempfile.TemporaryDirectory() as root:
        config = tiny_config(root, device=device, gradient_accumulation_steps=accumulation)
        trainer = Alternating(config)
        trainer.fit()
        models = trainer.model_state_dict()
    return [
        value.full_tensor() if hasattr(value, "full_tensor") else value
        for model in models.values()
        for value in model.values()
    ]


def test_an_accumulating_gan_equals_the_plain_loop(tmp_path: Path) -> None:
    trainer = Alternating(tiny_config(tmp_path, gradient_accumulation_steps=2))
    trainer.setup()
    g, d = copy.deepcopy(trainer.g), copy.deepcopy(trainer.d)
    trainer.fit()
    opt_g = torch.optim.AdamW(g.parameters(), lr=0.1)
    opt_d = torch.optim.AdamW(d.parameters(), lr=0.1)
    for index, batch in enumerate(batches()):
        _, of_d, of_g = gan_updates(g, d, opt_g, opt_d, batch)
        for model, (optimizer, loss_of) in ((g, of_g), (d, of_d)):
            (loss_of() / 2).backward(inputs=list(model.parameters()))
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()

    assert_equal_models(trainer.g, g)
    assert_equal_models(trainer.d, d)


def gans(device: DeviceParameters) -> tuple[list[Tensor], list[Tensor], str]:
    """Weights without and with accumulation; the error of mixed gradients while accumulating."""
    with tempfile.TemporaryDirectory() as root:
        config = tiny_config(root, device=device, gradient_accumulation_steps=2)
        trainer = GAN(config)
        trainer.port = "as the table says"
        trainer.setup()
        try:
            for index, batch in enumerate(batches()[:2]):
                trainer.optimization.begin_batch(index, 2)
                trainer.training_step(batch.chunk(trainer.world.dp_size)[trainer.world.dp_rank], 0)
            message = "none"
        except RuntimeError as error:
            message = str(error)
        trainer.world.shutdown()
    return gan_weights(device), gan_weights(device, 2), message


@pytest.mark.parametrize("layout", ["DDP", "FSDP"])
def test_a_toggled_gan_on_two_ranks_equals_one_process(layout: str) -> None:
    expected = gans(DeviceParameters(device="cpu"))
    make = getattr(DeviceParameters, layout)
    for found in run_on_ranks(gans, 2, make(device="cpu")):
        torch.testing.assert_close(found[:2], expected[:2], rtol=1e-4, atol=1e-5)
        assert "adds to gradients of opt_" in found[2]
    assert "adds to gradients of opt_" in expected[2]


# Two optimizers of one model


class Muon(Plain):
    def configure_models(self) -> None:
        self.model: Any = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def configure_optimizers(self) -> None:
        self.muon, self.adamw = muon_and_adamw(self.model)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.model(batch).square().mean()
        self.backward(loss)
        if not self.is_accumulating_gradients:
            norms = [self.step(self.muon), self.step(self.adamw)]
            assert norms[0] is norms[1]
        return {"loss": loss}


def muon_and_adamw(model: nn.Module) -> tuple[Any, Any]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    return torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_muon_and_adamw_equal_the_plain_loop(
    tmp_path: Path, accumulation: int, algorithm: str
) -> None:
    training = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm}
    config = tiny_config(tmp_path, gradient_accumulation_steps=accumulation, **training)
    trainer = Muon(config)
    trainer.setup()
    model = copy.deepcopy(trainer.model)
    trainer.fit()
    optimizers = muon_and_adamw(model)
    for index, batch in enumerate(batches()):
        (model(batch).square().mean() / accumulation).backward()
        if index % accumulation == accumulation - 1:
            if algorithm == "norm":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            else:
                torch.nn.utils.clip_grad_value_(model.parameters(), 0.05)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    assert_equal_models(trainer.model, model)
    assert trainer.global_step == NUM_BATCHES // accumulation


class Parts(Muon):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        for optimizer in (self.muon, self.adamw):
            with self.toggled(optimizer):
                loss = self.model(batch).square().mean()
                self.backward(loss)
            self.step(optimizer)
        return {"loss": loss}


def weights_of_parts(device: DeviceParameters) -> list[Tensor]:
    with tempfile.TemporaryDirectory() as root:
        trainer = Parts(tiny_config(root, device=device))
        trainer.fit()
        trainer.world.shutdown()
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_parts_of_a_model_under_ddp_are_toggled_as_in_one_process() -> None:
    expected = weights_of_parts(DeviceParameters(device="cpu"))
    for found in run_on_ranks(weights_of_parts, 2, DeviceParameters.DDP(device="cpu")):
        torch.testing.assert_close(found, expected)


# Several updates in a batch


class PPO(Plain):
    """Policy and value of a shared trunk; epochs of minibatches of one rollout."""

    def configure_models(self) -> None:
        self.trunk, self.policy, self.value = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 1)

    def configure_optimizers(self) -> None:
        models = (self.trunk, self.policy, self.value)
        self.optimizer = torch.optim.Adam([p for m in models for p in m.parameters()], lr=1e-2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        for loss_of in ppo_losses(self.trunk, self.policy, self.value, batch):
            loss = loss_of()
            self.backward(loss)
            self.step(self.optimizer)
        return {"loss": loss}


def ppo_losses(
    trunk: nn.Module, policy: nn.Module, value: nn.Module, rollout: Tensor
) -> list[Callable[[], Tensor]]:
    with torch.no_grad():
        before = policy(trunk(rollout)).log_softmax(-1)[:, 0]
        advantage = rollout.sum(1)

    def loss(rows: Tensor) -> Tensor:
        hidden = trunk(rollout[rows])
        ratio = (policy(hidden).log_softmax(-1)[:, 0] - before[rows]).exp()
        gain = advantage[rows] * ratio.clamp(0.8, 1.2)
        return value(hidden).square().mean() - gain.mean()

    return [lambda rows=rows: loss(rows) for _ in range(3) for rows in torch.arange(4).chunk(2)]  # type: ignore[misc]


def test_updates_of_one_rollout_equal_the_plain_loop_and_are_all_counted(tmp_path: Path) -> None:
    trainer = PPO(tiny_config(tmp_path, gradient_clip_val=0.5))
    trainer.setup()
    models = [copy.deepcopy(m) for m in (trainer.trunk, trainer.policy, trainer.value)]
    trainer.fit()
    parameters = [p for m in models for p in m.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for batch in batches():
        for loss_of in ppo_losses(*models, batch):
            optimizer.zero_grad()
            loss_of().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()

    for ours, plain in zip((trainer.trunk, trainer.policy, trainer.value), models, strict=True):
        assert_equal_models(ours, plain)
    assert trainer.global_step == 6 * NUM_BATCHES


# What nobody trains


class PartOfIt(Plain):
    def configure_models(self) -> None:
        super().configure_models()
        self.teacher, self.forgotten = nn.Linear(4, 1), nn.Linear(1, 1)

    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.head.parameters(), lr=0.1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        with torch.no_grad():
            target = self.teacher(batch)
        loss = F.mse_loss(self.forgotten(self.model(batch)), target)
        self.backward(loss)
        self.step(self.optimizer)
        return {"loss": loss}


def test_parameters_without_an_optimizer_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = PartOfIt(tiny_config(tmp_path))
    trainer.fit()

    part, whole = [r.getMessage() for r in caplog.records if "no optimizer has" in r.getMessage()]
    assert "model.embed.weight, model.embed.bias" in part
    assert "and 1 more" in part
    assert "forgotten.weight, forgotten.bias, so" in whole
    assert all(p.grad is None for p in trainer.model.parameters())


# Gradients that a skipped step leaves


class Skips(Plain):
    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if batch_idx == 3:  # the last of a group
            return {}
        return {"loss": self.update(batch)}

    def update(self, batch: Tensor) -> Tensor:
        loss: Tensor = self.model(batch).square().mean()
        self.backward(loss)
        if not self.is_accumulating_gradients:
            self.step(self.optimizer)
        return loss


def skipped(device: DeviceParameters, batch_indices: tuple[int, ...]) -> list[Tensor]:
    class Takes(Skips):
        def configure_dataloaders(self) -> Any:
            all_batches = batches() + batches()
            size, rank = self.world.dp_size, self.world.dp_rank
            return [all_batches[index].chunk(size)[rank] for index in batch_indices]

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx if len(batch_indices) == 6 else 0)

    with tempfile.TemporaryDirectory() as root:
        trainer = Takes(tiny_config(root, device=device, gradient_accumulation_steps=2))
        trainer.fit()
        return [
            value.full_tensor() if hasattr(value, "full_tensor") else value
            for value in trainer.model_state_dict()["model"].values()
        ]


def test_a_group_without_a_step_leaves_no_gradient(caplog: pytest.LogCaptureFixture) -> None:
    cpu = DeviceParameters(device="cpu")
    found, expected = skipped(cpu, (0, 1, 2, 3, 4, 5)), skipped(cpu, (0, 1, 4, 5))

    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert (
        caplog.text.count("ended without self.step(optimizer), so its gradients are dropped") == 1
    )


def skipped_on_ranks() -> bool:
    fsdp = DeviceParameters.FSDP(device="cpu")
    found, expected = skipped(fsdp, (0, 1, 2, 3, 4, 5)), skipped(fsdp, (0, 1, 4, 5))
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_group_without_a_step_leaves_no_unsharded_gradient() -> None:
    assert all(run_on_ranks(skipped_on_ranks, 2))


class StepsBetweenLosses(Plain):
    """Two optimizers of one model; the first one steps before the other's last backward."""

    def configure_optimizers(self) -> None:
        self.one = torch.optim.SGD(self.model.embed.parameters(), lr=0.1)
        self.other = torch.optim.SGD(self.model.head.parameters(), lr=0.1)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        for optimizer in (self.one, self.other):
            with self.toggled(optimizer):
                self.backward(self.model(batch).square().mean())
            if not self.is_accumulating_gradients:
                self.step(optimizer)
        return {}


def test_clipping_incomplete_gradients_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, gradient_accumulation_steps=2, gradient_clip_val=1.0)

    with pytest.raises(RuntimeError, match=r"step\(one\) scales and clips the gradients of other"):
        StepsBetweenLosses(config).fit()
