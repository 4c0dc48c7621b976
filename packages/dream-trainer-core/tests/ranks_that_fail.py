"""Runs cases in which ranks fail, each rank a process that ends as a script does.

python ranks_that_fail.py FOLDER JOBS CASE…    a case is WHAT:FAILING_RANK:NUM_RANKS

The processes are forked from this one, which has imported torch, in its main thread: an error
leaves them through the end of this script, past Python's own handlers. When one has ended, the
others get SIGTERM, as from torchrun. Writes FOLDER/CASE/RANK.stderr, and FOLDER/CASE.json with what
became of each rank.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore
from torch.utils.data import DataLoader, Dataset

from dream_trainer.callbacks import Callback
from dream_trainer.callbacks.callback import HOOKS
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, tiny_config
from dream_trainer.testing.processes import rank_environment
from dream_trainer.world import torch_private
from dream_trainer.world.faults import local_processes

HANG_TIMEOUT_S = 3


def fail(trainer: TinyTrainer, what: str = "planned") -> None:
    """Note the time, and raise."""
    note_time(trainer)
    raise ZeroDivisionError(what)


def note_time(trainer: TinyTrainer) -> None:
    Path(trainer.config.root_dir, "failed_at").write_text(str(time.time()))


def is_failing_rank(trainer: TinyTrainer) -> bool:
    return trainer.world.rank == FAILING_RANK


class CleansUp(Callback[TinyTrainer]):
    """Leaves a file per clean-up hook and rank."""

    def on_exception(self, exception: BaseException) -> None:
        self._leave("on_exception", type(exception).__name__)

    def post_fit(self) -> None:
        self._leave("post_fit", type(self.trainer.exception).__name__)

    def _leave(self, hook: str, text: str) -> None:
        Path(self.trainer.config.root_dir, f"{hook}-{self.trainer.world.rank}").write_text(text)


def fails_in(hook: str) -> Callback[TinyTrainer]:
    """A callback that fails in one hook, the second time if it is called often."""
    num_calls = 0

    def method(self: Callback[TinyTrainer], *args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if is_failing_rank(self.trainer) and num_calls == (2 if "step" in hook else 1):
            fail(self.trainer)
        return Callback.train_context(self) if hook.endswith("context") else None

    arguments = ", ".join(("self", *HOOKS[hook]))
    scope: dict[str, Any] = {"method": method}
    exec(f"def {hook}({arguments}): return method({arguments})", scope)  # noqa: S102
    return type("FailsInHook", (Callback,), {hook: scope[hook]})()


class Kernel:
    """A backend whose collective never ends unless it is aborted, as an NCCL kernel.

    Whoever waits for it is in C code, which a signal doesn't interrupt.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._mutex = ctypes.create_string_buffer(64)
        self.times_out_at_s = math.inf

    def wait(self) -> None:
        self._libc.pthread_mutex_lock(self._mutex)
        self._libc.pthread_mutex_lock(self._mutex)

    def abort(self) -> None:
        if Trainer.what == "abort_hangs":
            self.wait()
        self._libc.pthread_mutex_unlock(self._mutex)

    def get_error(self) -> SimpleNamespace:
        if time.time() < self.times_out_at_s:
            return SimpleNamespace(name="SUCCESS")
        Path(f"{os.environ['TORCH_FR_DUMP_TEMP_FILE']}{os.environ['RANK']}").touch()
        return SimpleNamespace(name="TIMEOUT")


KERNEL = Kernel()


class Broken(Dataset[torch.Tensor]):
    def __init__(self, data: Any, action: str) -> None:
        self.data = data
        self.action = action

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        if self.action == "raise" and index > 25:
            raise ZeroDivisionError("planned")
        if self.action == "kill" and index > 25:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.action == "hang" and index > 25:
            time.sleep(600)
        return self.data[index]


