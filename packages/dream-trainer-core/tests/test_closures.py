"""Optimizers with a closure, or with modes, train as in plain PyTorch and resume."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_several_optimizers import Plain, assert_equal_models, batches
from torch import Tensor, nn

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import RankError, run_on_ranks, tiny_config


class SAM(torch.optim.Optimizer):
    """Steps from the gradient at a nearby worse point (Foret et al., 2021), by SGD."""

    def __init__(self, params: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho})
        self.base = torch.optim.SGD(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        loss = torch.enable_grad()(closure)()
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        moves = [0.05 * p.grad / (norm + 1e-12) for p in parameters]
        torch._foreach_add_(parameters, moves)
        self.zero_grad()
        torch.enable_grad()(closure)()
        torch._foreach_sub_(parameters, moves)
        self.base.step()
        return loss


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=3, history_size=2)


def sam(parameters: Any) -> torch.optim.Optimizer:
    return SAM(parameters, lr=0.1, momentum=0.9)


class Closures(Plain):
    make = staticmethod(lbfgs)

    def configure_optimizers(self) -> None:
        self.optimizer = self.make(self.model.parameters())
        self.norms: list[Any] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        losses = []

        def closure() -> Tensor:
            loss: Tensor = self.model(batch).square().mean()
            self.backward(loss)
            losses.append(loss.detach())
            return loss

        self.norms.append(self.step(self.optimizer, closure))
        return {"loss": losses[0]}


class WithSAM(Closures):
    make = staticmethod(sam)


BOTH = pytest.mark.parametrize("trainer_class", [Closures, WithSAM], ids=["LBFGS", "SAM"])


@BOTH
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_optimizer_with_a_closure_equals_the_plain_loop(
    tmp_path: Path, trainer_class: type[Closures], clip: float | None, dtype: Any
) -> None:
    device = DeviceParameters(device="cpu", param_dtype=dtype)
    trainer = trainer_class(tiny_config(tmp_path, device=device, gradient_clip_val=clip))
    trainer.setup()
    model = copy.deepcopy(trainer.model)
    trainer.fit()
    optimizer = trainer_class.make(model.parameters())
    for batch in batches():

        def closure(batch: Tensor = batch) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss: Tensor = model(batch).square().mean()
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            return loss

        optimizer.step(closure)

    assert_equal_models(trainer.model, model)
    assert trainer.global_step == len(batches())
    assert all((norm is None) is (clip is None) for norm in trainer.norms)


@BOTH
def test_an_optimizer_with_a_closure_resumes_exactly(
    tmp_path: Path, trainer_class: type[Closures]
) -> None:
    straight = trainer_class(tiny_config(tmp_path, n_epochs=2))
    straight.fit()
    first = trainer_class(tiny_config(tmp_path, max_steps=3))
    first.fit()
    second = trainer_class(tiny_config(tmp_path, n_epochs=2))
    second.setup()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.fit()

    assert_equal_models(second.model, straight.model)


def trained_with_a_closure(layout: str) -> list[Tensor]:
    device = getattr(DeviceParameters, layout)(device="cpu")
    with tempfile.TemporaryDirectory() as root:
        trainer = WithSAM(tiny_config(root, device=device, gradient_clip_val=0.1))
        trainer.fit()
        weights = trainer.model_state_dict()["model"].values()
        return [w.full_tensor() if hasattr(w, "full_tensor") else w for w in weights]


@pytest.mark.parametrize("layout", ["DDP", "FSDP"])
def test_a_closure_on_two_ranks_equals_one_process(layout: str) -> None:
    expected = trained_with_a_closure("SINGLE_DEVICE")
    for found in run_on_ranks(trained_with_a_closure, 2, layout):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def lbfgs_on_shards() -> None:
    Closures(tiny_config("runs", device=DeviceParameters.FSDP(device="cpu"))).setup()


def test_lbfgs_with_sharded_parameters_is_refused_at_set_up() -> None:
    with pytest.raises(RankError, match=r"torch's LBFGS.*sharded ones of layout 'fsdp'"):
        run_on_ranks(lbfgs_on_shards, 2)


class Wrong(Closures):
    closure: Any = None

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.model(batch).square().mean()
        self.step(self.optimizer, self.closure)
        return {"loss": loss}


@pytest.mark.parametrize(
    ("closure", "accumulation", "error", "message"),
    [
        (None, 1, TypeError, r"LBFGS evaluates the loss.*self\.step\(self\.optimizer, closure\)"),
        (lambda: torch.ones(()), 1, RuntimeError, r"computed no gradient; call self\.backward"),
        (lambda: torch.ones(()), 2, RuntimeError, "still accumulating"),
    ],
)
def test_a_closure_that_cannot_work_is_refused(
    tmp_path: Path, closure: Any, accumulation: int, error: type[Exception], message: str
) -> None:
    trainer = Wrong(tiny_config(tmp_path, gradient_accumulation_steps=accumulation))
    trainer.closure = closure

    with pytest.raises(error, match=message):
        trainer.fit()


def test_a_closure_and_accumulation_exclude_each_other(tmp_path: Path) -> None:
    class Accumulates(Closures):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if self.is_accumulating_gradients:
                return {}
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="the closure computes the whole gradient of a step"):
        Accumulates(tiny_config(tmp_path, gradient_accumulation_steps=2)).fit()


# Modes


class Averaged(torch.optim.SGD):
    """Trains on other weights than it evaluates, as schedule-free optimizers do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.param_groups[0]["train_mode"] = False

    def step(self, closure: Any = None) -> Any:
        assert self.param_groups[0]["train_mode"], "not in train mode"
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            average = state.setdefault("average", parameter.detach().clone())
            average.lerp_(parameter.detach(), 0.3)
        return super().step(closure)

    def train(self) -> None:
        self._exchange(True)

    def eval(self) -> None:
        self._exchange(False)

    @torch.no_grad()
    def _exchange(self, train_mode: bool) -> None:
        if self.param_groups[0]["train_mode"] is train_mode:
            return
        self.param_groups[0]["train_mode"] = train_mode
        for parameter in self.param_groups[0]["params"]:
            if "average" in self.state[parameter]:
                average, mix = self.state[parameter]["average"], 0.7
                parameter.lerp_(average, 1 - 1 / mix if train_mode else mix)


