"""State: stopped and resumed equals never stopped, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dream_trainer.callbacks import Callback, RankLocal
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config


class Augmented(Dataset[Any]):
    """Random augmentation from three generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return torch.full((4,), float(index)) / 12 + noise * 0.1


class Everything(TinyTrainer):
    """Shuffling, augmentation, dropout, a scheduler, and a record of what was seen."""

    num_workers = 0

    def configure_schedulers(self) -> None:
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=10)

    def configure_dataloaders(self) -> Any:
        loader = DataLoader(Augmented(), batch_size=2, shuffle=True, num_workers=self.num_workers)
        return loader, DataLoader(torch.ones(2, 4), batch_size=2)  # draws a random number

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss = nn.functional.dropout(self.model(batch), 0.2).square().mean()
        self.backward(loss)
        if not self.is_accumulating_gradients:
            self.step(self.optimizer)
        return {"loss": loss, "sum": batch.sum()}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"val_loss": self.model(batch).square().mean()}


class History(Callback[Any]):
    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []
        self.epochs: list[dict[str, float]] = []

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.seen.append((result["loss"].item(), result["sum"].item()))

    def post_train_epoch(self, result: dict[str, Any]) -> None:
        self.epochs.append(result)


def make(tmp_path: Path, **training: Any) -> tuple[Everything, History]:
    history = History()
    return Everything(tiny_config(tmp_path, [history], **training)), history


@pytest.mark.parametrize("num_workers", [0, 2], ids=["main_process", "workers"])
@pytest.mark.parametrize("accumulation", [1, 4], ids=["no_accumulation", "accumulation_4"])
@pytest.mark.parametrize("stop_at", [1, 3, 5], ids=lambda step: f"stopped_at_{step}")
def test_resumed_equals_never_stopped(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_workers: int,
    accumulation: int,
    stop_at: int,
) -> None:
    monkeypatch.setattr(Everything, "num_workers", num_workers)
    common = {"gradient_accumulation_steps": accumulation, "n_epochs": 4}
    straight, straight_history = make(tmp_path, **common)
    straight.fit()

    first, first_history = make(tmp_path, **common, max_steps=stop_at)
    first.fit()
    torch.save(without_wrappers(first.state_dict()), tmp_path / "state.pt")
    second, second_history = make(tmp_path, **common)
    second.setup()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    second.fit()

    assert first_history.seen + second_history.seen == straight_history.seen
    assert first_history.epochs + second_history.epochs == straight_history.epochs
    assert_equal(second.state_dict()["models"], straight.state_dict()["models"])
    assert_equal(second.state_dict()["optimizers"], straight.state_dict()["optimizers"])
    assert second.global_step == straight.global_step
    assert second.local_batches == straight.local_batches


def without_wrappers(state: Any) -> Any:
    if isinstance(state, RankLocal):
        return without_wrappers(state.value)
    if isinstance(state, dict):
        return {key: without_wrappers(value) for key, value in state.items()}
    return state


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def test_state_has_the_documented_layout(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, max_steps=2)
    trainer.fit()
    state = trainer.state_dict()

    assert list(state) == ["trainer", "models", "optimizers", "schedulers", "dataloaders"]
    assert list(state["trainer"]) == ["counters", "callbacks", "random_state", "epoch_means"]
    assert state["trainer"]["counters"]["global_step"] == 2
    assert "blocks.0.weight" in state["models"]["model"]
    assert "blocks.0.weight" in state["optimizers"]["optimizer"]["state"]
    assert isinstance(state["dataloaders"]["train"], RankLocal)


def test_a_state_saved_before_the_first_step_has_no_optimizer_state_and_loads(
    tmp_path: Path,
) -> None:
    trainer, _ = make(tmp_path)
    trainer.setup()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    state = trainer.state_dict()

    assert state["optimizers"]["optimizer"]["state"] == {}
    assert_equal(trainer.model.state_dict(), before)
    other, _ = make(tmp_path)
    other.setup()
    other.load_state_dict(state)


