"""States of optimizers that only training creates are restored, without a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import tiny
from torch import Tensor, nn
from training import different, moments, weights

from dream_callbacks.checkpoint.errors import CheckpointError
from dream_trainer.testing import TinyTrainer, run_on_ranks


class Curvature(TinyTrainer):
    """LBFGS: its step needs a closure, and its state has lists of tensors that grow."""

    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.LBFGS(
            self.model.parameters(), lr=0.5, max_iter=3, history_size=4
        )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch

        def closure() -> Tensor:
            loss = nn.functional.mse_loss(self.model(x), y)
            self.backward(loss)
            return loss

        self.step(self.optimizer, closure)
        return {}


class Delegates(torch.optim.Optimizer):
    """Steps with an optimizer of its own, as SAM does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.base = torch.optim.SGD(self.param_groups, lr=0.05, momentum=0.9)
        self.param_groups = self.base.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


class Wrapped(TinyTrainer):
    def configure_optimizers(self) -> None:
        self.optimizer = Delegates(self.model.parameters())

    def configure_schedulers(self) -> None:
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.9)


class TensorRate(TinyTrainer):
    """Its learning rate is a tensor, as for CUDA graphs."""

    def configure_optimizers(self) -> None:
        rate = torch.tensor(0.01)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, foreach=False)

    configure_schedulers = Wrapped.configure_schedulers


@pytest.mark.parametrize("kind", [Curvature, Wrapped, TensorRate])
def test_optimizers_of_every_kind_are_restored_exactly(
    tmp_path: Path, kind: type[TinyTrainer]
) -> None:
    straight = tiny(tmp_path / "straight", kind=kind)
    straight.fit()
    tiny(tmp_path, kind=kind, training={"max_steps": 5}).fit()
    resumed = tiny(tmp_path, kind=kind)
    resumed.fit()

    assert resumed.global_step == straight.global_step == 16
    assert not different(weights(resumed), weights(straight))


class OwnRule(TinyTrainer):
    """Steps with each third batch; a run that ends in between has pending gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = nn.functional.mse_loss(self.model(x), y, reduction="sum")
        self.backward(loss, denominator=len(x))
        if self.local_batches % 3 == 2:
            self.step(self.optimizer)
        if self.stops_at == self.local_batches + 1:
            self.stop("between two steps")
        return {}

    stops_at = 0


class StopsBetweenSteps(OwnRule):
    stops_at = 5


def test_gradients_that_no_step_has_used_are_restored(tmp_path: Path) -> None:
    straight = tiny(tmp_path / "straight", kind=OwnRule)
    straight.fit()
    stopped = tiny(tmp_path, kind=StopsBetweenSteps)
    stopped.fit()
    resumed = tiny(tmp_path, kind=OwnRule)
    resumed.fit()

    assert (stopped.global_step, stopped.local_batches) == (1, 5)
    assert resumed.global_step == straight.global_step == 5
    assert not different(weights(resumed), weights(straight))


class Momentum(TinyTrainer):
    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)


class OwnRuleWrapped(OwnRule):
    """With an optimizer that wraps another; each has tensors that are sharded."""

    configure_optimizers = Wrapped.configure_optimizers  # type: ignore[assignment]


def restored_on_shards(root: Path) -> tuple[int, int, list[str]]:
    straight = tiny(root / "straight", kind=OwnRuleWrapped, layout="fsdp")
    straight.fit()
    tiny(
        root, kind=OwnRuleWrapped, layout="fsdp", n_epochs=1
    ).fit()  # ends two batches after a step
    resumed = tiny(root, kind=OwnRuleWrapped, layout="fsdp")
    resumed.setup()
    num_pending = sum(p.grad is not None for p in resumed.model.parameters())
    resumed.fit()
    return num_pending, resumed.global_step, different(weights(resumed), weights(straight))


def test_pending_gradients_and_wrapped_states_of_shards_are_restored(tmp_path: Path) -> None:
    for found in run_on_ranks(restored_on_shards, 2, tmp_path):
        assert found == (8, 5, [])


def test_an_optimizer_of_another_class_is_refused(tmp_path: Path) -> None:
    tiny(tmp_path).fit()

    with pytest.raises(CheckpointError) as caught:
        tiny(tmp_path, kind=Momentum).setup()

    assert "only in the checkpoint: optimizers.optimizer.param_groups.amsgrad" in str(caught.value)
    assert "optimizers.optimizer.param_groups.momentum" in str(caught.value)


class Head(TinyTrainer):
    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.head.parameters(), lr=0.1)


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    tiny(tmp_path).fit()

    with pytest.raises(CheckpointError, match=r"optimizers\.optimizer\.state\.blocks\.0\.bias"):
        tiny(tmp_path, kind=Head).setup()


class LargerHead(TinyTrainer):
    def configure_models(self) -> None:
        super().configure_models()
        self.model.head = nn.Linear(8, 2)


def test_strict_load_false_restores_the_states_that_fit(tmp_path: Path) -> None:
    first = tiny(tmp_path)
    first.fit()
    second = tiny(tmp_path, kind=LargerHead, strict_load=False)
    second.setup()

    found, before = moments(second), moments(first)
    assert found.keys() == {name for name in before if "head" not in name}
    assert not different(found, {name: before[name] for name in found})
