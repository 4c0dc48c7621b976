"""Optimizers, schedulers, clipping and the optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.world import World
from dream_trainer.world.gradient_clipping import clip_norm, clip_value, gradients_of, total_norm


def parameters(*gradients: list[float] | None) -> list[nn.Parameter]:
    made = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros(len(gradient or [0])))
        parameter.grad = None if gradient is None else torch.tensor(gradient)
        made.append(parameter)
    return made


def clipped(parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    gradients = gradients_of(parameters)
    norm = total_norm(gradients)
    clip_norm(gradients, max_norm, norm)
    return norm


def test_the_norm_is_over_all_gradients() -> None:
    assert total_norm(gradients_of(parameters([3.0], None, [0.0, 4.0]))).item() == 5.0


def test_clipping_scales_all_gradients_equally() -> None:
    pair = parameters([3.0], [4.0])

    assert clipped(pair, 1.0).item() == 5.0
    assert total_norm(gradients_of(pair)).item() == pytest.approx(1.0, abs=1e-5)


def test_clipping_equals_torchs_bit_for_bit() -> None:
    ours, torchs = (parameters([0.3, 0.7], [1.1, -2.0, 0.1]) for _ in range(2))

    assert clipped(ours, 0.5) == torch.nn.utils.clip_grad_norm_(torchs, 0.5)
    for mine, expected in zip(ours, torchs, strict=True):
        assert torch.equal(mine.grad, expected.grad)  # type: ignore[arg-type]


def clipped_on_a_mesh() -> tuple[float, list[list[float]], list[list[float]]]:
    """Norm of a sharded and of a partial gradient; both after clipping the norm, and the value."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    World(DeviceParameters(device="cpu")).launch()
    mesh = init_device_mesh("cpu", (2,))

    def pair() -> list[nn.Parameter]:
        sharded = nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Shard(0)]))
        sharded.grad = distribute_tensor(torch.tensor([0.0, 3.0]), mesh, [Shard(0)])
        replicated = nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Replicate()]))
        replicated.grad = DTensor.from_local(torch.tensor([2.0, 0.0]), mesh, [Partial()])
        return [sharded, replicated]

    by_norm, by_value = pair(), pair()
    norm = clipped(by_norm, 0.5)
    clip_value(by_value, 2.5)
    return norm.item(), *(
        [p.grad.full_tensor().tolist() for p in each] for each in (by_norm, by_value)
    )


def test_partial_gradients_are_clipped() -> None:
    for norm, by_norm, by_value in run_on_ranks(clipped_on_a_mesh, 2):
        assert norm == 5.0
        assert by_norm == [pytest.approx([0.0, 0.3]), pytest.approx([0.4, 0.0])]
        assert by_value == [[0.0, 2.5], [2.5, 0.0]]


def test_a_zero_norm_is_legal() -> None:
    assert clipped(parameters([0.0, 0.0]), 1.0).item() == 0.0
    assert clipped(parameters(None), 1.0).item() == 0.0


def test_sparse_gradients_are_clipped() -> None:
    table = nn.Parameter(torch.zeros(5, 2))
    for _ in range(2):  # their sum isn't coalesced
        nn.functional.embedding(torch.tensor([1, 1, 3]), table, sparse=True).sum().backward()
    dense = table.grad.to_dense()  # type: ignore[union-attr]

    assert clipped([table], 1.0) == pytest.approx(dense.norm().item())
    torch.testing.assert_close(table.grad.to_dense(), dense / dense.norm())  # type: ignore[union-attr]
    clip_value([table], 0.1)
    assert table.grad.to_dense().max().item() == pytest.approx(0.1)  # type: ignore[union-attr]


def test_step_returns_the_norm_before_clipping(tmp_path: Path) -> None:
    norms = []

    class Keeps(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
            self.backward(loss)
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            expected = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]))
            norms.append((expected.item(), self.step(self.optimizer).item()))
            return loss

    Keeps(tiny_config(tmp_path, gradient_clip_val=1e-3, max_steps=3)).fit()

    for expected, found in norms:
        assert found == pytest.approx(expected, rel=1e-6)


