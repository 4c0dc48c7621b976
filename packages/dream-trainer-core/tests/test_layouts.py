"""Every layout with every option has the weights and gradient norms of one process."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from reductions import Reductions
from torch import Tensor, nn

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import RankError, TinyTrainer, run_on_ranks, tiny_config

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

LAYOUTS: dict[str, tuple[int, Callable[..., DeviceParameters]]] = {
    "single": (1, DeviceParameters),
    "ddp": (2, DeviceParameters.DDP),
    "fsdp": (2, DeviceParameters.FSDP),
    "hsdp": (4, partial(DeviceParameters.HSDP, dp_shard=2)),
    "tp": (2, partial(DeviceParameters, tensor_parallel=2)),
    "ddp+tp": (4, partial(DeviceParameters, tensor_parallel=2)),
    "fsdp+tp": (4, partial(DeviceParameters.FSDP, tensor_parallel=2)),
}
LAYOUTS_OF_SEVERAL = tuple(LAYOUTS)[1:]


class Divisible(TinyTrainer):
    """All matrices can be sharded except the head's, so gradients are on several meshes."""

    norms: list[Tensor]

    def configure_models(self) -> None:
        super().configure_models()
        self.model.register_buffer("bias", torch.ones(1))
        self.norms = []

    def apply_tensor_parallel(self, mesh: DeviceMesh) -> None:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        columns = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(self.model, mesh, {"embed": columns, "blocks.*": columns})

    def step(self, optimizer: torch.optim.Optimizer, closure: Any = None) -> Tensor | None:
        norm = super().step(optimizer, closure)
        if norm is not None:
            self.norms.append(norm)
        return norm


class OnMeta(Divisible):
    """Initializes everything in init_weights, so that it is built on the meta device if sharded."""

    def init_weights(self) -> None:
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.2)
        self.model.bias.fill_(1)  # type: ignore[operator]  # a buffer


class Compiled(Divisible):
    def apply_compile(self) -> None:
        self.model.compile(backend="eager")


class OwnHooks(Divisible):
    """A user's own mixed-precision policy."""

    def apply_activation_checkpointing(self) -> None:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        self.model.blocks[0] = checkpoint_wrapper(self.model.blocks[0])

    def apply_compile(self) -> None:
        for block in self.model.blocks:
            block.compile(backend="eager")

    def apply_fully_shard(self, config: dict[str, Any]) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.model, **config, reshard_after_forward=False)

    def apply_replicate(self, mesh: DeviceMesh) -> None:
        self.model = nn.parallel.DistributedDataParallel(self.model, device_mesh=mesh)  # type: ignore[assignment]


BF16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}

OPTIONS: dict[str, tuple[type[Divisible], dict[str, Any], dict[str, Any]]] = {
    "plain": (Divisible, {}, {}),
    "meta": (OnMeta, {}, {}),
    "checkpointing": (Divisible, {"checkpoint_activations": True}, {}),
    "compile": (Compiled, {"compile_model": True}, {}),
    "bf16": (Divisible, BF16, {}),
    "accumulation": (Divisible, {}, {"gradient_accumulation_steps": 3}),
    "clipping": (Divisible, {}, {"gradient_clip_val": 0.05}),
    "own_hooks": (OwnHooks, {"checkpoint_activations": True, "compile_model": True}, {}),
    "everything": (
        OnMeta,
        {**BF16, "checkpoint_activations": True},
        {"gradient_accumulation_steps": 3, "gradient_clip_val": 0.05},
    ),
}