class HasModes(Plain):
    def configure_optimizers(self) -> None:
        self.optimizer = Averaged(self.model.parameters(), lr=0.1)
        self.evaluated: list[float] = []

    def configure_dataloaders(self) -> Any:
        return batches(), batches()[:1]

    def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
        assert not self.optimizer.param_groups[0]["train_mode"]
        self.evaluated.append(self.model(batch).sum().item())
        return {"val_loss": self.model(batch).square().mean()}

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.model(batch).square().mean()
        self.backward(loss)
        self.step(self.optimizer)
        return {"loss": loss}


def test_an_optimizer_with_modes_is_evaluated_in_its_own_and_not_disturbed(tmp_path: Path) -> None:
    validated = HasModes(tiny_config(tmp_path, n_epochs=2, num_sanity_val_steps=1))
    validated.fit()
    never = HasModes(tiny_config(tmp_path, n_epochs=2, val_every_n_steps=0))
    never.fit()
    first = HasModes(tiny_config(tmp_path, n_epochs=1))
    first.fit()
    second = HasModes(tiny_config(tmp_path, n_epochs=2))
    second.setup()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.fit()

    with pytest.raises(RuntimeError, match="has the weights that Averaged trains with"):
        validated.validate(checkpoint="last")
    assert_equal_models(validated.model, never.model)
    assert_equal_models(second.model, never.model)
    assert validated.evaluated[-1] == second.evaluated[-1]
    with torch.no_grad():
        assert validated.evaluated[-1] != validated.model(batches()[0]).sum().item()


# Gradients that not every optimizer takes


class Sparse(Plain):
    clip: Any = None

    def configure_models(self) -> None:
        self.table, self.head = nn.Embedding(5, 2, sparse=True), nn.Linear(2, 1)
        self.unused = nn.Linear(1, 1)

    def configure_optimizers(self) -> None:
        self.sparse = torch.optim.SparseAdam(self.table.parameters(), lr=0.1)
        self.dense = torch.optim.Adam(self.head.parameters(), lr=0.1)
        self.idle = torch.optim.Adam(self.unused.parameters(), lr=0.1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = sparse_loss(self.table, self.head)
        self.backward(loss)
        self.norms = [self.step(each) for each in (self.sparse, self.dense, self.idle)]
        return {"loss": loss}


def sparse_loss(table: nn.Module, head: nn.Module) -> Tensor:
    loss: Tensor = head(table(torch.tensor([0, 3, 3]))).square().mean()
    return loss


@pytest.mark.parametrize("clip", [None, float("inf"), 0.01])
def test_sparse_gradients_and_optimizers_without_a_gradient_step(
    tmp_path: Path, clip: float | None
) -> None:
    trainer = Sparse(tiny_config(tmp_path, gradient_clip_val=clip))
    trainer.setup()
    table, head = copy.deepcopy(trainer.table), copy.deepcopy(trainer.head)
    trainer.fit()
    optimizers = (
        torch.optim.SparseAdam(table.parameters(), lr=0.1),
        torch.optim.Adam(head.parameters(), lr=0.1),
    )
    for _ in batches():
        sparse_loss(table, head).backward()
        if clip is not None:
            for parameter in (table.weight,):
                parameter.grad = parameter.grad.coalesce()
                norm = parameter.grad.values().norm()
                parameter.grad.mul_(torch.clamp(clip / (norm + 1e-6), max=1.0))
            torch.nn.utils.clip_grad_norm_(head.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    assert_equal_models(trainer.table, table)
    assert_equal_models(trainer.head, head)
    assert [norm is None for norm in trainer.norms] == [clip is None] * 3
