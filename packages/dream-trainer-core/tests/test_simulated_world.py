"""A SimulatedWorld sets up an ordinary trainer as one of many ranks, in one process."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from llama_trainer import NUM_PARAMETERS, LlamaTrainer, llama_config
from recording import Recorder
from torch import nn

from dream_trainer.callbacks import RankZeroCallback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.testing.trainers import TinyConfig
from dream_trainer.world import SimulatedWorld, World

FSDP = DeviceParameters.FSDP(device="cpu")


@pytest.fixture
def world() -> Iterator[SimulatedWorld]:
    with SimulatedWorld(FSDP, rank=3, world_size=1024) as world:
        world.launch()
        yield world


class Sharded(TinyTrainer):
    """Has an init_weights, so that it is built on the meta device."""

    def init_weights(self) -> None:
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.2)


def config_for_many(root: str | Path, callbacks: Any = (), **fields: Any) -> TinyConfig:
    config = tiny_config(root, callbacks, device=DeviceParameters.FSDP(**fields))
    config.num_samples, config.batch_size = 4096, 1024
    return config


# A model of 1.1 billion parameters on 1,024 ranks

LAYOUTS: dict[str, Callable[..., DeviceParameters]] = {
    "fsdp": DeviceParameters.FSDP,
    "hsdp": partial(DeviceParameters.HSDP, dp_shard=8),
    "fsdp+tp": partial(DeviceParameters.FSDP, tensor_parallel=8),
}
NAMES = ("embed.weight", "layers.0.attention.k.weight", "layers.21.feed_forward.down.weight")
# 32,000, 512 and 2,048 rows; torch gives all but the last ranks with rows the same number.
LOCAL_SHAPES = {
    ("fsdp", 0): [(32, 2048), (1, 2048), (2, 5632)],
    ("fsdp", 1023): [(0, 2048), (0, 2048), (2, 5632)],
    ("hsdp", 0): [(4000, 2048), (64, 2048), (256, 5632)],
    ("hsdp", 1023): [(4000, 2048), (64, 2048), (256, 5632)],
    ("fsdp+tp", 0): [(32, 2048), (1, 2048), (16, 704)],
    ("fsdp+tp", 1023): [(0, 2048), (0, 2048), (16, 704)],
}
NUM_BATCHES = {"fsdp": (4, 1), "hsdp": (4, 1), "fsdp+tp": (32, 8)}


def local_part(tensor: Any) -> torch.Tensor:
    part: torch.Tensor = tensor.to_local()
    return part


def set_up_llama(layout: str, rank: int) -> dict[str, Any]:
    kilobytes_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer = LlamaTrainer(
        llama_config(LAYOUTS[layout]()), world=SimulatedWorld(rank=rank, world_size=1024)
    )
    trainer.configure()
    trainer.setup()
    model, parameters = trainer.model, list(trainer.model.parameters())
    loader: Any = trainer.train_dataloader
    embedding = local_part(model.embed.weight)
    return {
        "grown_bytes": 1024
        * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - kilobytes_before),
        "num_parameters": sum(parameter.numel() for parameter in parameters),
        "are_on_cpu": {str(tensor.device) for tensor in (*parameters, *model.buffers())},
        "local_shapes": [tuple(local_part(model.get_parameter(name)).shape) for name in NAMES],
        "std": float(embedding.std()) if embedding.numel() else None,
        "norm": float(local_part(model.norm.weight).mean()),
        "optimized": sum(
            p.numel() for group in trainer.optimizer.param_groups for p in group["params"]
        ),
        "has_scheduler": list(trainer.named_schedulers()),
        "num_batches": (trainer.num_train_batches, trainer.num_val_batches),
        "data": (loader.sampler.rank, loader.sampler.num_replicas),
        "metrics": list(trainer.named_metrics()),
        "coordinate": tuple(trainer.world.mesh.get_coordinate() or ()),
    }


@pytest.mark.parametrize(("layout", "rank"), LOCAL_SHAPES, ids=str)
def test_a_billion_parameters_are_set_up_as_one_of_1024_ranks(layout: str, rank: int) -> None:
    (found,) = run_on_ranks(set_up_llama, 1, layout, rank)

    assert found["local_shapes"] == LOCAL_SHAPES[layout, rank]
    assert found["num_parameters"] == found["optimized"] == NUM_PARAMETERS > 10**9
    assert found["are_on_cpu"] == {"cpu"}
    assert found["norm"] == 1.0
    if found["local_shapes"][0][0]:
        assert found["std"] == pytest.approx(0.02, rel=0.05)
    assert found["has_scheduler"] == ["scheduler"]
    assert found["num_batches"] == NUM_BATCHES[layout]
    dp_size = 128 if layout == "fsdp+tp" else 1024
    assert found["data"] == (dp_size - 1 if rank else 0, dp_size)
    assert found["metrics"] == ["mean_loss"]
    last = {"fsdp": (0, 0, 1023, 0, 0), "hsdp": (0, 127, 7, 0, 0), "fsdp+tp": (0, 0, 127, 0, 7)}
    assert found["coordinate"] == (last[layout] if rank else (0, 0, 0, 0, 0))
    assert found["grown_bytes"] < 10**9


# No sockets, threads or handlers


def sockets() -> set[str]:
    links = (os.path.realpath(each.path) for each in os.scandir("/proc/self/fd"))
    return {link for link in links if "socket:" in link}


def traces() -> dict[str, Any]:
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGURG, signal.SIGUSR1, signal.SIGCHLD)
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    return {
        "sockets": sockets(),
        "threads": set(threading.enumerate()),
        "handlers": [signal.getsignal(each) for each in signals],
        "wakeup": wakeup,
    }


def traces_of_set_up(root: str) -> tuple[bool, bool]:
    before = traces()
    trainer = Sharded(config_for_many(root), world=SimulatedWorld(rank=0, world_size=1024))
    trainer.setup()
    return traces() == before, trainer.world.is_distributed


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="sockets are counted in /proc")
def test_set_up_opens_no_socket_starts_no_thread_and_sets_no_handler(tmp_path: Path) -> None:
    assert run_on_ranks(traces_of_set_up, 1, str(tmp_path)) == [(True, True)]


def test_the_checks_find_traces_of_a_real_world(tmp_path: Path) -> None:
    def finds_traces() -> bool:
        before = traces()
        world = World(FSDP)
        world.connect()
        after = traces()
        world.barrier()  # the other rank may still be connecting
        return len(after["sockets"]) > len(before["sockets"])

    assert run_on_ranks(finds_traces, 2) == [True, True]


def test_the_environment_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")

    world = SimulatedWorld(FSDP, rank=1023, world_size=1024)

    assert (world.rank, world.local_rank, world.world_size) == (1023, 7, 1024)
    assert (world.dp_rank, world.dp_size, world.is_global_zero) == (1023, 1024, False)


def test_it_is_on_the_cpu_for_any_device_parameter() -> None:
    world = SimulatedWorld(DeviceParameters.FSDP(device="cuda"), rank=1, world_size=16)

    assert world.device == torch.device("cpu")


# Hooks


class OnZero(RankZeroCallback[Any]):
    def __init__(self) -> None:
        self.events: list[str] = []

    def pre_launch(self) -> None:
        self.events.append("pre_launch")

    def post_setup(self) -> None:
        self.events.append("post_setup")


@pytest.mark.parametrize("rank", [0, 1023])
def test_hooks_up_to_post_setup_run_as_on_that_rank(tmp_path: Path, rank: int) -> None:
    recorder, on_zero = Recorder(), OnZero()
    config = config_for_many(tmp_path, [recorder, on_zero])
    with SimulatedWorld(rank=rank, world_size=1024) as world:
        Sharded(config, world=world).setup()

    assert recorder.events == [
        "pre_launch",
        "pre_configure",
        "post_configure",
        "pre_setup",
        "post_setup",
    ]
    assert on_zero.events == (["pre_launch", "post_setup"] if rank == 0 else [])


def test_fit_is_refused_before_anything_runs(tmp_path: Path) -> None:
    recorder = Recorder()
    config = config_for_many(tmp_path, [recorder])
    with SimulatedWorld(rank=3, world_size=1024) as world:
        trainer = Sharded(config, world=world)
        with pytest.raises(RuntimeError, match="the other ranks are simulated") as caught:
            trainer.fit()
        assert not dist.is_initialized()

    assert str(caught.value).startswith("fit() in SimulatedWorld(rank=3, world_size=1024): ")
    assert "start 1024 ranks with torchrun" in str(caught.value)
    assert recorder.events == []
    assert trainer.exception is None


def test_an_error_in_set_up_is_raised_at_once_and_ends_the_world(tmp_path: Path) -> None:
    recorder = Recorder(fail_in="pre_setup")
    config = config_for_many(tmp_path, [recorder])
    trainer = Sharded(config, world=SimulatedWorld(rank=3, world_size=1024))

    with pytest.raises(ValueError, match="planned"):
        trainer.setup()

    assert recorder.events[-2:] == ["pre_setup", "on_exception"]
    assert not dist.is_initialized()


def test_a_mistake_in_the_trainer_is_found(tmp_path: Path) -> None:
    config = config_for_many(tmp_path)
    config.num_samples = 3000  # a quarter, for validation, can't be given to 1,024 ranks …
    config.batch_size = 512  # … nor half a sample to each

    with (
        SimulatedWorld(rank=3, world_size=1024) as world,
        pytest.raises(ValueError, match="batch_size"),
    ):
        Sharded(config, world=world).setup()


# State


def test_a_state_has_the_part_of_this_rank(tmp_path: Path) -> None:
    with SimulatedWorld(rank=1, world_size=4) as world:
        trainer = Sharded(config_for_many(tmp_path), world=world)
        trainer.setup()
        state = trainer.state_dict()
        trainer.load_state_dict(state)

    weight = state["models"]["model"]["embed.weight"]
    assert tuple(weight.shape) == (8, 4)
    assert torch.equal(weight.to_local(), local_part(trainer.model.embed.weight))
    assert tuple(weight.to_local().shape) == (2, 4)


# Assumptions of the simulation


def test_numbers_are_reduced_as_if_all_ranks_had_them(world: SimulatedWorld) -> None:
    assert world.all_reduce(3) == 3.0
    assert isinstance(world.all_reduce(3), float)
    assert world.all_reduce(3, "sum") == 3072
    assert isinstance(world.all_reduce(3, "sum"), int)
    assert world.all_reduce(True, "sum") == 1024
    assert world.all_reduce(False, "max") is False
    assert world.all_reduce({"b": 0.5, "a": 2}, "sum") == {"b": 512.0, "a": 2048}
    assert world.all_reduce({"a": 2}, "min") == {"a": 2}
    with pytest.raises(ValueError, match="op='product'"):
        world.all_reduce(3, "product")  # type: ignore[arg-type]


def test_tensors_are_reduced_as_if_all_ranks_had_them(world: SimulatedWorld) -> None:
    value = torch.tensor([1.0, -2.0])
    for op in ("mean", "min", "max"):
        assert torch.equal(world.all_reduce(value, op), value)

    total = world.all_reduce(value, "sum")
    assert torch.equal(total, 1024 * value)
    assert torch.equal(value, torch.tensor([1.0, -2.0]))
    assert world.all_reduce(torch.tensor(True), "sum").item() == 1024


def test_gathered_values_share_the_memory_of_one(world: SimulatedWorld) -> None:
    value = torch.arange(6.0).view(2, 3)
    gathered = world.all_gather(value)
    assert gathered.shape == (1024, 2, 3)
    assert torch.equal(gathered[1023], value)
    assert gathered.untyped_storage().nbytes() == value.untyped_storage().nbytes()

    mine = {"rank": 3}
    objects = world.all_gather(mine)
    assert objects == [mine] * 1024
    assert len({id(each) for each in objects}) == 1
    assert objects[0] is not mine


def test_values_that_cannot_be_pickled_are_an_error(world: SimulatedWorld) -> None:
    for send in (world.all_gather, world.broadcast_object):
        with pytest.raises(Exception, match="pickle"):
            send(lambda: None)


def test_ranks_agree_without_blocking(world: SimulatedWorld) -> None:
    assert world.broadcast_object("mine", src=0) == "mine"
    assert torch.equal(world.broadcast(torch.tensor([3.0]), src=0), torch.tensor([3.0]))
    assert world.agree("anything") == "anything"
    for condition in (True, False):
        assert world.any_rank(condition) is world.all_ranks(condition) is condition
    world.barrier()
    assert world.group() is None
    assert dist.get_world_size(world.group()) == 1024
    assert world.seed(None) >= 0
    world.tighten_timeouts()


def test_guarded_collectives_are_refused(world: SimulatedWorld) -> None:
    with world.no_collectives("a hook"):
        for collective in (world.all_reduce, world.all_gather, world.broadcast_object):
            with pytest.raises(RuntimeError, match="in a hook"):
                collective(1)


def test_torchs_fake_process_group_never_blocks(world: SimulatedWorld) -> None:
    assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (3, 1024, "fake")
    value, parts = torch.ones(1), [torch.zeros(1) for _ in range(1024)]
    dist.all_reduce(value)
    dist.broadcast(value, src=0)
    dist.all_gather(parts, value)
    dist.barrier()

    assert value.item() == parts[0].item() == parts[1023].item() == 1.0


# Which rank, layout and process


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [
        (8, 8, r"rank=8 of world_size=8: a rank from 0 to 7 is required"),
        (-1, 8, r"rank=-1 of world_size=8"),
        (0, 0, r"world_size=0, ranks_per_node=8: both must be at least 1"),
    ],
)
def test_a_rank_out_of_range_is_refused(rank: int, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedWorld(rank=rank, world_size=world_size)


def test_the_layout_must_fit_the_number_of_ranks(tmp_path: Path) -> None:
    config = config_for_many(tmp_path, tensor_parallel=3)

    with pytest.raises(ValueError, match="1024 ranks can't be divided by 3"):
        Sharded(config, world=SimulatedWorld(rank=0, world_size=1024))


def test_a_world_with_another_layout_than_the_config_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, device=FSDP)
    message = "dp_shard=1 in the world and 'auto' in the config"

    for other in (
        SimulatedWorld(DeviceParameters.DDP(device="cpu"), rank=0, world_size=1024),
        World(DeviceParameters.DDP(device="cpu")),
    ):
        with pytest.raises(ValueError, match=message):
            Sharded(config, world=other)


def test_without_a_layout_the_error_says_what_is_missing() -> None:
    world = SimulatedWorld(rank=3, world_size=1024)

    with pytest.raises(AttributeError, match=r"no layout yet, and so no mesh; give it to a train"):
        _ = world.mesh
    with pytest.raises(AttributeError, match="no layout yet, and so no dp_size"):
        _ = world.dp_size
    assert not hasattr(world, "__anything__")


def test_trainers_may_share_a_world(tmp_path: Path) -> None:
    with SimulatedWorld(rank=3, world_size=1024) as world:
        trainers = [Sharded(config_for_many(tmp_path), world=world) for _ in range(2)]
        for trainer in trainers:
            trainer.setup()

        weights: list[Any] = [trainer.model.embed.weight for trainer in trainers]
        meshes = [weight.device_mesh for weight in weights]
        assert meshes[0] == meshes[1]


def test_connecting_another_rank_shuts_down_the_previous_one(tmp_path: Path) -> None:
    trainers = []
    for rank in (0, 1023):
        config = config_for_many(tmp_path)
        config.width = 1000  # the last ranks get nothing
        trainer = Sharded(config, world=SimulatedWorld(rank=rank, world_size=1024))
        trainer.setup()
        trainers.append(trainer)
        assert dist.get_rank() == rank
    first, last = trainers

    assert (
        local_part(first.model.embed.weight).shape,
        local_part(last.model.embed.weight).shape,
    ) == ((1, 4), (0, 4))
    with pytest.raises(RuntimeError, match=r"before world\.launch"):
        _ = first.world.mesh
    first.world.shutdown()
    assert dist.get_rank() == 1023
    last.world.shutdown()
    assert not dist.is_initialized()


def test_a_second_rank_gets_its_own_shard(tmp_path: Path) -> None:
    # torch caches shardings by mesh, and the meshes of all ranks are equal.
    offsets = []
    for rank in (3, 0, 2):
        with SimulatedWorld(rank=rank, world_size=4) as world:
            trainer = Sharded(config_for_many(tmp_path), world=world)
            trainer.setup()
            weight: Any = trainer.state_dict()["models"]["model"]["embed.weight"]
            chunks = [*weight.__create_chunk_list__(), *(2 * weight).__create_chunk_list__()]
            offsets.append([tuple(chunk.offsets) for chunk in chunks])

    assert offsets == [[(6, 0), (6, 0)], [(0, 0), (0, 0)], [(4, 0), (4, 0)]]


def test_a_real_process_group_is_never_replaced() -> None:
    def connected() -> tuple[str, str]:
        SimulatedWorld(FSDP, rank=0, world_size=8).launch()
        dist.destroy_process_group()  # directly, not through the world
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        with pytest.raises(RuntimeError) as caught:
            SimulatedWorld(FSDP, rank=0, world_size=1024).launch()
        return str(caught.value), dist.get_backend()

    ((message, backend),) = run_on_ranks(connected, 1)
    assert "already has a process group of 1 ranks with backend 'gloo'" in message
    assert "destroy_process_group()" in message
    assert backend == "gloo"


class WithOwnInit(Sharded):
    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.was_made = True


def test_a_trainer_with_its_own_init_works(tmp_path: Path) -> None:
    trainer = WithOwnInit(tiny_config(tmp_path, max_steps=1))
    trainer.fit()

    assert trainer.was_made
    assert trainer.world.world_size == 1


def test_initial_weights_have_the_same_distributions(tmp_path: Path) -> None:
    config = config_for_many(tmp_path)
    config.width = 4096
    with SimulatedWorld(rank=0, world_size=4) as world:
        trainer = Sharded(config, world=world)
        trainer.setup()
        with world.sharded_random():
            like: Any = torch.randn_like(trainer.model.embed.weight)

    assert local_part(trainer.model.embed.weight).shape == (1024, 4)
    assert local_part(trainer.model.embed.weight).std().item() == pytest.approx(0.2, rel=0.05)
    assert (tuple(like.shape), tuple(like.to_local().shape)) == ((4096, 4), (1024, 4))
    assert like.to_local().std().item() == pytest.approx(1.0, rel=0.05)
