"""Each private name of torch that core uses works as needed in the installed torch."""

from __future__ import annotations

import ast
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import dream_trainer
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import run_on_ranks
from dream_trainer.world import World, torch_private


def private_names_of_torch(source: str) -> list[str]:
    """Names with an underscore that a module imports from torch, or reads from a torch module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            names = [name] if name.split(".")[0] in ("torch", "dist", "DeviceMesh") else []
        else:
            continue
        found += [name for name in names if re.fullmatch(r"[\w.]+\._[^_]\w*", name)]
    return found


def test_no_other_module_uses_a_private_name_of_torch() -> None:
    root = Path(dream_trainer.__file__).parent
    found = {
        path.name: names
        for path in root.rglob("*.py")
        if (names := private_names_of_torch(path.read_text()))
    }

    assert list(found) == ["torch_private.py"]


def connect() -> World:
    world = World(DeviceParameters(device="cpu"))
    world.launch()
    return world


def meshes() -> tuple[Any, Any]:
    connect()
    mesh = init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=("a", "b", "c"))
    flat = torch_private.flattened_mesh(mesh["b", "c"], "bc")
    both = torch_private.concatenated_mesh([mesh["a"], flat])
    return (flat.shape, flat.mesh_dim_names), (both.shape, both.mesh_dim_names)


def test_meshes_are_flattened_and_concatenated() -> None:
    expected = ((2,), ("bc",)), ((1, 2), ("a", "bc"))

    assert run_on_ranks(meshes, 2) == [expected] * 2


def reduced_gradients() -> tuple[list[int], list[int], int, list[float]]:
    """Missing gradients after a backward that reaches one parameter, and after the rest."""
    connect()
    parameters = nn.ParameterList([torch.ones(1), torch.ones(1)])
    ddp = nn.parallel.DistributedDataParallel(parameters, gradient_as_bucket_view=True)
    torch_private.begin_reduction(ddp)
    (parameters[0] * dist.get_rank()).sum().backward()
    before = torch_private.missing_gradients(ddp)
    parameters[1].sum().backward()
    after = torch_private.missing_gradients(ddp)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    num_storages = len({gradient.untyped_storage().data_ptr() for gradient in gradients})
    torch_private.end_reductions(ddp)
    return before, after, num_storages, [gradient.item() for gradient in gradients]


def test_ddp_reduces_gradients_without_a_forward_and_knows_which_are_missing() -> None:
    assert run_on_ranks(reduced_gradients, 2) == [([1], [], 1, [0.5, 1.0])] * 2


def states_of_fsdp() -> list[bool]:
    from torch.distributed.fsdp import fully_shard

    connect()
    model = fully_shard(nn.Linear(2, 2))
    seen = [torch_private.is_in_fsdp_forward(model)]
    model.register_forward_hook(
        lambda *_: seen.append(torch_private.is_in_fsdp_forward(model)), prepend=True
    )
    model(torch.ones(1, 2))
    return [*seen, torch_private.is_in_fsdp_forward(model)]


def test_fsdp_tells_whether_it_is_in_a_forward() -> None:
    assert run_on_ranks(states_of_fsdp, 2) == [[False, True, False]] * 2


def unreduced_gradients() -> tuple[list[bool], list[str]]:
    """Whether FSDP holds gradients, before and after they are dropped; names of parameters."""
    from torch.distributed.fsdp import fully_shard

    World(DeviceParameters(device="cpu")).launch()
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(1, 2))
    fully_shard(model, mesh=mesh)
    model.set_requires_gradient_sync(False)  # type: ignore[operator]  # of FSDP
    model(torch.ones(1, 1)).sum().backward()
    found = [bool(torch_private.unreduced_parameters(model))]
    torch_private.drop_unsharded_gradients(model)
    found.append(bool(torch_private.unreduced_parameters(model)))
    torch_private.reshard(model)
    wrapped = torch.compile(nn.Sequential(nn.Linear(1, 1)), backend="eager")
    return found, [n for n, _ in torch_private.named_parameters(wrapped)]  # type: ignore[arg-type]  # a module


def test_what_parallel_modules_hold_is_found() -> None:
    for found in run_on_ranks(unreduced_gradients, 2):
        assert found == ([True, False], ["0.weight", "0.bias"])


def test_tensors_are_changed_in_one_operation() -> None:
    tensors, overflow = [torch.tensor([2.0, -3.0])], torch.zeros(())
    torch_private.multiply(tensors, torch.tensor(2.0))
    torch_private.clamp(tensors, 5.0)
    torch_private.unscale(tensors, overflow, torch.tensor(0.5))

    assert tensors[0].tolist() == [2.0, -2.5]
    assert not overflow
    tensors[0][0] = float("inf")
    torch_private.unscale(tensors, overflow, torch.tensor(0.5))
    scale, tracker = torch.tensor(8.0), torch.zeros((), dtype=torch.int32)
    torch_private.update_scale(scale, tracker, overflow, 2.0, 0.5, 2000)
    assert (overflow.item(), scale.item()) == (1.0, 4.0)


def test_checkpoint_activations_recomputes_forward_and_keeps_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    names = [name for name, _ in model.named_parameters()]
    num_forwards = 0

    def count(*args: Any) -> None:
        nonlocal num_forwards
        num_forwards += 1

    model[0].register_forward_hook(count)
    torch_private.checkpoint_activations(model)
    model(torch.ones(1, 2)).sum().backward()

    assert num_forwards == 2
    assert [name for name, _ in model.named_parameters()] == names


def seed_on_cpu_mesh() -> None:
    connect()
    with pytest.warns(UserWarning, match=r"manual_seed\(\) may not have complete support on cpu"):
        torch_private.seed_sharded_random(1, init_device_mesh("cpu", (2,)))


def test_sharded_random_is_seeded_only_on_cuda() -> None:
    run_on_ranks(seed_on_cpu_mesh, 2)


def test_functions_and_methods_that_torch_compiled_are_known() -> None:
    class Methods:
        def plain(self) -> None: ...

        @torch.compile(backend="eager")
        def compiled(self) -> None: ...

    methods = Methods()

    assert torch_private.is_compiled(methods.compiled)
    assert torch_private.is_compiled(torch.compile(methods.plain, backend="eager"))
    assert not torch_private.is_compiled(methods.plain)


def generations_of_cudagraphs() -> tuple[bool, bool]:
    torch_private.mark_cudagraph_step()
    is_loaded = "torch._inductor.cudagraph_trees" in sys.modules
    from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

    before = CUDAGraphTreeManager.get_curr_generation()
    torch_private.mark_cudagraph_step()
    return is_loaded, CUDAGraphTreeManager.get_curr_generation() != before


def test_marking_a_step_begins_a_generation_of_cudagraphs_and_loads_no_compiler() -> None:
    assert run_on_ranks(generations_of_cudagraphs, 1) == [(False, True)]


def test_an_optimizer_knows_that_a_scheduler_was_made_of_it() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    assert not torch_private.has_scheduler(optimizer)

    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert torch_private.has_scheduler(optimizer)


def test_nccl_has_no_backends_in_a_run_on_the_cpu() -> None:
    assert run_on_ranks(nccl_backends_on_cpu, 2) == [[]] * 2


def nccl_backends_on_cpu() -> list[tuple[str, Any]]:
    connect()
    return torch_private.nccl_backends()


def found_on_one_rank_of_nccl() -> tuple[list[str], str]:
    world = World(DeviceParameters(device="cuda"))
    torch.cuda.set_device(world.device)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    dist.new_group(backend="gloo")
    dist.all_reduce(torch.ones(1, device=world.device))
    backends = torch_private.nccl_backends()
    return [group for group, _ in backends], torch_private.nccl_error(backends[0][1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nccl_backends_are_found_with_what_their_watchdog_says() -> None:
    assert run_on_ranks(found_on_one_rank_of_nccl, 1) == [(["default_pg"], "SUCCESS")]


def shard_of_simulated_rank(rank: int) -> tuple[int, float]:
    torch_private.init_fake_process_group(rank, 4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        local = torch.arange(8.0)
        sharded = distribute_tensor(local, mesh, [Shard(0)], src_data_rank=None)
        whole = DTensor.from_local(local, mesh, [Replicate()], run_check=False)
        again = whole.redistribute(mesh, [Shard(0)]).to_local()
        assert again.equal(sharded.to_local())
        return dist.get_world_size(), again[0].item()
    finally:
        dist.destroy_process_group()
        torch_private.clear_sharding_caches()


def shards_of_simulated_ranks() -> list[tuple[int, float]]:
    return [shard_of_simulated_rank(rank) for rank in range(4)]


def test_simulated_ranks_in_turn_each_get_their_own_shard() -> None:
    (shards,) = run_on_ranks(shards_of_simulated_ranks, 1)

    assert shards == [(4, 0.0), (4, 2.0), (4, 4.0), (4, 6.0)]


def test_running_persistent_workers_are_detected() -> None:
    loader = torch.utils.data.DataLoader([1, 2], num_workers=1, persistent_workers=True)
    assert not torch_private.has_running_workers(loader)
    list(loader)

    assert torch_private.has_running_workers(loader)
    assert not torch_private.has_running_workers([1, 2])


WAYS_TO_MAKE_A_GROUP = {
    "new_group": lambda: dist.new_group([0, 1], backend="gloo"),
    "new_group, hashed": lambda: dist.new_group([0, 1], use_local_synchronization=True),
    "init_device_mesh": lambda: init_device_mesh("cpu", (2, 1)),
}


def test_a_module_keeps_its_hooks_in_these_attributes() -> None:
    module = nn.Linear(1, 1)
    module.register_forward_hook(lambda *args: None)
    module.register_forward_pre_hook(lambda *args: None)
    module.register_full_backward_hook(lambda *args: None)
    module.register_full_backward_pre_hook(lambda *args: None)
    module.register_state_dict_post_hook(lambda *args: None)
    module.register_load_state_dict_pre_hook(lambda *args: None)

    num_hooks = [len(vars(module)[name]) for name in torch_private.MODULE_HOOKS]
    assert num_hooks == [1] * len(num_hooks)


class Seen(Exception):
    """Raised before a group is made."""


def see() -> None:
    raise Seen


def groups_seen_before_they_are_made() -> tuple[list[str], int]:
    connect()
    seen = []
    for name, make in WAYS_TO_MAKE_A_GROUP.items():
        with torch_private.before_group_creation(see):
            try:
                make()
            except Seen:
                seen.append(name)
    with torch_private.before_group_creation(see):
        other = threading.Thread(target=dist.new_group)
        other.start()
        other.join()
    group = dist.new_group()
    assert group is not None
    return seen, group.size()


def test_creating_a_group_is_detected_in_this_thread_only() -> None:
    expected = list(WAYS_TO_MAKE_A_GROUP), 2

    assert run_on_ranks(groups_seen_before_they_are_made, 2) == [expected] * 2


def test_a_dispatch_mode_sees_operations() -> None:
    names = []

    class Sees(torch_private.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    with Sees():  # type: ignore[no-untyped-call]  # torch's
        torch.ones(1).uniform_()

    assert names == ["aten::ones", "aten::uniform_"]
