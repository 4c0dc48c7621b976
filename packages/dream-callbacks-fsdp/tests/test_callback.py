"""OptimizeFSDP on two gloo ranks: correct lists, no unneeded gathers, the same losses."""

from __future__ import annotations

import copy
import io
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, fully_shard

from dream_callbacks.fsdp import OptimizeFSDP
from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.world import RemoteError

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class NestedBlock(nn.Module):
    """Runs its two inner modules in reverse order of definition."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.late = Block()
        self.early = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.late(self.early(x))


class Net(nn.Module):
    """Blocks in an order that differs from the list, between an embedding and a head."""

    def __init__(self, blocks: list[nn.Module], order: list[int]) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 1)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for index in self.order:
            x = self.blocks[index](x)
        out: Tensor = self.head(x)
        return out


@dataclass
class Gathers:
    """Counts torch's all-gathers by module and training batch."""

    batches: list[list[str]] = field(default_factory=lambda: [[]])

    def of(self, name: str) -> Any:
        return _AllGather(name, self)


# Renamed in torch 2.13.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _AllGather:
    def __init__(self, name: str, gathers: Gathers) -> None:
        self.name = name
        self.gathers = gathers

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        self.gathers.batches[-1].append(self.name)
        return _gather(output_tensor, input_tensor, group=group, async_op=async_op)


class ShardedTrainer(TinyTrainer):
    """Shards a Net by `fully_shard`; subclasses change the order, the blocks or the layout."""

    order = [1, 0, 2]
    block: Callable[[], nn.Module] = Block
    reshard: bool | None = None

    def configure_models(self) -> None:
        self.model = Net([type(self).block() for _ in range(3)], self.order)  # type: ignore[assignment]

    def apply_fully_shard(self, config: dict[str, Any]) -> None:
        if self.reshard is not None:
            config["reshard_after_forward"] = self.reshard
        for block in self.model.blocks:
            self.shard_block(block, config)
        fully_shard(self.model, **config)

    def shard_block(self, block: nn.Module, config: dict[str, Any]) -> None:
        fully_shard(block, **config)


class RepeatedTrainer(ShardedTrainer):
    order = [0, 1, 0, 2]


class UnusedTrainer(ShardedTrainer):
    order = [0, 2]


class KeptTrainer(ShardedTrainer):
    reshard = False


class NestedTrainer(ShardedTrainer):
    block = NestedBlock

    def shard_block(self, block: nn.Module, config: dict[str, Any]) -> None:
        for part in (block.early, block.late, block):
            super().shard_block(part, config)


class RecomputedInsideTrainer(ShardedTrainer):
    """Recomputes inside sharded blocks: FSDP gathers once for both."""

    def shard_block(self, block: nn.Module, config: dict[str, Any]) -> None:
        block.linear = checkpoint_wrapper(block.linear)
        super().shard_block(block, config)


class RecomputedOutsideTrainer(ShardedTrainer):
    """Recomputes sharded blocks: each one's forward runs again in backward."""

    def shard_block(self, block: nn.Module, config: dict[str, Any]) -> None:
        super().shard_block(block, config)
        index = list(self.model.blocks).index(block)
        self.model.blocks[index] = checkpoint_wrapper(block)


class FrozenTrainer(ShardedTrainer):
    """Trains only the last two blocks and the head."""

    def apply_fully_shard(self, config: dict[str, Any]) -> None:
        for part in (self.model.embed, self.model.blocks[self.order[0]]):
            part.requires_grad_(requires_grad=False)
        self.shard_block(self.model.embed, config)
        super().apply_fully_shard(config)


class GroupedTrainer(ShardedTrainer):
    """Shards embedding and head as one group."""

    def apply_fully_shard(self, config: dict[str, Any]) -> None:
        fully_shard([self.model.embed, self.model.head], **config)
        super().apply_fully_shard(config)


class CompiledTrainer(ShardedTrainer):
    def shard_block(self, block: nn.Module, config: dict[str, Any]) -> None:
        block.compile(backend="eager")
        super().shard_block(block, config)