def test_a_target_has_the_groups_of_an_optimizer_that_has_not_stepped(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path)
    trainer.setup()

    target = trainer.state_dict(as_target=True)["optimizers"]["optimizer"]

    assert target["state"] == {}
    assert "blocks.0.weight" in target["param_groups"][0]["params"]


def test_resume_data_false_restarts_the_epoch(tmp_path: Path) -> None:
    first, _ = make(tmp_path, n_epochs=1, max_steps=4)
    first.fit()
    second, history = make(tmp_path, n_epochs=1)
    second.setup()
    second.load_state_dict(first.state_dict(), resume_data=False)
    second.fit()

    assert second.global_step == 4 + 6
    assert len(history.seen) == 6


def test_different_names_are_refused_with_both_sides(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path)
    trainer.setup()
    state = trainer.state_dict()
    state["models"]["discriminator"] = state["models"].pop("model")

    with pytest.raises(KeyError, match=r"models \['discriminator'\].*trainer has \['model'\]"):
        trainer.load_state_dict(state)


class TwoModels(TinyTrainer):
    """One optimizer over two models with parameters of the same names, and one for a third."""

    def configure_models(self) -> None:
        self.encoder, self.decoder, self.critic = (nn.Linear(4, 4) for _ in range(3))

    def configure_optimizers(self) -> Any:
        both = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.AdamW(both, lr=1e-2)
        return {
            self.encoder: self.optimizer,
            self.critic: torch.optim.AdamW(self.critic.parameters()),
        }

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, _ = batch
        loss = self.critic(self.decoder(self.encoder(x))).square().mean()
        self.backward(loss)
        for optimizer in self.named_optimizers().values():
            self.step(optimizer)
        return loss

    validation_step = None  # type: ignore[assignment]

    def configure_dataloaders(self) -> Any:
        return super().configure_dataloaders()[0]


def test_several_models_and_optimizers_resume(tmp_path: Path) -> None:
    straight = TwoModels(tiny_config(tmp_path, max_steps=6))
    straight.fit()
    first = TwoModels(tiny_config(tmp_path, max_steps=3))
    first.fit()
    second = TwoModels(tiny_config(tmp_path, max_steps=6))
    second.setup()
    second.load_state_dict(first.state_dict())
    second.fit()

    assert list(straight.named_optimizers()) == ["optimizer", "optimizer_2"]
    assert straight.global_step == 6
    assert_equal(second.state_dict()["models"], straight.state_dict()["models"])


def resumed_on_ranks(layout: str, root: str) -> bool:
    from dream_trainer.configs import DeviceParameters

    def make_tiny(**training: Any) -> tuple[TinyTrainer, History]:
        device = getattr(DeviceParameters, layout)()
        history = LossHistory()
        return TinyTrainer(tiny_config(root, [history], device=device, **training)), history

    straight, straight_history = make_tiny(n_epochs=2)
    straight.fit()
    first, first_history = make_tiny(n_epochs=2, max_steps=5)
    first.fit()
    second, second_history = make_tiny(n_epochs=2)
    second.setup()
    second.load_state_dict(first.state_dict())
    second.fit()
    assert first_history.seen + second_history.seen == straight_history.seen
    return all(
        torch.equal(a, b)
        for a, b in zip(
            (local(p) for p in second.model.parameters()),
            (local(p) for p in straight.model.parameters()),
            strict=True,
        )
    )


class LossHistory(History):
    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.seen.append((result["loss"].item(), 0.0))


def local(parameter: Any) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


@pytest.mark.parametrize("layout", ["DDP", "FSDP"])
def test_resumed_equals_never_stopped_on_two_ranks(tmp_path: Path, layout: str) -> None:
    assert run_on_ranks(resumed_on_ranks, 2, layout, str(tmp_path)) == [True, True]