class Trainer(TinyTrainer):
    what = ""

    def _fail_in(self, name: str) -> None:
        if self.what == name and is_failing_rank(self):
            fail(self)

    def configure_models(self) -> None:
        self._fail_in("configure_models")
        super().configure_models()

    def configure_optimizers(self) -> None:
        self._fail_in("configure_optimizers")
        if self.what == "SIGTERM" and is_failing_rank(self):
            note_time(self)
            os.kill(os.getpid(), signal.SIGTERM)  # from `fit` on, it would stop the run
        super().configure_optimizers()

    def configure_dataloaders(self) -> Any:
        self._fail_in("configure_dataloaders")
        train, val = super().configure_dataloaders()
        action = self.what.removeprefix("loader_")
        if self.what.startswith("loader_") and is_failing_rank(self):
            note_time(self)
            workers = 0 if action == "raise" else 1
            broken: Any = Broken(train.dataset, action)
            train = DataLoader(broken, batch_size=2, num_workers=workers, sampler=train.sampler)
        return train, val

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            self._fail_in("training_step")
            self._special()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self._fail_in("validation_step")
        return super().validation_step(batch, batch_idx)

    def _special(self) -> None:
        if not is_failing_rank(self):
            if self.what in ("others_compute", "abort_hangs"):
                time.sleep(600)
            if self.what == "others_stuck":
                dist.monitored_barrier(self.world.group())
            if self.what == "others_in_kernel":
                KERNEL.wait()
            if self.what == "kernel_times_out":
                time.sleep(600)
            return
        if self.what == "kernel_times_out":
            note_time(self)
            KERNEL.times_out_at_s = time.time() + 1.0
            KERNEL.wait()
        if self.what in ("others_in_kernel", "abort_hangs"):
            time.sleep(1)
            fail(self)
        if self.what in ("others_compute", "others_stuck", "clean_up_hangs", "thread_hangs"):
            fail(self)
        if self.what in (
            "gives_sigterm_back",
            "clean_up_collective",
            "finally_collective",
            "clean_up_fails",
        ):
            fail(self)
        if self.what in ("SIGKILL", "killed_on_another_machine"):
            note_time(self)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "os_exit":
            note_time(self)
            os._exit(0)
        if self.what == "out_of_memory":
            note_time(self)
            raise torch.OutOfMemoryError("planned")
        if self.what == "system_exit":
            note_time(self)
            sys.exit(3)
        if self.what == "hangs":
            note_time(self)
            time.sleep(600)


class InCleanUp(Callback[TinyTrainer]):
    def __init__(self, what: str) -> None:
        self.what = what

    def pre_fit(self) -> None:
        if self.what == "gives_sigterm_back":
            self.handler = signal.signal(signal.SIGTERM, lambda number, frame: None)

    def on_exception(self, exception: BaseException) -> None:
        if self.what == "gives_sigterm_back" and not is_failing_rank(self.trainer):
            signal.signal(signal.SIGTERM, self.handler)
            time.sleep(2)
        if not is_failing_rank(self.trainer):
            return
        if self.what == "clean_up_hangs":
            time.sleep(600)
        if self.what == "clean_up_collective":
            self.trainer.world.barrier()
        if self.what == "clean_up_fails":
            raise ValueError("in clean-up")
        if self.what == "thread_hangs":
            threading.Thread(target=time.sleep, args=(600,)).start()

    def post_fit(self) -> None:
        if self.what == "clean_up_collective" and is_failing_rank(self.trainer):
            dist.all_reduce(torch.ones(1))


class FailsInBackward(Callback[TinyTrainer]):
    """Fails while gradients are being reduced."""

    def post_setup(self) -> None:
        def hook(gradient: torch.Tensor) -> None:
            if self.trainer.local_batches == 1 and is_failing_rank(self.trainer):
                fail(self.trainer)

        self.trainer.model.embed.weight.register_hook(hook)