class Two(nn.Module):
    """Two sharded nets with the same names inside, in a module that isn't sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Net([Block() for _ in range(3)], [0, 1, 2])
        self.b = Net([Block() for _ in range(3)], [2, 1, 0])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x) + self.b(x)
        return out


class RunMarked(nn.Module):
    """Records in the list of gathers when a block runs."""

    gathers: Gathers | None = None

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.index = -1

    def forward(self, x: Tensor) -> Tensor:
        if RunMarked.gathers is not None:
            RunMarked.gathers.batches[-1].append(f"run {self.index}")
        out: Tensor = self.linear(x)
        return out


class OrderedTrainer(ShardedTrainer):
    block = RunMarked

    def shard_block(self, block: nn.Module, config: dict[str, Any]) -> None:
        block.index = list(self.model.blocks).index(block)
        super().shard_block(block, config)


class ShortValidationTrainer(ShardedTrainer):
    """Validates on the first block only, then trains on all."""

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.model.order = self.order[:1]
        try:
            return super().validation_step(batch, batch_idx)
        finally:
            self.model.order = self.order


class TwoRootsTrainer(ShardedTrainer):
    def configure_models(self) -> None:
        self.model = Two()  # type: ignore[assignment]  # another model

    def apply_fully_shard(self, config: dict[str, Any]) -> None:
        for net in (self.model.a, self.model.b):
            for block in net.blocks:
                fully_shard(block, **config)
            fully_shard(net, **config)


class Watch(Callback):
    """Records losses and counts all-gathers by batch."""

    after = {"OptimizeFSDP"}

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gathers = Gathers()

    def pre_fit(self) -> None:
        RunMarked.gathers = self.gathers
        for name, model in self.trainer.named_models().items():
            for path, module in model.named_modules(prefix=name):
                if isinstance(module, FSDPModule):
                    module.set_custom_all_gather(self.gathers.of(path.removeprefix("model.")))

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        self.gathers.batches.append([])

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.losses.append(float(result["loss"]))


@dataclass
class Outcome:
    """Results of one rank in one run."""

    losses: list[float]
    gathers: list[list[str]]
    forward: list[dict[str, tuple[str, ...]]]
    backward: list[dict[str, tuple[str, ...]]]
    shown: str


def run(
    root_dir: str,
    trainer_name: str,
    prefetch: int | None,
    training: dict[str, Any],
    others: tuple[str, ...] = (),
    device: dict[str, Any] | None = None,
) -> Outcome:
    """Train on this rank, with other callbacks of this module before it."""
    watch, optimize = Watch(), OptimizeFSDP(prefetch or 1)
    callbacks: list[Callback] = [*(globals()[name]() for name in others), watch]
    if prefetch is not None:
        callbacks.append(optimize)
    layout = DeviceParameters.FSDP(device="cpu", **(device or {}))
    trainer = globals()[trainer_name](tiny_config(root_dir, callbacks, device=layout, **training))
    trainer.fit()
    lists = optimize._lists  # noqa: SLF001  # they are the point here
    return Outcome(
        losses=watch.losses,
        gathers=watch.gathers.batches[1:],
        forward=[made.forward for made in lists],
        backward=[made.backward for made in lists],
        shown="\n".join(map(str, lists)),
    )


def run_each(root_dir: str, trainer_name: str, prefetches: list[int | None], *args: Any) -> Any:
    return [run(root_dir, trainer_name, prefetch, *args) for prefetch in prefetches]


def outcomes(
    tmp_path: Path, trainer_name: str, prefetches: list[int | None], *args: Any, **training: Any
) -> list[Outcome]:
    """Results of both ranks, which must have the same lists."""
    ranks = run_on_ranks(run_each, 2, str(tmp_path), trainer_name, prefetches, training, *args)
    first, second = ([(found.forward, found.backward) for found in rank] for rank in ranks)
    assert first == second
    found: list[Outcome] = ranks[0]
    return found


def test_lists_follow_the_order_of_execution_not_of_definition(tmp_path):
    (found,) = outcomes(tmp_path, "ShardedTrainer", [2], max_steps=1)

    assert found.forward == [
        {
            "": ("blocks.1", "blocks.0"),
            "blocks.1": ("blocks.0", "blocks.2"),
            "blocks.0": ("blocks.2",),
        }
    ]
    assert found.backward == [
        {
            "": ("blocks.2", "blocks.0"),
            "blocks.2": ("blocks.0", "blocks.1"),
            "blocks.0": ("blocks.1",),
            "blocks.1": (),
        }
    ]


@pytest.mark.parametrize(
    "trainer_name",
    [
        "ShardedTrainer",
        "RepeatedTrainer",
        "UnusedTrainer",
        "KeptTrainer",
        "NestedTrainer",
        "RecomputedInsideTrainer",
        "RecomputedOutsideTrainer",
        "FrozenTrainer",
        "GroupedTrainer",
        "CompiledTrainer",
        "TwoRootsTrainer",
    ],
)
def test_losses_are_the_same_and_no_gather_is_unused(tmp_path, trainer_name):
    without, *with_it = outcomes(tmp_path, trainer_name, [None, 1, 3], n_epochs=2)

    for found in with_it:
        assert found.losses == without.losses
        for gathered, needed in zip(found.gathers, without.gathers, strict=True):
            assert not Counter(gathered) - Counter(needed)
        assert found.forward


def test_modules_that_backward_does_not_reach_are_not_gathered(tmp_path):
    without, found = outcomes(tmp_path, "FrozenTrainer", [None, 1], val_steps_per_epoch=0)

    # Torch's own prefetch gathers the frozen block again; its backward never comes.
    assert Counter(without.gathers[-1]) - Counter(found.gathers[-1]) == {"blocks.1": 1}


def test_modules_that_keep_their_parameters_are_not_prefetched_in_backward(tmp_path):
    (found,) = outcomes(tmp_path, "KeptTrainer", [1], max_steps=1)

    assert found.backward == [{"": (), "blocks.2": (), "blocks.0": (), "blocks.1": ()}]
    assert found.forward == [
        {"": ("blocks.1",), "blocks.1": ("blocks.0",), "blocks.0": ("blocks.2",)}
    ]


def test_roots_with_the_same_inner_names_are_distinguished(tmp_path):
    (found,) = outcomes(tmp_path, "TwoRootsTrainer", [1], max_steps=1)

    assert found.forward == [
        {"": ("blocks.0",), "blocks.0": ("blocks.1",), "blocks.1": ("blocks.2",)},
        {"": ("blocks.2",), "blocks.2": ("blocks.1",), "blocks.1": ("blocks.0",)},
    ]
    assert found.backward == [
        {"": ("blocks.2",), "blocks.2": ("blocks.1",), "blocks.1": ("blocks.0",), "blocks.0": ()},
        {"": ("blocks.0",), "blocks.0": ("blocks.1",), "blocks.1": ("blocks.2",), "blocks.2": ()},
    ]


def test_microbatches_of_a_step_are_traced_together(tmp_path):
    without, found = outcomes(
        tmp_path, "ShardedTrainer", [None, 2], gradient_accumulation_steps=2, n_epochs=2
    )

    assert found.losses == without.losses
    assert found.forward[0]["blocks.1"] == ("blocks.0", "blocks.2")


def test_hybrid_sharding_over_four_ranks_is_the_same(tmp_path):
    hybrid = {"dp_replicate": 2, "dp_shard": 2}
    arguments = (str(tmp_path), "ShardedTrainer", [None, 2], {"n_epochs": 2}, (), hybrid)

    for without, found in run_on_ranks(run_each, 4, *arguments):
        assert found.losses == without.losses
        assert list(map(Counter, found.gathers)) == list(map(Counter, without.gathers))
        assert found.forward[0]["blocks.1"] == ("blocks.0", "blocks.2")


def test_prefetched_modules_are_gathered_before_they_run(tmp_path):
    without, found = outcomes(tmp_path, "OrderedTrainer", [None, 2], max_steps=3)

    assert without.gathers[-1][:7] == [
        "model", "blocks.1", "run 1", "blocks.0", "run 0", "blocks.2", "run 2",
    ]  # fmt: skip
    assert found.gathers[-1][:7] == [
        "model", "blocks.1", "blocks.0", "blocks.2", "run 1", "run 0", "run 2",
    ]  # fmt: skip


@pytest.mark.parametrize("callback", ["LookAtOtherWeights", "ValidateOtherWeights"])
def test_running_part_of_the_model_on_other_weights_leaves_no_stale_weights(tmp_path, callback):
    without, found = outcomes(
        tmp_path, "ShortValidationTrainer", [None, 2], (callback,), n_epochs=2
    )

    assert found.losses == without.losses


def test_a_second_fit_keeps_the_lists(tmp_path):
    first, second, steps = run_on_ranks(_fit_twice, 2, str(tmp_path))[0]

    assert first == second
    assert first
    assert steps == 16


def test_an_error_in_a_traced_batch_restores_the_logger(tmp_path):
    assert run_on_ranks(_fail_while_tracing, 2, str(tmp_path)) == [(True, [], 0), (True, [], 0)]


def test_fsdp_messages_are_not_shown_while_tracing(tmp_path):
    assert run_on_ranks(_seen_by_handlers, 2, str(tmp_path)) == [[], []]


def test_the_order_is_displayed_only_on_rank_zero(tmp_path):
    shown, nothing = run_on_ranks(_displayed, 2, str(tmp_path))

    assert nothing == ""
    assert "model.blocks.1  prefetches model.blocks.0" in shown
    assert "not used" not in shown


def test_ranks_that_run_modules_in_different_orders_prefetch_nothing(tmp_path):
    (first, warnings), (second, others) = run_on_ranks(_disagree, 2, str(tmp_path))

    assert first == second == []
    assert len(warnings) == 1
    assert "ranks 0 and 1 ran their FSDP modules in different orders" in warnings[0]
    assert others == []


def test_an_unsharded_model_is_unchanged_and_reported_once(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "dream_callbacks.fsdp")
    trainer = TinyTrainer(tiny_config(tmp_path, [OptimizeFSDP()], n_epochs=2))

    trainer.fit()

    assert caplog.messages == ["no model is sharded with FSDP2; nothing to prefetch"]


def test_importing_it_does_not_import_fsdp():
    script = "import sys, dream_callbacks.fsdp\nsys.exit('torch.distributed.fsdp' in sys.modules)"

    subprocess.run([sys.executable, "-c", script], check=True)


def test_it_runs_before_callbacks_that_are_listed_earlier(tmp_path):
    trainer = TinyTrainer(tiny_config(tmp_path, [Watch(), OptimizeFSDP()]))

    assert trainer.callbacks.plan().hooks["post_train_step"] == ("OptimizeFSDP", "Watch")


def test_a_copy_has_no_trace(tmp_path):
    original = OptimizeFSDP(3, display=True)
    trainer = TinyTrainer(tiny_config(tmp_path, [original]))
    trainer.fit()

    copied = copy.deepcopy(original)

    assert (copied.prefetch, copied.display) == (3, True)
    assert copied.__getstate__() == OptimizeFSDP(3, display=True).__getstate__()


@pytest.mark.parametrize("prefetch", [0, -1, 1.5])
def test_an_invalid_depth_is_rejected(prefetch):
    with pytest.raises(ValueError, match="at least 1 is required"):
        OptimizeFSDP(prefetch)


# What the ranks do


class OtherWeights(Callback):
    """Doubles the weights and halves them again, as for a moving average; both are exact."""

    def _scale(self, factor: float) -> None:
        with torch.no_grad():
            for parameter in self.trainer.named_models()["model"].parameters():
                parameter.mul_(factor)


class LookAtOtherWeights(OtherWeights):
    """Runs only the first block between batches."""

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        model = self.trainer.named_models()["model"]
        self._scale(2.0)
        with torch.no_grad():
            model(torch.ones(1, 4))  # all of it, so that FSDP is as it was
            model.blocks[model.order[0]](torch.ones(1, WIDTH))
        self._scale(0.5)


class ValidateOtherWeights(OtherWeights):
    def pre_validation_epoch(self) -> None:
        self._scale(2.0)

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self._scale(0.5)


class Fail(Callback):
    def post_optimizer_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        raise ArithmeticError("on purpose")


def _sharded(root_dir: str, *callbacks: Callback, name: str = "ShardedTrainer") -> Any:
    layout = DeviceParameters.FSDP(device="cpu")
    return globals()[name](tiny_config(root_dir, callbacks, device=layout))


def _fit_twice(root_dir: str) -> tuple[Any, Any, int]:
    callback = OptimizeFSDP()
    trainer = _sharded(root_dir, callback)
    trainer.fit()
    first = [str(lists) for lists in callback._lists]  # noqa: SLF001
    trainer.training_parameters.n_epochs = 2
    trainer.fit()
    return first, [str(lists) for lists in callback._lists], trainer.global_step  # noqa: SLF001


def _fail_while_tracing(root_dir: str) -> tuple[bool, list[Any], int]:
    has_failed = False
    try:
        _sharded(root_dir, OptimizeFSDP(), Fail()).fit()
    except (ArithmeticError, RemoteError):  # the other rank's, where that was faster
        has_failed = True
    fsdp = logging.getLogger("torch.distributed.fsdp.fully_shard")
    return has_failed, fsdp.filters, fsdp.level


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _seen_by_handlers(root_dir: str) -> list[str]:
    records = _Records()
    logging.getLogger().addHandler(records)
    logging.getLogger().setLevel(logging.INFO)
    callback = OptimizeFSDP()
    _sharded(root_dir, callback).fit()
    assert callback._lists  # noqa: SLF001
    return [message for message in records.messages if "FSDP::" in message]


def _displayed(root_dir: str) -> str:
    errors, sys.stderr = sys.stderr, io.StringIO()
    try:
        _sharded(root_dir, OptimizeFSDP(display=True)).fit()
        return sys.stderr.getvalue()
    finally:
        sys.stderr = errors


def _disagree(root_dir: str) -> tuple[list[Any], list[str]]:
    if dist.is_initialized() or int(os.environ["RANK"]) == 1:
        ShardedTrainer.order = [2, 1, 0]
    records = _Records()
    logging.getLogger("dream_callbacks.fsdp").addHandler(records)
    callback = OptimizeFSDP()
    _sharded(root_dir, callback).fit()
    return callback._lists, records.messages  # noqa: SLF001
