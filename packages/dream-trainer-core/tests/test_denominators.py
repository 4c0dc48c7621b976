"""A step weighted by tokens equals one big batch, in every layout; pending gradients resume."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

VOCABULARY, LENGTH, ROWS, ACCUMULATION, NUM_STEPS = 16, 8, 4, 3, 2
IGNORED = -100
NUM_TOKENS = (1, 8, 2, 5, 0, 0, 7, 3)
"""Valid tokens per row; two rows have none."""


def big_batches() -> list[tuple[Tensor, Tensor]]:
    """The rows of each step; `ROWS` of them are one batch of all ranks."""
    generator, steps = torch.Generator().manual_seed(0), []
    for _ in range(NUM_STEPS):
        x = torch.randint(0, VOCABULARY, (ROWS * ACCUMULATION, LENGTH), generator=generator)
        y = torch.randint(0, VOCABULARY, x.shape, generator=generator)
        for row, target in enumerate(y):
            target[NUM_TOKENS[row % len(NUM_TOKENS)] :] = IGNORED
        steps.append((x, y))
    return steps


class Language(TinyTrainer):
    as_tensor = True
    clip_norms: list[float]
    validation_step = None  # type: ignore[assignment]

    def configure_models(self) -> None:
        self.model: Any = nn.Sequential(
            nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, VOCABULARY)
        )
        self.clip_norms = []

    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0, momentum=0.9)

    def apply_tensor_parallel(self, mesh: DeviceMesh) -> None:
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        parallelize_module(self.model, mesh, {"1": ColwiseParallel(), "3": RowwiseParallel()})

    def configure_dataloaders(self) -> Any:
        size, rank = self.world.dp_size, self.world.dp_rank
        return [
            (x.chunk(size)[rank], y.chunk(size)[rank])
            for big_x, big_y in big_batches()
            for x, y in zip(big_x.split(ROWS), big_y.split(ROWS), strict=True)
        ]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self.model(x).flatten(0, 1), y.flatten(), reduction="sum")
        num_tokens = (y != IGNORED).sum()
        self.backward(loss, denominator=num_tokens if self.as_tensor else num_tokens.item())
        if not self.is_accumulating_gradients:
            norm = self.step(self.optimizer)
            self.clip_norms += [] if norm is None else [norm.item()]
        return {}


def plain(model: nn.Module, clip: float | None) -> list[float]:
    """One big batch per step; the norms."""
    optimizer, norms = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9), []
    for x, y in big_batches():
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORED).backward()
        if clip is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def trained(
    make: Callable[..., DeviceParameters], clip: float | None, as_tensor: bool
) -> tuple[list[Tensor], list[float]]:
    with tempfile.TemporaryDirectory() as root:
        training = {"gradient_accumulation_steps": ACCUMULATION, "gradient_clip_val": clip}
        trainer = Language(tiny_config(root, device=make(device="cpu"), **training))
        trainer.as_tensor = as_tensor
        trainer.fit()
        weights = trainer.model_state_dict()["model"].values()
        whole = [w.full_tensor() if hasattr(w, "full_tensor") else w for w in weights]
    return whole, trainer.clip_norms


@functools.cache
def expected(clip: float | None) -> tuple[list[Tensor], list[float]]:
    with tempfile.TemporaryDirectory() as root:
        trainer = Language(tiny_config(root))
        trainer.setup()
        norms = plain(trainer.model, clip)
    return list(trainer.model.state_dict().values()), norms


LAYOUTS = {
    "single": (1, DeviceParameters.SINGLE_DEVICE),
    "ddp": (2, DeviceParameters.DDP),
    "fsdp": (2, DeviceParameters.FSDP),
    "tp": (2, partial(DeviceParameters, tensor_parallel=2)),
    "hsdp": (4, partial(DeviceParameters.HSDP, dp_shard=2)),
    "fsdp+tp": (4, partial(DeviceParameters.FSDP, tensor_parallel=2)),
}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(k, marks=[pytest.mark.full] if n == 4 else []) for k, (n, _) in LAYOUTS.items()],
)
def test_a_step_weighted_by_tokens_equals_one_big_batch(layout: str) -> None:
    num_ranks, make = LAYOUTS[layout]
    for clip, as_tensor in ((None, True), (0.1, False)):
        weights, norms = expected(clip)
        for found, found_norms in run_on_ranks(trained, num_ranks, make, clip, as_tensor):
            torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-6)
            assert found_norms == pytest.approx(norms, rel=1e-5)


def test_a_step_without_a_token_changes_nothing(tmp_path: Path) -> None:
    class NoTokens(Language):
        def configure_dataloaders(self) -> Any:
            return [(torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), IGNORED))]

    trainer = NoTokens(tiny_config(tmp_path))
    trainer.setup()
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.fit()

    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())


class Steps(Language):
    """Runs what a test writes as its batch."""

    script: Any = None

    def configure_dataloaders(self) -> Any:
        return [big_batches()[0]] * 2

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.script(batch)
        return {}

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x).flatten(0, 1), y.flatten(), reduction="sum")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (None, 3, "one without; give one to all"),
        (3, None, "one without; give one to all"),
        (-1, 3, "denominator=-1.*at least 0"),
        (torch.ones(2), 3, r"of shape \(2,\); one number"),
    ],
)
def test_denominators_that_make_no_sense_are_refused(
    tmp_path: Path, first: Any, second: Any, message: str
) -> None:
    trainer = Steps(tiny_config(tmp_path))

    def script(batch: Any) -> None:
        trainer.backward(trainer.loss(batch), denominator=first)
        trainer.backward(trainer.loss(batch), denominator=second)

    trainer.script = script
    with pytest.raises(ValueError, match=message):
        trainer.fit()


def test_zeroed_gradients_take_their_denominator_along(tmp_path: Path) -> None:
    norms = []

    def script(batch: Any) -> None:
        for denominator in (1000, 2):
            trainer.optimizer.zero_grad()
            trainer.backward(trainer.loss(batch), denominator=denominator)
        norms.append(trainer.clip_gradients(trainer.model))
        expected = torch.nn.utils.get_total_norm(
            torch.autograd.grad(trainer.loss(batch) / 2, list(trainer.model.parameters()))
        )
        torch.testing.assert_close(norms[-1], expected)
        assert trainer.step(trainer.optimizer) is norms[-1]

    trainer = Steps(tiny_config(tmp_path, gradient_clip_val=float("inf")))
    trainer.script = script
    trainer.fit()

    assert len(norms) == 2


def test_a_step_can_be_skipped_by_its_norm(tmp_path: Path) -> None:
    def script(batch: Any) -> None:
        loss = trainer.loss(batch)
        trainer.backward(loss * float("nan") if trainer.local_batches == 1 else loss)
        norm = trainer.clip_gradients(trainer.model)
        if norm.isfinite():  # host sync
            trainer.step(trainer.optimizer)
        else:
            trainer.optimizer.zero_grad()

    trainer = Steps(tiny_config(tmp_path, gradient_clip_val=1.0))
    trainer.script = script
    trainer.fit()

    assert trainer.global_step == 1
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_clipping_can_be_overridden(tmp_path: Path) -> None:
    calls = []

    class Own(Language):
        def clip_gradients(self, model: nn.Module) -> Tensor | None:
            calls.append((model, self.global_step))
            torch.nn.utils.clip_grad_value_(model.parameters(), 0.0)
            return None

    trainer = Own(tiny_config(tmp_path, gradient_accumulation_steps=ACCUMULATION))
    trainer.setup()
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.fit()

    assert calls == [(trainer.model, 0), (trainer.model, 1)]
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())


# The user's own accumulation


class OwnRule(Language):
    """Steps with the batches 2 and 5 of an epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self.model(x).flatten(0, 1), y.flatten(), reduction="sum")
        self.backward(loss, denominator=(y != IGNORED).sum())
        if batch_idx in (2, 5):
            self.step(self.optimizer)
        return {}