def whole(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained(
    trainer_class: type[Divisible],
    make: Callable[..., DeviceParameters],
    fields: dict[str, Any],
    training: dict[str, Any],
) -> tuple[dict[str, Tensor], list[float]]:
    """Final weights by name, and the gradient norm of each step."""
    device = make(device="cpu", **fields)
    training = {"gradient_clip_val": float("inf"), **training}  # measures
    with tempfile.TemporaryDirectory() as root:
        config = tiny_config(root, device=device, val_steps_per_epoch=0, **training)
        config.num_samples = 16
        trainer = trainer_class(config)
        trainer.fit()
    weights = trainer.model_state_dict()["model"]
    return {name: whole(value) for name, value in weights.items()}, torch.stack(
        [whole(norm) for norm in trainer.norms]
    ).tolist()


# Four ranks take longest: the rest of their cells has the marker `full`.
QUICK_ON_FOUR = ("plain", "clipping", "everything")
CASES = [
    pytest.param(
        layout,
        option,
        marks=[pytest.mark.full] if LAYOUTS[layout][0] == 4 and option not in QUICK_ON_FOUR else [],
    )
    for layout in LAYOUTS_OF_SEVERAL
    for option in OPTIONS
]


def trained_with(layout: str, options: tuple[str, ...]) -> dict[str, Any]:
    _, make = LAYOUTS[layout]
    return {name: trained(OPTIONS[name][0], make, *OPTIONS[name][1:]) for name in options}


@functools.cache
def outcomes_of(layout: str, options: tuple[str, ...]) -> list[dict[str, Any]]:
    return run_on_ranks(trained_with, LAYOUTS[layout][0], layout, options)


@pytest.mark.parametrize(("layout", "option"), CASES)
def test_weights_and_gradient_norms_equal_those_of_one_process(layout: str, option: str) -> None:
    (alone,) = outcomes_of("single", tuple(OPTIONS))
    together = (
        QUICK_ON_FOUR
        if option in QUICK_ON_FOUR
        else tuple(o for o in OPTIONS if o not in QUICK_ON_FOUR)
    )
    outcomes = [each[option] for each in outcomes_of(layout, together)]

    is_bf16 = option in ("bf16", "everything")
    # float32: sums in another order. bfloat16 has 8 bits, and FSDP casts more than autocast does.
    compare(outcomes, alone[option], *((3e-2, 0.2) if is_bf16 else (1e-5, 1e-5)))


def test_offloaded_parameters_train_like_those_of_one_process() -> None:
    training = {"gradient_clip_val": 0.05}
    offloaded = trained, 2, OnMeta, DeviceParameters.FSDP, {"cpu_offload": True}, training
    (alone,) = run_on_ranks(trained, 1, OnMeta, DeviceParameters, {}, training)

    compare(run_on_ranks(*offloaded), alone, 1e-5, 1e-5)


def accumulated(
    make: Callable[..., DeviceParameters], reduce_every_batch: bool
) -> tuple[tuple[dict[str, Tensor], list[float]], bool]:
    """Weights and norms; whether sharded gradients are there while they accumulate."""
    found: set[bool] = set()

    class Accumulates(Divisible):
        def backward(self, loss: Tensor, **options: Any) -> None:
            super().backward(loss, **options)
            if self.is_accumulating_gradients:
                found.update(p.grad is not None for p in self.model.parameters())

    training = {"gradient_accumulation_steps": 3, "gradient_clip_val": 0.05}
    fields = {"reduce_every_batch": True} if reduce_every_batch else {}
    outcome = trained(Accumulates, make, fields, training)
    (are_there,) = found
    return outcome, are_there


@pytest.mark.parametrize("reduce_every_batch", [True, False])
def test_gradients_may_be_reduced_with_every_batch(reduce_every_batch: bool) -> None:
    ((alone, _),) = run_on_ranks(accumulated, 1, DeviceParameters, False)
    results = run_on_ranks(accumulated, 2, DeviceParameters.FSDP, reduce_every_batch)

    compare([outcome for outcome, _ in results], alone, 1e-5, 1e-5)
    assert [are_there for _, are_there in results] == [reduce_every_batch] * 2


def test_replicas_of_shards_are_reduced_once_in_a_step() -> None:
    ((alone, _),) = run_on_ranks(accumulated, 1, DeviceParameters, False)
    _, make = LAYOUTS["hsdp"]
    results = run_on_ranks(accumulated, 4, make, True)

    compare([outcome for outcome, _ in results], alone, 1e-5, 1e-5)
    # The sums over shards are no gradients of parameters before the all-reduce over replicas.
    assert [are_there for _, are_there in results] == [False] * 4


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_offloaded_parameters_stay_in_host_memory() -> None:
    assert run_on_ranks(devices_when_offloaded, 2) == [{"cpu"}] * 2


def devices_when_offloaded() -> set[str]:
    device = DeviceParameters.FSDP(device="cuda", cpu_offload=True)
    with tempfile.TemporaryDirectory() as root:
        trainer = OnMeta(tiny_config(root, device=device, gradient_clip_val=0.05, max_steps=2))
        trainer.fit()
        return {parameter.device.type for parameter in trainer.model.parameters()}


def compare(outcomes: list[Any], alone: Any, tolerance: float, norm_tolerance: float) -> None:
    weights, norms = alone
    for found_weights, found_norms in outcomes:
        assert found_norms == pytest.approx(norms, rel=norm_tolerance)
        assert found_weights.keys() == weights.keys()
        for name, expected in weights.items():
            torch.testing.assert_close(
                found_weights[name], expected, rtol=tolerance, atol=tolerance
            )


# Collectives


class Watched(Divisible):
    def configure_models(self) -> None:
        super().configure_models()
        self.reductions: list[list[torch.dtype]] = []
        self.model.blocks[0].register_forward_hook(self._see)

    def backward(self, loss: Tensor, **options: Any) -> None:
        with Reductions() as seen:
            super().backward(loss, **options)
        self.reductions.append(seen.dtypes)

    def _see(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.computed_in = output.dtype


def watched(layout: str, fields: dict[str, Any]) -> tuple[list[list[torch.dtype]], torch.dtype]:
    """Dtypes of each batch's gradient reductions; dtype of a block's output."""
    device = LAYOUTS[layout][1](device="cpu", **fields)
    with tempfile.TemporaryDirectory() as root:
        config = tiny_config(root, device=device, max_steps=2, gradient_accumulation_steps=2)
        trainer = Watched(config)
        trainer.fit()
    return trainer.reductions, trainer.computed_in


@pytest.mark.parametrize("layout", [name for name in LAYOUTS_OF_SEVERAL if name != "tp"])
def test_gradients_are_reduced_with_the_last_batch_of_a_step_only(layout: str) -> None:
    for reductions, _ in run_on_ranks(watched, LAYOUTS[layout][0], layout, {}):
        first, second, third, fourth = reductions
        assert first == third == []
        assert len(second) == len(fourth) > 0


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=[pytest.mark.full] if num_ranks == 4 else [])
        for name, (num_ranks, _) in LAYOUTS.items()
    ],
)
def test_bf16_computes_in_bf16_and_reduces_in_float32(layout: str) -> None:
    for reductions, computed_in in run_on_ranks(watched, LAYOUTS[layout][0], layout, BF16):
        assert computed_in is torch.bfloat16
        assert set(reductions[1]) <= {torch.float32}


