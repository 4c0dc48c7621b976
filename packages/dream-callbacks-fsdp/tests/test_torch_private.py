"""Each private name of torch that OptimizeFSDP uses does what it needs, in the installed torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from dream_callbacks.fsdp import torch_private
from dream_trainer.testing import run_on_ranks


def sharded(mesh: Any, *, together: bool = False) -> nn.Module:
    """Two blocks and a head, each sharded by itself, or the blocks together."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    for part in ([model[0], model[1]],) if together else (model[0], model[1]):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


class Keeps(logging.Filter):
    """Keeps what records say, and which of some modules logs."""

    def __init__(self, candidates: list[FSDPModule]) -> None:
        super().__init__()
        self.candidates = candidates
        self.said: list[Any] = []

    def filter(self, record: logging.LogRecord) -> bool:
        logged = torch_private.logged_pass(record)
        if logged is not None:
            self.said.append((*logged, torch_private.logging_module(self.candidates)))
        return False


@contextmanager
def kept(candidates: list[Any]) -> Iterator[list[Any]]:
    logger, keeps = logging.getLogger(torch_private.FSDP_LOGGER), Keeps(candidates)
    logger.addFilter(keeps)
    logger.setLevel(logging.DEBUG)
    yield keeps.said
    logger.setLevel(logging.NOTSET)
    logger.removeFilter(keeps)


def begin() -> Any:
    dist.init_process_group("gloo")
    return init_device_mesh("cpu", (2,))


def what_is_logged(together: bool) -> list[Any]:
    model = sharded(begin(), together=together)
    with kept([model]) as said:
        model(torch.ones(1, 2)).sum().backward()
    return [(began, names) for began, names, _ in said]


def test_fsdp_logs_which_module_begins_forward_and_backward() -> None:
    forward = [("forward", [""]), ("forward", ["0"]), ("forward", ["1"])]
    backward = [("backward", [""]), ("backward", ["1"]), ("backward", ["0"])]

    assert run_on_ranks(what_is_logged, 2, False)[0] == forward + backward


def test_fsdp_logs_modules_that_are_sharded_together_as_one() -> None:
    said = run_on_ranks(what_is_logged, 2, True)[0]

    assert ("forward", ["0", "1"]) in said
    assert ("backward", ["0", "1"]) in said


def logging_roots() -> list[Any]:
    mesh = begin()
    first, second = sharded(mesh), sharded(mesh)
    with kept([first[0], second[0]]) as said:  # type: ignore[index]
        for model in (second, first):
            model(torch.ones(1, 2)).sum().backward()
    return [index for _, names, index in said if names == ["0"]]


def test_the_module_that_logs_is_found_on_the_stack() -> None:
    assert run_on_ranks(logging_roots, 2)[0] == [1, 1, 0, 0]


def test_backward_is_told_from_forward() -> None:
    seen = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: seen.append(torch_private.is_in_backward()))
    seen.append(torch_private.is_in_backward())
    y.sum().backward()

    assert seen == [False, True]


def test_wrapped_modules_are_held_in_attributes_of_these_names() -> None:
    module = nn.Linear(1, 1)
    wrappers = (torch.compile(module, backend="eager"), checkpoint_wrapper(module))
    names = [name for each in wrappers for name, _ in each.named_children()]

    assert tuple(names) == torch_private.WRAPPED_MODULE_NAMES


class Gathers:
    """A custom all-gather of FSDP that keeps whether it is to be asynchronous."""

    def __init__(self) -> None:
        self.is_asynchronous: list[bool] = []

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Any, input_tensor: Any, group: Any, async_op: bool = False
    ) -> Any:
        self.is_asynchronous.append(async_op)
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group, async_op)


def asynchronous_gathers() -> list[bool]:
    model: Any = fully_shard(nn.Linear(2, 1), mesh=begin())
    gathers = Gathers()
    model.set_custom_all_gather(gathers)
    model(torch.ones(1, 2))
    model.reshard()
    torch_private.unshard_asynchronously(model)
    model(torch.ones(1, 2))
    return gathers.is_asynchronous


def test_all_gathers_on_the_cpu_become_asynchronous() -> None:
    assert run_on_ranks(asynchronous_gathers, 2)[0] == [False, True]