class StopsAfter(Callback[TinyTrainer]):
    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def post_train_step(self, result: Any, batch_idx: int) -> None:
        if self.trainer.local_batches == self.num_batches:
            self.trainer.stop("enough")


def test_a_rule_of_the_users_own_equals_one_big_batch_and_resumes(tmp_path: Path) -> None:
    weights, _ = expected(None)
    first = OwnRule(tiny_config(tmp_path, [StopsAfter(5)]))
    first.fit()
    state = copy.deepcopy(first.state_dict())
    second = OwnRule(tiny_config(tmp_path))
    second.setup()
    second.load_state_dict(state)
    second.fit()

    assert first.global_step == 1
    assert set(state["trainer"]["gradients"]["model"]) == set(first.model.state_dict())
    torch.testing.assert_close(list(second.model.state_dict().values()), weights)
    assert "gradients" not in second.state_dict()["trainer"]


def stopped_and_resumed(make: Callable[..., DeviceParameters]) -> list[Tensor]:
    with tempfile.TemporaryDirectory() as root:
        first = OwnRule(tiny_config(root, device=make(device="cpu")))
        first.setup()
        second = OwnRule(tiny_config(root, device=make(device="cpu")), world=first.world)
        second.setup()
        second.load_state_dict(first.state_dict())
        first.callbacks.append(StopsAfter(2))
        first.fit()
        second.load_state_dict(first.state_dict())
        second.fit()
        weights = second.model_state_dict()["model"].values()
        return [w.full_tensor() if hasattr(w, "full_tensor") else w for w in weights]


@pytest.mark.parametrize("make", [DeviceParameters.DDP, DeviceParameters.FSDP], ids=["ddp", "fsdp"])
def test_pending_gradients_of_ranks_resume(make: Any) -> None:
    weights, _ = expected(None)
    for found in run_on_ranks(stopped_and_resumed, 2, make):
        torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-6)
