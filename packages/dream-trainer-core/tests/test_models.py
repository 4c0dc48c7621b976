"""Building models: tracking, meta device, layouts, and the errors of a wrong order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import RankError, TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.world import SimulatedWorld


def test_models_are_tracked_by_attribute(tmp_path: Path) -> None:
    class Two(TinyTrainer):
        def configure_models(self) -> None:
            self.encoder, self.decoder = nn.Linear(1, 2), nn.Linear(2, 1)
            self.not_a_model = 3
            self._hidden = nn.Linear(1, 1)

    trainer = Two(tiny_config(tmp_path))
    trainer.configure()

    assert trainer.named_models() == {"encoder": trainer.encoder, "decoder": trainer.decoder}


def test_configure_models_without_a_model_is_refused(tmp_path: Path) -> None:
    class Forgets(TinyTrainer):
        def configure_models(self) -> None:
            nn.Linear(1, 1)

    with pytest.raises(RuntimeError, match=r"assigned no nn\.Module to an attribute"):
        Forgets(tiny_config(tmp_path)).configure()


def test_init_weights_runs_on_one_device_too(tmp_path: Path) -> None:
    class Zeros(TinyTrainer):
        def init_weights(self) -> None:
            nn.init.zeros_(self.model.head.weight)

    trainer = Zeros(tiny_config(tmp_path))
    trainer.configure()
    assert not trainer.model.head.weight.is_meta
    trainer.setup()
    assert trainer.model.head.weight.count_nonzero() == 0


class Initializes(TinyTrainer):
    """Initializes by hand, so that it can be built on the meta device."""

    def init_weights(self) -> None:
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.2)


class Forgetful(Initializes):
    def init_weights(self) -> None:
        nn.init.normal_(self.model.embed.weight)


class WithBuffer(Initializes):
    """Computes a table in the constructor, and not in init_weights."""

    def configure_models(self) -> None:
        super().configure_models()
        self.model.register_buffer("table", torch.arange(4.0), persistent=False)


class WithParameterAndBuffer(TinyTrainer):
    """Built on the device, since it has no init_weights."""

    def configure_models(self) -> None:
        super().configure_models()
        self.model.register_buffer("table", torch.arange(4.0))


class AssignsBuffer(WithBuffer):
    """Assigns a new table in init_weights in place of filling the one that is there."""

    def init_weights(self) -> None:
        super().init_weights()
        self.model.table = torch.arange(4.0)


class OnMeta(TinyTrainer):
    def configure_models(self) -> None:
        with torch.device("meta"):
            super().configure_models()


def test_a_model_left_on_meta_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="model 'model' is on the meta device, and OnMeta has"):
        OnMeta(tiny_config(tmp_path)).setup()


def set_up(trainer_class: type[TinyTrainer], layout: str, root: str, **fields: Any) -> TinyTrainer:
    device = getattr(DeviceParameters, layout)(device="cpu", **fields)
    trainer = trainer_class(tiny_config(root, device=device, n_epochs=2, gradient_clip_val=0.5))
    trainer.setup()
    return trainer


def set_up_only(trainer_class: type[TinyTrainer], root: str) -> bool:
    trainer = trainer_class(tiny_config(root, device=DeviceParameters.FSDP(device="cpu")))
    trainer.configure()
    was_meta = all(parameter.is_meta for parameter in trainer.model.parameters())
    trainer.setup()
    return was_meta


def test_sharded_models_are_built_on_meta_only_if_they_can_be_initialized(tmp_path: Path) -> None:
    assert run_on_ranks(set_up_only, 2, Initializes, str(tmp_path)) == [True, True]
    assert run_on_ranks(set_up_only, 2, TinyTrainer, str(tmp_path)) == [False, False]


@pytest.mark.parametrize(
    ("trainer_class", "name"),
    [(Forgetful, "model.embed.bias"), (WithBuffer, "model.table")],
    ids=["parameter", "buffer"],
)
def test_what_init_weights_forgets_is_named(
    tmp_path: Path, trainer_class: type[TinyTrainer], name: str
) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(set_up_only, 2, trainer_class, str(tmp_path))

    assert name in caught.value.tracebacks[0]
    assert "init_weights set none" in caught.value.tracebacks[0]


def test_init_weights_may_assign_a_new_buffer(tmp_path: Path) -> None:
    assert run_on_ranks(set_up_only, 2, AssignsBuffer, str(tmp_path)) == [True, True]


class FillsBuffer(WithBuffer):
    def init_weights(self) -> None:
        super().init_weights()
        self.model.table.copy_(torch.arange(4.0))  # type: ignore[operator]


@pytest.mark.parametrize("trainer_class", [WithParameterAndBuffer, FillsBuffer, AssignsBuffer])
@pytest.mark.parametrize("cpu_offload", [False, True], ids=["on-device", "offloaded"])
def test_buffers_are_on_the_device_wherever_parameters_are(
    tmp_path: Path, trainer_class: type[TinyTrainer], cpu_offload: bool
) -> None:
    device = DeviceParameters.FSDP(cpu_offload=cpu_offload)
    with SimulatedWorld(rank=0, world_size=2) as world:
        trainer = trainer_class(tiny_config(tmp_path, device=device), world=world)
        trainer.configure()
        is_built_on_meta = trainer.model.table.is_meta
        world.device = torch.device("meta") if cpu_offload else world.device  # as if a GPU
        trainer.prepare_models()

        found = {parameter.device.type for parameter in trainer.model.parameters()}
        assert found == {"cpu"}
        assert trainer.model.table.device == world.device
        assert is_built_on_meta == (trainer_class is not WithParameterAndBuffer)


@pytest.mark.parametrize(
    ("num_threads", "ranks_here", "cpu_offload", "is_warned"),
    [(1, 2, True, True), (2, 2, True, False), (1, 8, True, False), (1, 2, False, False)],
)
def test_idle_cores_of_an_offloaded_optimizer_are_warned_of(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_threads: int,
    ranks_here: int,
    cpu_offload: bool,
    is_warned: bool,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks_here))
    device = DeviceParameters.FSDP(cpu_offload=cpu_offload)
    with SimulatedWorld(rank=0, world_size=2) as world:
        TinyTrainer(tiny_config(tmp_path, device=device), world=world).setup()

    assert ("4 cores per rank: set OMP_NUM_THREADS=4" in caplog.text) == is_warned


class Pretrained(nn.Linear):
    """Refuses device contexts as models of Hugging Face do."""

    @classmethod
    def from_pretrained(cls) -> Pretrained:
        if torch.device("meta") == torch.get_default_device():
            raise RuntimeError("you are using `from_pretrained` with a meta device context manager")
        if torch.device("cpu") != torch.get_default_device():
            raise ValueError("a `torch.device` context manager requires `accelerate`")
        return cls(2, 2)

    @classmethod
    def from_config(cls) -> Pretrained:
        raise RuntimeError("a bug, on the meta device")


class FineTunes(TinyTrainer):
    def configure_models(self) -> None:
        self.model = Pretrained.from_pretrained()  # type: ignore[assignment]


class FineTunesShards(FineTunes):
    def init_weights(self) -> None:
        """Makes sharded models be built on meta."""


class FineTunesFromCpu(FineTunes):
    def configure_models(self) -> None:
        with torch.device("cpu"):
            super().configure_models()


class FailsOnMeta(FineTunesShards):
    def configure_models(self) -> None:
        Pretrained.from_config()


def built_as_on_a_gpu(trainer_class: type[TinyTrainer], root: Path) -> TinyTrainer:
    """A trainer with models built inside `with torch.device("cuda", 1)`, or on meta."""
    device = DeviceParameters.FSDP(device="cpu")
    with SimulatedWorld(device, rank=0, world_size=2) as world:
        trainer = trainer_class(tiny_config(root, device=device), world=world)
        world.launch()
        world.device = torch.device("cuda", 1)
        trainer.build_models()
        return trainer


@pytest.mark.parametrize(
    ("trainer_class", "message"),
    [
        (FineTunes, r"on cuda:1, which needs accelerate there: .*with torch\.device\(\"cpu\"\):"),
        (FineTunesShards, "meta device.* from_config .*in init_weights: set_model_state_dict"),
        (FailsOnMeta, "^a bug, on the meta device$"),
    ],
)
def test_a_pretrained_model_that_cant_be_built_there_says_what_to_write(
    tmp_path: Path, trainer_class: type[TinyTrainer], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        built_as_on_a_gpu(trainer_class, tmp_path)


def test_a_pretrained_model_may_be_loaded_to_the_cpu(tmp_path: Path) -> None:
    trainer = built_as_on_a_gpu(FineTunesFromCpu, tmp_path)

    assert trainer.model.weight.device == torch.device("cpu")  # type: ignore[union-attr]


def trained(layout: str, trainer_class: type[TinyTrainer], root: str) -> dict[str, torch.Tensor]:
    trainer = set_up(trainer_class, layout, root)
    trainer.fit()
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach()
        for name, value in trainer.model.named_parameters()
    }


@pytest.mark.parametrize("trainer_class", [TinyTrainer, Initializes])
@pytest.mark.parametrize("layout", ["DDP", "FSDP"])
def test_two_ranks_end_with_the_weights_of_one(
    tmp_path: Path, layout: str, trainer_class: type[TinyTrainer]
) -> None:
    (alone,) = run_on_ranks(trained, 1, "SINGLE_DEVICE", trainer_class, str(tmp_path))
    for weights in run_on_ranks(trained, 2, layout, trainer_class, str(tmp_path)):
        assert weights.keys() == alone.keys()
        for name in alone:
            # float32 sums of two halves of a batch differ in the last bits.
            torch.testing.assert_close(weights[name], alone[name], rtol=1e-5, atol=1e-6)


def initial_shards(root: str) -> list[torch.Tensor]:
    trainer = set_up(Initializes, "FSDP", root)
    return [parameter.to_local().detach() for parameter in trainer.model.parameters()]  # type: ignore[operator]


def test_shards_of_different_ranks_differ(tmp_path: Path) -> None:
    first, second = run_on_ranks(initial_shards, 2, str(tmp_path))

    same = [a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    assert not any(same)


class Distills(TinyTrainer):
    """Has a second model that is not trained."""

    def configure_models(self) -> None:
        super().configure_models()
        self.teacher = nn.Linear(4, 1).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, _ = batch
        return super().training_step((x, self.teacher(x)), batch_idx)


def distilled(layout: str, root: str) -> int:
    trainer = set_up(Distills, layout, root)
    trainer.fit()
    return trainer.global_step


@pytest.mark.parametrize("layout", ["DDP", "FSDP"])
def test_a_model_without_gradients_may_stand_beside(tmp_path: Path, layout: str) -> None:
    assert run_on_ranks(distilled, 2, layout, str(tmp_path)) == [16, 16]


def accumulated(layout: str, accumulation: int, root: str) -> dict[str, torch.Tensor]:
    device = getattr(DeviceParameters, layout)(device="cpu")
    trainer = TinyTrainer(
        tiny_config(root, device=device, gradient_accumulation_steps=accumulation)
    )
    trainer.fit()
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach()
        for name, value in trainer.model.named_parameters()
    }


@pytest.mark.parametrize("layout", ["DDP", "FSDP"])
def test_accumulation_with_a_remainder_gives_the_weights_of_one_rank(
    tmp_path: Path, layout: str
) -> None:
    (alone,) = run_on_ranks(accumulated, 1, "SINGLE_DEVICE", 3, str(tmp_path))
    for weights in run_on_ranks(accumulated, 2, layout, 3, str(tmp_path)):
        for name in alone:
            torch.testing.assert_close(weights[name], alone[name], rtol=1e-5, atol=1e-6)


def test_param_dtype_means_autocast_on_one_device(tmp_path: Path) -> None:
    seen = []

    class Sees(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            seen.append(self.model(batch[0]).dtype)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            seen.append(self.model(batch[0]).dtype)
            return super().validation_step(batch, batch_idx)

    device = DeviceParameters(device="cpu", param_dtype=torch.bfloat16)
    Sees(tiny_config(tmp_path, device=device, max_steps=1, val_steps_per_epoch=1)).fit()

    assert seen == [torch.bfloat16, torch.bfloat16]


def test_activation_checkpointing_and_compile_change_no_result(tmp_path: Path) -> None:
    class Eager(TinyTrainer):
        def apply_compile(self) -> None:
            self.model.compile(backend="eager")

    def weights(**fields: Any) -> list[torch.Tensor]:
        device = DeviceParameters(device="cpu", **fields)
        trainer = Eager(tiny_config(tmp_path, device=device, max_steps=3))
        trainer.fit()
        return list(trainer.model.parameters())

    plain = weights()
    changed = weights(checkpoint_activations=True, compile_model=True)
    for expected, found in zip(plain, changed, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


class CountsRuns(TinyTrainer):
    """Counts how often a block is computed."""

    num_runs = 0

    def configure_models(self) -> None:
        super().configure_models()
        self.model.blocks[0].register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: Any) -> None:
        self.num_runs += 1


@pytest.mark.parametrize(("checkpoint_activations", "num_runs"), [(False, 1), (True, 2)])
def test_a_checkpointed_block_is_computed_again_in_backward(
    tmp_path: Path, checkpoint_activations: bool, num_runs: int
) -> None:
    device = DeviceParameters(device="cpu", checkpoint_activations=checkpoint_activations)
    trainer = CountsRuns(tiny_config(tmp_path, device=device, max_steps=1, val_steps_per_epoch=0))
    trainer.fit()

    assert trainer.num_runs == num_runs


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("compile_model", [False, True])
def test_models_are_compiled_if_asked(tmp_path: Path, compile_model: bool) -> None:
    device = DeviceParameters(device="cpu", compile_model=compile_model)
    trainer = TinyTrainer(tiny_config(tmp_path, device=device))
    trainer.setup()

    assert (trainer.model._compiled_call_impl is not None) is compile_model  # noqa: SLF001


class KeepsConfig(Initializes):
    def apply_fully_shard(self, config: dict[str, Any]) -> None:
        self.offload_policy = config.get("offload_policy")
        super().apply_fully_shard(config)


def sharded(root: str, cpu_offload: bool) -> tuple[list[str], str]:
    from torch.distributed.fsdp import FSDPModule

    trainer = set_up(KeepsConfig, "FSDP", root, cpu_offload=cpu_offload)
    parts = [name for name, part in trainer.model.named_modules() if isinstance(part, FSDPModule)]
    return parts, type(trainer.offload_policy).__name__  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("cpu_offload", "policy"), [(False, "NoneType"), (True, "CPUOffloadPolicy")]
)
def test_each_block_is_sharded_and_then_the_rest(
    tmp_path: Path, cpu_offload: bool, policy: str
) -> None:
    parts = ["", "blocks.0", "blocks.1"]

    assert run_on_ranks(sharded, 2, str(tmp_path), cpu_offload) == [(parts, policy)] * 2