def run(folder: Path, what: str) -> None:
    callbacks: list[Callback[Any]] = [CleansUp(), InCleanUp(what)]
    if what in HOOKS:
        callbacks.append(fails_in(what))
    if what == "backward":
        callbacks.append(FailsInBackward())
    Trainer.what = what
    if "kernel" in what or what == "abort_hangs":
        torch_private.nccl_backends = lambda: [("default_pg", KERNEL)]
        os.environ["TORCH_FR_DUMP_TEMP_FILE"] = str(folder / "trace_")
    if what == "killed_on_another_machine":
        local_processes.machine_id = lambda: os.environ["RANK"]
    train_timeout_s = HANG_TIMEOUT_S if "hang" in what else 60
    device = DeviceParameters(
        device="cpu", init_timeout_s=60, train_timeout_s=train_timeout_s, cleanup_timeout_s=4
    )
    trainer = Trainer(tiny_config(folder, callbacks, device=device, n_epochs=2))
    if what == "finally_collective":
        try:
            trainer.fit()
        finally:
            dist.barrier()
    else:
        trainer.fit()
    if what == "on_exception":  # it is only called after an error
        raise AssertionError("unreachable")


FAILING_RANK = 0


def start(folder: Path, what: str, failing_rank: int, num_ranks: int) -> dict[int, int]:
    """Fork the ranks of a case; returns their ranks by process id, in this process alone."""
    global FAILING_RANK
    folder.mkdir(parents=True)
    store_pid, port = start_store()
    ranks = {store_pid: STORE}
    for rank in range(num_ranks):
        pid = os.fork()
        if pid:
            ranks[pid] = rank
            continue
        os.environ.update(
            rank_environment(rank, num_ranks, port),
            TORCHELASTIC_RUN_ID="test",
            TORCHELASTIC_ERROR_FILE=str(folder / f"{rank}.error.json"),
        )
        os.dup2(os.open(folder / f"{rank}.stderr", os.O_WRONLY | os.O_CREAT), 2)
        FAILING_RANK = failing_rank
        raise InChild(folder, what)
    return ranks


STORE = -1


def start_store() -> tuple[int, int]:
    """A process for a case's store, as torchrun is one; returns its process id and port.

    Here, where ranks are forked from, there must be no threads.
    """
    parent = os.getpid()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        with os.fdopen(reader) as pipe:
            return pid, int(pipe.read())
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with os.fdopen(writer, "w") as pipe:
        pipe.write(str(store.port))
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


class InChild(Exception):
    """Leaves the parent's loop, so that what it did isn't on the child's stack."""


def ended(folder: Path, ended_at: dict[int, tuple[int, float]]) -> dict[str, Any]:
    noted = folder / "failed_at"
    failed_at = float(noted.read_text()) if noted.exists() else None
    return {
        "failed_at": failed_at,
        "codes": [ended_at[rank][0] for rank in sorted(ended_at)],
        "ended_at": [ended_at[rank][1] for rank in sorted(ended_at)],
        "stderr": [(folder / f"{rank}.stderr").read_text() for rank in sorted(ended_at)],
    }


def run_all(root: Path, num_jobs: int, cases: list[str]) -> None:
    waiting = list(cases)
    running: dict[str, dict[int, int]] = {}
    outcomes: dict[str, dict[int, tuple[int, float]]] = {}
    while waiting or running:
        while waiting and len(running) < num_jobs:
            case = waiting.pop(0)
            what, failing_rank, num_ranks = case.split(":")
            running[case] = start(root / case, what, int(failing_rank), int(num_ranks))
            outcomes[case] = {}
        pid, status = os.wait()
        case = next(case for case, ranks in running.items() if pid in ranks)
        rank = running[case].pop(pid)
        outcomes[case][rank] = (os.waitstatus_to_exitcode(status), time.time())
        is_on_one_machine = "another_machine" not in case
        if running[case] and len(outcomes[case]) == 1 and is_on_one_machine:
            time.sleep(0.1)  # as torchrun, which looks ten times a second
            for other in running[case]:
                if running[case][other] != STORE:
                    os.kill(other, signal.SIGTERM)
        if list(running[case].values()) == [STORE]:
            [store_pid] = running.pop(case)
            os.kill(store_pid, signal.SIGKILL)
            os.waitpid(store_pid, 0)
            (root / f"{case}.json").write_text(json.dumps(ended(root / case, outcomes[case])))


if __name__ == "__main__":
    torch.set_num_threads(1)
    child: InChild | None = None
    try:
        run_all(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    except InChild as case:
        child = case
    if child is not None:
        run(*child.args)
