"""DeviceParameters: presets, degrees, and invalid combinations."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dream_trainer.configs import DeviceParameters, MeshShape
from dream_trainer.configs.device import AXES
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config

DEGREES = ("dp_replicate", "dp_shard", "tensor_parallel", "context_parallel", "pipeline_parallel")


def sizes(parameters: DeviceParameters, world_size: int) -> dict[str, int]:
    shape = parameters.mesh_shape(world_size)
    return {axis: getattr(shape, axis) for axis in AXES if getattr(shape, axis) > 1}


# Presets


@pytest.mark.parametrize(
    ("parameters", "world_size", "expected", "layout"),
    [
        (DeviceParameters(), 1, {}, "single"),
        (DeviceParameters(), 4, {"dp_replicate": 4}, "ddp"),
        (DeviceParameters.SINGLE_DEVICE(), 1, {}, "single"),
        (DeviceParameters.DDP(), 1, {}, "single"),
        (DeviceParameters.DDP(), 8, {"dp_replicate": 8}, "ddp"),
        (DeviceParameters.FSDP(), 1, {}, "single"),
        (DeviceParameters.FSDP(), 8, {"dp_shard": 8}, "fsdp"),
        (DeviceParameters.HSDP(dp_shard=4), 8, {"dp_replicate": 2, "dp_shard": 4}, "hsdp"),
        (DeviceParameters.HSDP(dp_shard=4), 4, {"dp_shard": 4}, "fsdp"),
        (DeviceParameters.FSDP(tensor_parallel=2), 8, {"dp_shard": 4, "tp": 2}, "fsdp+tp"),
        (DeviceParameters.DDP(tensor_parallel=2), 2, {"tp": 2}, "tp"),
        (
            DeviceParameters.FSDP(dp_shard=2, tensor_parallel="auto"),
            8,
            {"dp_shard": 2, "tp": 4},
            "fsdp+tp",
        ),
        (
            DeviceParameters.FSDP(context_parallel=2, pipeline_parallel=2),
            8,
            {"pp": 2, "dp_shard": 2, "cp": 2},
            "fsdp+cp+pp",
        ),
    ],
)
def test_presets_divide_the_ranks(
    parameters: DeviceParameters, world_size: int, expected: dict[str, int], layout: str
) -> None:
    assert sizes(parameters, world_size) == expected
    assert parameters.mesh_shape(world_size).layout == layout
    assert parameters.mesh_shape(world_size).world_size == world_size


@pytest.mark.parametrize("preset", ["SINGLE_DEVICE", "DDP", "FSDP"])
def test_presets_take_the_other_fields(preset: str) -> None:
    parameters = getattr(DeviceParameters, preset)(
        param_dtype=torch.bfloat16, compile_model=True, train_timeout_s=5.0, device="cpu"
    )

    assert parameters.param_dtype is torch.bfloat16
    assert parameters.compile_model
    assert parameters.train_timeout_s == 5.0
    assert DeviceParameters().compile_model is False


def test_a_subclass_keeps_its_presets() -> None:
    class Mine(DeviceParameters): ...

    assert type(Mine.FSDP()) is Mine


# The shape of the mesh


def test_data_parallel_ranks_are_those_that_read_different_data() -> None:
    shape = DeviceParameters.HSDP(dp_shard=2, tensor_parallel=2).mesh_shape(8)

    assert shape == MeshShape(dp_replicate=2, dp_shard=2, tp=2)
    assert shape.dp_size == 4
    assert shape.sizes == (1, 2, 2, 1, 2)


@pytest.mark.parametrize("degree", DEGREES)
def test_any_one_degree_may_be_auto(degree: str) -> None:
    parameters = DeviceParameters(**{**dict.fromkeys(DEGREES, 1), degree: "auto"})  # type: ignore[arg-type]

    assert parameters.mesh_shape(6).world_size == 6
    assert 6 in parameters.mesh_shape(6).sizes


def test_indivisible_ranks_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="can't be divided") as caught:
        DeviceParameters.FSDP(tensor_parallel=3).mesh_shape(8)

    assert str(caught.value) == (
        "8 ranks can't be divided by 3 (tensor_parallel=3), so there is no value for "
        'dp_shard="auto"; start a multiple of 3 ranks or change the degrees'
    )


def test_degrees_with_another_product_are_refused_with_the_command() -> None:
    with pytest.raises(ValueError, match=r"multiply to 1 .*, but 4 ranks were started; start 1 ra"):
        DeviceParameters.SINGLE_DEVICE().mesh_shape(4)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node=6") as caught:
        DeviceParameters(dp_replicate=2, dp_shard=3).mesh_shape(4)
    assert "multiply to 6" in str(caught.value)


# Invalid values


@pytest.mark.parametrize("name", DEGREES)
@pytest.mark.parametrize("value", [0, -1, 1.5, "all", None, True])
def test_a_degree_is_a_count_or_auto(name: str, value: Any) -> None:
    expected = f'^{name}={value!r}: a whole number of at least 1 or "auto" is required$'
    with pytest.raises(ValueError, match=expected):
        DeviceParameters(**{name: value})


def test_two_autos_are_refused() -> None:
    with pytest.raises(
        ValueError, match='dp_replicate and dp_shard are both "auto"; give a number'
    ):
        DeviceParameters(dp_shard="auto")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match='device=\'tpu\': "auto", "cpu", "cuda", "xpu" or "mps"'):
        DeviceParameters(device="tpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["param_dtype", "reduce_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", torch.int8], ids=str)
def test_dtypes_are_floating_point(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value!r}: a floating point dtype is required"):
        DeviceParameters(**{name: value})


@pytest.mark.parametrize("name", ["init_timeout_s", "train_timeout_s", "cleanup_timeout_s"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_timeouts_are_above_zero(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name}={value!r}: seconds above 0 are required"):
        DeviceParameters(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parameters", "num_devices", "num_ranks"),
    [
        (DeviceParameters(), 8, 8),
        (DeviceParameters.FSDP(tensor_parallel=2), 8, 8),
        (DeviceParameters(tensor_parallel=3), 8, 8),  # refused by mesh_shape, with the numbers
        (DeviceParameters(dp_replicate=2, dp_shard=2), 8, 4),
        (DeviceParameters(dp_replicate=16), 8, 1),
        (DeviceParameters.SINGLE_DEVICE(), 8, 1),
        (DeviceParameters(device="cpu"), 8, 1),
        (DeviceParameters(device="cuda"), 1, 1),
        (DeviceParameters(), 0, 1),
    ],
)
def test_entrypoint_starts_as_many_ranks_as_the_layout_wants(
    parameters: DeviceParameters, num_devices: int, num_ranks: int
) -> None:
    assert parameters.num_ranks_to_start(num_devices) == num_ranks


def test_only_gradients_that_will_be_sharded_may_be_reduced_every_batch() -> None:
    message = r"reduce_every_batch=True with dp_shard=1.*FSDP\(reduce_every_batch=True\)"
    with pytest.raises(ValueError, match=message):
        DeviceParameters.DDP(reduce_every_batch=True)

    assert DeviceParameters.FSDP(reduce_every_batch=True).reduce_every_batch


def test_only_sharded_parameters_can_be_offloaded() -> None:
    with pytest.raises(ValueError, match=r"cpu_offload=True with dp_shard=1.*FSDP\(cpu_offload=Tr"):
        DeviceParameters.DDP(cpu_offload=True)

    assert DeviceParameters.FSDP(cpu_offload=True).cpu_offload
    assert DeviceParameters.DDP(context_parallel=2, cpu_offload=True).cpu_offload


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_refused_by_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r'no CUDA device: 0 are visible.*device="cpu"'):
        TinyTrainer(tiny_config(tmp_path, device=DeviceParameters(device="cuda")))


def refusal(root: str) -> str:
    import torch.distributed

    device = DeviceParameters.SINGLE_DEVICE(device="cpu")
    try:
        TinyTrainer(tiny_config(root, device=device))
    except ValueError as error:
        return f"{error} {torch.distributed.is_initialized()}"
    return "accepted"


def test_a_layout_that_does_not_fit_is_refused_before_launch(tmp_path: Path) -> None:
    for text in run_on_ranks(refusal, 2, str(tmp_path)):
        assert "2 ranks were started" in text
        assert text.endswith("False")


def test_parameters_are_values() -> None:
    parameters = DeviceParameters.FSDP(param_dtype=torch.bfloat16)

    assert copy.deepcopy(parameters) == parameters == pickle.loads(pickle.dumps(parameters))
    with pytest.raises(TypeError):
        DeviceParameters("cpu")  # type: ignore[misc]