def test_stepping_while_gradients_accumulate_is_refused(tmp_path: Path) -> None:
    class Steps(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.model(batch[0]).sum()
            self.backward(loss)
            self.step(self.optimizer)
            return loss

    with pytest.raises(RuntimeError, match=r"still accumulating \(2 batches make a step\); write"):
        Steps(tiny_config(tmp_path, gradient_accumulation_steps=2)).fit()


def test_the_hooks_get_the_model_that_the_optimizer_changes(tmp_path: Path) -> None:
    pairs = []

    class Pairs(Callback[TinyTrainer]):
        def pre_optimizer_step(self, model: Any, optimizer: Any) -> None:
            pairs.append((model, optimizer))

    class TwoOptimizers(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.critic = nn.Linear(1, 1)

        def configure_optimizers(self) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            self.critic_optimizer = torch.optim.SGD(self.critic.parameters(), lr=0.1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.critic(self.model(batch[0])).sum()
            self.backward(loss)
            self.step(self.critic_optimizer)
            self.step(self.optimizer)
            return loss

    trainer = TwoOptimizers(tiny_config(tmp_path, [Pairs()], max_steps=1))
    trainer.fit()

    assert pairs == [
        (trainer.critic, trainer.critic_optimizer),
        (trainer.model, trainer.optimizer),
    ]
    assert trainer.global_step == 1


def test_each_optimizer_hook_sees_the_documented_state(tmp_path: Path) -> None:
    seen: list[tuple[str, bool, float | None]] = []

    class Looks(Callback[TinyTrainer]):
        def look(self, hook: str) -> None:
            gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients).item() if gradients else None
            weight = self.trainer.model.head.weight
            seen.append((hook, torch.equal(weight, self.before), norm))

        def pre_train_step(self, batch: Any, batch_idx: int) -> None:
            self.before = self.trainer.model.head.weight.detach().clone()

        def pre_optimizer_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            self.look("pre step")

        def post_optimizer_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            self.look("post step")

        def pre_optimizer_zero_grad(
            self, model: nn.Module, optimizer: torch.optim.Optimizer
        ) -> None:
            self.look("pre zero")

        def post_optimizer_zero_grad(
            self, model: nn.Module, optimizer: torch.optim.Optimizer
        ) -> None:
            self.look("post zero")

    TinyTrainer(tiny_config(tmp_path, [Looks()], max_steps=1, gradient_clip_val=0.01)).fit()

    clipped = pytest.approx(0.01, rel=1e-3)
    assert seen == [
        ("pre step", True, clipped),
        ("post step", False, clipped),
        ("pre zero", False, clipped),
        ("post zero", False, None),
    ]


def test_gradients_of_parameters_added_by_a_hook_are_zeroed(tmp_path: Path) -> None:
    class Adds(Callback[TinyTrainer]):
        def post_optimizer_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            if self.trainer.global_step == 0:
                optimizer.add_param_group({"params": self.trainer.head.parameters()})

    class Heads(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.head = nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.head(self.model(batch[0])).sum()
            self.backward(loss)
            self.step(self.optimizer)
            return loss

    trainer = Heads(tiny_config(tmp_path, [Adds()], max_steps=1))
    trainer.fit()

    assert trainer.head.weight.grad is None
    assert len(trainer.optimizer.param_groups) == 2


@pytest.mark.parametrize("changed", ["class", "instance", "torch"])
def test_an_optimizers_own_zero_grad_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    calls = []
    torchs = torch.optim.Optimizer.zero_grad

    def keep(self: torch.optim.Optimizer, set_to_none: bool = True) -> None:
        calls.append(set_to_none)
        torchs(self, set_to_none=False)

    class Keeps(torch.optim.SGD):
        zero_grad = keep  # type: ignore[assignment]

    class Own(TinyTrainer):
        def configure_optimizers(self) -> None:
            kind = Keeps if changed == "class" else torch.optim.SGD
            self.optimizer = kind(self.model.parameters(), lr=0.1)
            if changed == "instance":
                self.optimizer.zero_grad = keep.__get__(self.optimizer)  # type: ignore[method-assign]

    if changed == "torch":
        monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", keep)
    trainer = Own(tiny_config(tmp_path, max_steps=2))
    trainer.fit()

    assert calls == [True, True]
    assert trainer.model.head.weight.grad is not None


@pytest.mark.parametrize("returns", ["attribute", "scheduler", "mapping", "list"])
def test_schedulers_are_stepped_once_per_optimizer_step(tmp_path: Path, returns: str) -> None:
    class Scheduled(TinyTrainer):
        def configure_schedulers(self) -> Any:
            scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=1, gamma=0.5)
            if returns == "attribute":
                self.scheduler = scheduler
            return {
                "attribute": None,
                "scheduler": scheduler,
                "mapping": {self.optimizer: scheduler},
                "list": [scheduler],
            }[returns]

    config = tiny_config(tmp_path, gradient_accumulation_steps=2, max_steps=3)
    config.learning_rate = 1.0
    trainer = Scheduled(config)
    trainer.fit()

    assert list(trainer.named_schedulers()) == ["scheduler"]
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5**3


def test_reduce_lr_on_plateau_is_not_stepped(tmp_path: Path) -> None:
    class Plateau(TinyTrainer):
        def configure_schedulers(self) -> None:
            self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer)

    trainer = Plateau(tiny_config(tmp_path, max_steps=3))
    trainer.fit()

    assert trainer.scheduler.last_epoch == 0


@pytest.mark.parametrize("returns", ["nothing", "optimizer", "mapping", "list"])
def test_optimizers_may_be_assigned_or_returned(tmp_path: Path, returns: str) -> None:
    class Returns(TinyTrainer):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            self.made = [optimizer]
            if returns in ("nothing", "mapping"):
                self.optimizer = optimizer
            return {
                "nothing": None,
                "optimizer": optimizer,
                "mapping": {self.model: optimizer},
                "list": [optimizer],
            }[returns]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.model(batch[0]).sum()
            self.backward(loss)
            self.step(self.made[0])
            return loss

    trainer = Returns(tiny_config(tmp_path, max_steps=1))
    trainer.fit()

    assert dict(trainer.named_optimizers()) == {"optimizer": trainer.made[0]}


def test_an_optimizer_of_foreign_parameters_is_refused(tmp_path: Path) -> None:
    class Foreign(TinyTrainer):
        def configure_optimizers(self) -> None:
            self.optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)

    with pytest.raises(RuntimeError, match="2 of the 2 parameters of optimizer 'optimizer' belong"):
        Foreign(tiny_config(tmp_path)).setup()


def test_no_optimizer_is_refused(tmp_path: Path) -> None:
    class Forgets(TinyTrainer):
        def configure_optimizers(self) -> None:
            torch.optim.SGD(self.model.parameters(), lr=0.1)

    with pytest.raises(RuntimeError, match="configure_optimizers made no optimizer"):
        Forgets(tiny_config(tmp_path)).setup()


def test_other_return_values_are_refused(tmp_path: Path) -> None:
    class Wrong(TinyTrainer):
        def configure_optimizers(self) -> Any:
            return "adam"

    with pytest.raises(TypeError, match="configure_optimizers returned 'adam'; optimizers are"):
        Wrong(tiny_config(tmp_path)).setup()


def test_an_unknown_optimizer_cannot_be_stepped(tmp_path: Path) -> None:
    class Makes(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.model(batch[0]).sum()
            self.backward(loss)
            self.step(torch.optim.SGD(self.model.parameters(), lr=0.1))
            return loss

    with pytest.raises(ValueError, match="isn't an optimizer of this trainer"):
        Makes(tiny_config(tmp_path)).fit()
