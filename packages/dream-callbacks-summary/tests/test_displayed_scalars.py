from fractions import Fraction
from typing import Any

import pytest
import torch

from dream_callbacks.summary.displayed_scalars import (
    AsyncScalar,
    default_metric,
    read_scalars,
    readable_number,
)
from dream_trainer.testing import run_on_ranks


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"accuracy": 1.0, "loss": torch.tensor(2.0)}, "loss"),
        ({"accuracy": 1.0, "G_Loss": 2.0, "d_loss": 3.0}, "G_Loss"),
        ({"accuracy": 1.0, "norm": 2.0}, "accuracy"),
        ({"loss": torch.zeros(3), "norm": 2.0}, "norm"),
        ({"loss": "low", "logits": torch.zeros(3)}, None),
        ({}, None),
    ],
    ids=["loss", "first with loss in its name", "first", "not a vector", "none", "empty"],
)
def test_the_first_loss_is_the_default_metric(result: dict[str, Any], expected: str | None):
    assert default_metric(result) == expected


@pytest.mark.parametrize(
    "value",
    [
        1,
        2.5,
        Fraction(1, 4),
        torch.tensor(3.0),
        torch.ones(1, 1),
        torch.tensor(1.0, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_a_scalar_is_read(value: Any):
    scalar = AsyncScalar()
    scalar.read(value)

    assert scalar.value == float(value)


@pytest.mark.parametrize("value", [None, "1", torch.ones(2), torch.ones((), dtype=torch.cfloat)])
def test_a_non_scalar_keeps_the_last_value(value: Any):
    scalar = AsyncScalar()
    scalar.read(1.5)
    scalar.read(value)

    assert readable_number(value) is None
    assert scalar.value == 1.5


def test_scalars_of_an_epochs_result_are_read_as_numbers():
    result = {"loss": 0.5, "hits": 3, "accuracy": torch.tensor(0.25), "confusion": torch.ones(2, 2)}

    assert read_scalars(result) == {"loss": 0.5, "hits": 3, "accuracy": 0.25}


def read_distributed_tensors() -> list[float | None]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    local = torch.tensor(float(dist.get_rank()) + 1.0)
    values: list[float | None] = []
    if dist.get_rank() == 0:  # only rank 0, as in a RankZeroCallback: a collective would hang
        for placement in (Partial(), Replicate()):
            scalar = AsyncScalar()
            scalar.read(DTensor.from_local(local, mesh, (placement,), run_check=False))
            values.append(scalar.value)
    return values


def test_reading_a_dtensor_on_one_rank_runs_no_collective():
    values, _ = run_on_ranks(read_distributed_tensors, 2, timeout_s=30)

    assert values == [None, 1.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_scalar_is_read_later_without_a_device_sync():
    scalar, tensor = AsyncScalar(), torch.ones((), device="cuda") * 3
    torch.cuda.set_sync_debug_mode("error")
    try:
        scalar.read(tensor)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    before = scalar.value
    torch.cuda.synchronize()
    scalar.read(None)

    assert before is None
    assert scalar.value == 3.0
