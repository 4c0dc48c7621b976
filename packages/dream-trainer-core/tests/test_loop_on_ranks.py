"""The loop on several ranks: stopping together; collectives and device syncs of a step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config


class StopsOnRank(Callback[TinyTrainer]):
    """Requests a stop on one rank, at one step, in one hook."""

    def __init__(self, rank: int, step: int, hook: str) -> None:
        self.rank = rank
        self.step = step
        self.hook = hook

    def _stop_if_due(self, hook: str) -> None:
        trainer = self.trainer
        if (trainer.world.rank, trainer.global_step, hook) == (self.rank, self.step, self.hook):
            trainer.stop(f"rank {self.rank} has seen enough")

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        self._stop_if_due("pre_train_step")

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self._stop_if_due("post_train_step")

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self._stop_if_due("post_validation_epoch")

    def post_epoch(self) -> None:
        self._stop_if_due("post_epoch")


def stopped(
    root: str, rank: int, step: int, hook: str, accumulation: int, step_s: float
) -> tuple[int, int, Any]:
    class TakesTime(Callback[TinyTrainer]):
        def pre_optimizer_step(self, model: Any, optimizer: Any) -> None:
            time.sleep(step_s)

    config = tiny_config(
        root,
        [StopsOnRank(rank, step, hook), TakesTime()],
        n_epochs=3,
        gradient_accumulation_steps=accumulation,
    )
    trainer = TinyTrainer(config)
    trainer.fit()
    assert all(p.grad is None for p in trainer.model.parameters()), "no half of a step is left"
    return trainer.global_step, trainer.local_batches, trainer.stop_reason


@pytest.mark.parametrize(
    ("rank", "step", "hook", "accumulation", "expected"),
    [
        (0, 3, "post_train_step", 1, (4, 4)),
        (1, 3, "post_train_step", 1, (4, 4)),
        (1, 3, "pre_train_step", 1, (5, 5)),
        (1, 1, "pre_train_step", 2, (3, 6)),  # in the first batch of the second step
    ],
    ids=["rank_0", "rank_1", "before_a_step", "accumulating"],
)
def test_all_ranks_stop_after_the_step_that_follows_the_request(
    tmp_path: Path,
    rank: int,
    step: int,
    hook: str,
    accumulation: int,
    expected: tuple[int, int],
) -> None:
    # Steps of 0.6 s: each of them may end with an exchange.
    outcomes = run_on_ranks(stopped, 2, str(tmp_path), rank, step, hook, accumulation, 0.6)

    assert outcomes == [(*expected, f"rank {rank} has seen enough")] * 2


@pytest.mark.parametrize("hook", ["post_validation_epoch", "post_epoch"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_between_two_epochs_prevents_further_steps(
    tmp_path: Path, rank: int, hook: str
) -> None:
    outcomes = run_on_ranks(stopped, 2, str(tmp_path), rank, 8, hook, 1, 0.0)

    assert outcomes == [(8, 8, f"rank {rank} has seen enough")] * 2


class ValidatesOtherWeights(Callback[TinyTrainer]):
    """Swaps the weights during a validation, as a moving average does."""

    @torch.no_grad()
    def pre_validation_epoch(self) -> None:
        self.kept = [parameter.clone() for parameter in self.trainer.model.parameters()]
        for parameter in self.trainer.model.parameters():
            parameter.mul_(0.5)

    @torch.no_grad()
    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        for parameter, kept in zip(self.trainer.model.parameters(), self.kept, strict=True):
            parameter.copy_(kept)


def losses_with_fsdp(root: str, callbacks: list[Callback[TinyTrainer]]) -> list[Any]:
    losses = []

    class KeepsLosses(Callback[TinyTrainer]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            losses.append(result["loss"].item())

    device = DeviceParameters.FSDP(device="cpu")
    config = tiny_config(root, [*callbacks, KeepsLosses()], device=device, n_epochs=2)
    TinyTrainer(config).fit()
    return losses


def test_with_fsdp_weights_can_be_exchanged_for_a_validation(tmp_path: Path) -> None:
    plain = run_on_ranks(losses_with_fsdp, 2, str(tmp_path), [])
    exchanged = run_on_ranks(losses_with_fsdp, 2, str(tmp_path), [ValidatesOtherWeights()])

    assert exchanged == plain


class CountsCollectives(TinyTrainer):
    """Records before each step the number of collectives in each group so far."""

    def configure_models(self) -> None:
        super().configure_models()
        self.numbers: list[tuple[int, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        groups: list[Any] = [dist.group.WORLD, self.world.group("requests")]
        gradients, control = (group._get_sequence_number_for_group() for group in groups)  # noqa: SLF001
        self.numbers.append((gradients, control))
        return super().training_step(batch, batch_idx)


def collectives_of_300_steps(root: str) -> tuple[int, int, float]:
    trainer = CountsCollectives(tiny_config(root, n_epochs=1))
    trainer.config.num_samples = 4 * 310
    started_s = time.monotonic()
    trainer.fit()
    # Without the first, in which DDP rebuilds its buckets.
    (before, control_before), *_, (after, control_after) = trainer.numbers[-301:]
    return after - before, control_after - control_before, time.monotonic() - started_s


def test_ranks_exchange_requests_about_once_a_second_and_not_at_each_step(tmp_path: Path) -> None:
    for num_buckets, num_exchanges, seconds in run_on_ranks(
        collectives_of_300_steps, 2, str(tmp_path)
    ):
        assert num_buckets == 300
        # Three at the start, until the duration of a step is known.
        assert num_exchanges <= 3 + 1.5 * seconds


class HostReads(TorchDispatchMode):
    """Counts operations that sync with a device: reads of a tensor's value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.name() in ("aten::_local_scalar_dense", "aten::is_nonzero"):
            self.count += 1
        return func(*args, **(kwargs or {}))


class WithSGD(TinyTrainer):
    """AdamW keeps its step counts in CPU memory and reads them there, on any device."""

    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)


class CountsReads(Callback[TinyTrainer]):
    """Watches fifty steps, from the first batch on."""

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.reads = HostReads()
            self.reads.__enter__()

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if batch_idx == 49:
            self.reads.__exit__(None, None, None)


def host_reads(root: str, layout: str) -> int:
    counts = CountsReads()
    device = getattr(DeviceParameters, layout)(device="cpu")
    config = tiny_config(root, [counts], device=device, n_epochs=1, gradient_clip_val=0.1)
    config.num_samples, config.batch_size = 208, 4
    WithSGD(config).fit()
    return counts.reads.count


@pytest.mark.parametrize(
    ("layout", "num_ranks"), [("SINGLE_DEVICE", 1), ("FSDP", 2)], ids=["single", "fsdp"]
)
def test_fifty_steps_have_no_device_sync(tmp_path: Path, layout: str, num_ranks: int) -> None:
    counts = run_on_ranks(host_reads, num_ranks, str(tmp_path), layout)

    assert counts == [0] * num_ranks


def test_the_counter_of_device_syncs_works(tmp_path: Path) -> None:
    class Reads(Callback[TinyTrainer]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            result["loss"].item()

    counts = CountsReads()
    config = tiny_config(tmp_path, [counts, Reads()], n_epochs=1)
    config.num_samples = 208
    WithSGD(config).fit()

    assert counts.reads.count >= 49
