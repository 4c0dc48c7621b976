"""NCCL collectives: what torch's watchdog reports, and that waiting threads are released."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import run_on_ranks
from dream_trainer.world import World, torch_private
from dream_trainer.world.faults.device_collectives import (
    DeviceCollectives,
    leave_failures_to_python,
)
from dream_trainer.world.faults.failure import is_lost_connection, is_timeout


class Backend:
    """Has what is used of torch's NCCL backend; an abort waits until `others` are aborted too."""

    def __init__(self, error: str = "SUCCESS") -> None:
        self.error = error
        self.aborted = threading.Event()
        self.others: list[Backend] = []
        self.num_aborts = 0

    def get_error(self) -> SimpleNamespace:
        return SimpleNamespace(name=self.error)

    def abort(self) -> None:
        self.num_aborts += 1
        self.aborted.set()
        for other in self.others:
            assert other.aborted.wait(10)


def use(monkeypatch: pytest.MonkeyPatch, **backends: Backend) -> DeviceCollectives:
    monkeypatch.setattr(torch_private, "nccl_backends", lambda: list(backends.items()))
    return DeviceCollectives(rank=3)


@pytest.mark.parametrize(
    ("error", "what"),
    [
        ("SUCCESS", None),
        ("TIMEOUT", "an NCCL collective timed out (group mesh_dp_shard)"),
        ("COMM_ERROR", "an NCCL collective failed (group mesh_dp_shard)"),
        ("REMOTE_ERROR", "an NCCL collective failed on another rank (group mesh_dp_shard)"),
    ],
)
def test_what_the_watchdog_found_is_reported_with_its_group(
    monkeypatch: pytest.MonkeyPatch, error: str, what: str | None
) -> None:
    assert use(monkeypatch, a=Backend(), mesh_dp_shard=Backend(error)).failure() == what


def test_groups_are_aborted_together_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Backend(), Backend()
    first.others, second.others = [second], [first]  # one after the other would deadlock
    collectives = use(monkeypatch, first=first, second=second)

    assert not collectives.are_aborted
    for done in (*collectives.abort(), *collectives.abort()):
        done.result(10)
    assert collectives.are_aborted
    assert (first.num_aborts, second.num_aborts) == (1, 1)


def test_a_gloo_run_has_no_device_collectives() -> None:
    assert run_on_ranks(on_gloo, 2) == [(None, [], False)] * 2


def on_gloo() -> tuple[str | None, list[object], bool]:
    World(DeviceParameters(device="cpu")).launch()
    collectives = DeviceCollectives(rank=0)
    return collectives.failure(), list(collectives.abort()), collectives.are_aborted


def test_the_flight_recorder_of_this_failure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", str(tmp_path / "trace_"))
    path, collectives = tmp_path / "trace_3", DeviceCollectives(rank=3)

    assert collectives.trace_file(time.time()) is None
    path.touch()
    os.utime(path, (0, 0))
    assert collectives.trace_file(time.time() - 60) is None
    threading.Timer(0.5, path.touch).start()
    assert collectives.trace_file(time.time() - 60) == path


def test_the_flight_recorder_writes_where_torch_does_by_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    found = [torch_private.flight_recorder_file(7)]
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    found.append(torch_private.flight_recorder_file(7))
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "/shared/old_")
    found.append(torch_private.flight_recorder_file(7))

    assert list(map(str, found)) == [
        "/home/me/.cache/torch/comm_lib_trace_rank_7",
        "/cache/torch/comm_lib_trace_rank_7",
        "/shared/old_7",
    ]


def test_the_users_settings_of_the_watchdog_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_RETHROW_CUDA_ERRORS", "1")
    monkeypatch.setenv("TORCH_NCCL_TEARDOWN_ON_TIMEOUT", "")  # so that it is restored
    monkeypatch.delenv("TORCH_NCCL_TEARDOWN_ON_TIMEOUT")
    leave_failures_to_python()

    assert os.environ["TORCH_NCCL_RETHROW_CUDA_ERRORS"] == "1"
    assert os.environ["TORCH_NCCL_TEARDOWN_ON_TIMEOUT"] == "1"


WATCHDOG = (
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=6463, OpType=ALLREDUCE,"
    " NumelIn=1, NumelOut=1, Timeout(ms)=5000) ran for 5017 milliseconds before timing out."
)
STORE = "wait timeout after 5000ms, keys: /default_pg/0//cuda//0"


@pytest.mark.parametrize(
    ("error", "timed_out", "lost"),
    [
        (dist.DistBackendError(WATCHDOG), True, True),
        (dist.DistStoreError(STORE), True, True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), False, True),
        (RuntimeError("[gloo] Timed out waiting 5000ms for recv operation"), True, False),
        (RuntimeError("CUDA error: device-side assert triggered"), False, False),
    ],
    ids=["watchdog", "store", "aborted", "gloo", "assert"],
)
def test_errors_of_nccl_are_told_apart(error: Exception, timed_out: bool, lost: bool) -> None:
    assert (is_timeout(error), is_lost_connection(error)) == (timed_out, lost)


def seconds_until_released() -> float:
    """Rank 0 waits for an all-reduce that rank 1 doesn't join, until another thread aborts it."""
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    ones, collectives = torch.ones(1, device=device), DeviceCollectives(rank)
    dist.all_reduce(ones)
    torch.cuda.synchronize()
    began_s = time.monotonic()
    if rank == 0:
        dist.all_reduce(ones)
        threading.Timer(1.0, collectives.abort).start()
        ones.item()
        with pytest.raises(dist.DistBackendError, match="abort"):
            dist.all_reduce(ones)
    waited_s = time.monotonic() - began_s
    dist.monitored_barrier(dist.new_group(backend="gloo"))
    for done in collectives.abort():
        done.result(10)
    return waited_s


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_an_abort_releases_a_thread_that_waits_for_nccl() -> None:
    waited_s, _ = run_on_ranks(seconds_until_released, 2)

    assert 0.5 < waited_s < 5