def test_without_a_reduce_dtype_fsdp_reduces_gradients_as_they_are_computed() -> None:
    fields = {"param_dtype": torch.bfloat16}
    for reductions, _ in run_on_ranks(watched, 2, "fsdp", fields):
        assert set(reductions[1]) == {torch.bfloat16}


# Order


class InOrder(OnMeta):
    calls: list[str]

    def apply_tensor_parallel(self, mesh: DeviceMesh) -> None:
        self.calls = [f"tensor parallel over {mesh.mesh_dim_names}"]
        super().apply_tensor_parallel(mesh)

    def apply_activation_checkpointing(self) -> None:
        self.calls.append("checkpointing")
        super().apply_activation_checkpointing()

    def apply_compile(self) -> None:
        self.calls.append("compile")
        self.model.compile(backend="eager")

    def apply_fully_shard(self, config: dict[str, Any]) -> None:
        assert all(parameter.is_meta for parameter in self.model.parameters())
        self.calls.append(f"shard over {config['mesh'].mesh_dim_names}")
        super().apply_fully_shard(config)

    def init_weights(self) -> None:
        assert not any(parameter.is_meta for parameter in self.model.parameters())
        self.calls.append("init")
        super().init_weights()


def calls_in_order() -> list[str]:
    device = DeviceParameters.FSDP(
        device="cpu", tensor_parallel=2, compile_model=True, checkpoint_activations=True
    )
    with tempfile.TemporaryDirectory() as root:
        trainer = InOrder(tiny_config(root, device=device, max_steps=2))
        trainer.fit()
    return trainer.calls


def test_models_are_prepared_in_the_documented_order() -> None:
    assert run_on_ranks(calls_in_order, 4)[0] == [
        "tensor parallel over ('tp',)",
        "checkpointing",
        "compile",
        "shard over ('dp_shard',)",
        "init",
    ]


@pytest.mark.full
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_the_default_compiler_trains_to_the_same_weights(layout: str) -> None:
    compiled = run_on_ranks(trained, 2, Divisible, LAYOUTS[layout][1], {"compile_model": True}, {})
    eager = run_on_ranks(trained, 2, Divisible, LAYOUTS[layout][1], {}, {})

    for name, expected in eager[0][0].items():
        torch.testing.assert_close(compiled[0][0][name], expected, rtol=1e-4, atol=1e-5)


class Drops(Divisible):
    """Draws random numbers as dropout does on a tensor sharded over tensor-parallel ranks."""

    def drawn(self) -> Tensor:
        weight: Any = self.model.blocks[0].weight
        return whole(torch.rand_like(weight)).cpu()


def drawn_by_place() -> tuple[tuple[int, int], Tensor]:
    device = DeviceParameters(device="cuda", tensor_parallel=2)
    with tempfile.TemporaryDirectory() as root:
        trainer = Drops(tiny_config(root, device=device))
        trainer.setup()
        return (trainer.world.dp_rank, trainer.world.tp_rank), trainer.drawn()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four GPUs")
def test_random_operations_on_sharded_tensors_differ_between_data_ranks() -> None:
    drawn = dict(run_on_ranks(drawn_by_place, 4))

    assert drawn[0, 0].equal(drawn[0, 1])
    assert drawn[1, 0].equal(drawn[1, 1])
    assert not drawn[0, 0].equal(drawn[1, 0])


# Layouts without a default


class Indivisible(TinyTrainer):
    pass


def set_up(**degrees: int) -> None:
    device = DeviceParameters(device="cpu", dp_replicate=1, **degrees)
    Indivisible(tiny_config("runs", device=device)).setup()


@pytest.mark.parametrize(
    ("degree", "message"),
    [
        ("tensor_parallel", r"no apply_tensor_parallel\(mesh\); write one"),
        ("context_parallel", r"no apply_context_parallel\(mesh\); write one"),
        ("pipeline_parallel", "schedules run forward and backward themselves.*set pipeline_par"),
    ],
)
def test_layouts_without_a_default_name_the_method_to_write(degree: str, message: str) -> None:
    with pytest.raises(RankError, match=message) as caught:
        run_on_ranks(partial(set_up, **{degree: 2}), 2)

    assert len(caught.value.tracebacks) == 2
