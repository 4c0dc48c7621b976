"""Ranks in a test: runs a function on N gloo processes, with a timeout."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from dream_trainer.testing.pickling import dumps, loads

_PRELOADED = (
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint.state_dict",
    "torch._dynamo",
    "torch.utils.data",
    "dream_trainer.trainer",
)


class RankError(AssertionError):
    """A rank raised, died or took too long.

    Attributes:
        tracebacks: Tracebacks of failed ranks, by rank.
    """

    def __init__(self, message: str, tracebacks: dict[int, str]) -> None:
        super().__init__(message)
        self.tracebacks = tracebacks


def run_on_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 60.0
) -> list[Any]:
    """Call a function on several ranks, as torchrun would, and return all results.

    The processes are forked from a server that has imported torch: four ranks start in well under
    a second. The environment is that of torchrun, so a trainer finds its rank; each rank uses one
    thread. Each rank imports the main script: call this there under `if __name__ == "__main__":`.

    Args:
        function: Called as `function(*args)`; may be a lambda.
        num_ranks: Number of processes.
        *args: Picklable; classes among them must be defined at the top of a module.
        timeout_s: Seconds until all ranks are killed.

    Returns:
        The results, by rank; must be picklable.

    Raises:
        RankError: If a rank raised, died or took too long, with all tracebacks, including those of
            killed ranks.
    """
    with tempfile.TemporaryDirectory() as stacks:
        return _run(dumps((function, args)), num_ranks, timeout_s, Path(stacks))


def _run(work: bytes, num_ranks: int, timeout_s: float, stacks: Path) -> list[Any]:
    context = multiprocessing.get_context("forkserver")
    preloaded = [*_PRELOADED, *(name for name in ("pytest", "numpy") if name in sys.modules)]
    context.set_forkserver_preload(preloaded)
    # As with torchrun, the parent hosts the store: a rank may exit before the others.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    deadline = time.monotonic() + timeout_s
    processes = []
    connections: dict[Any, int] = {}
    for rank in range(num_ranks):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_run_rank,
            args=(sender, work, rank, num_ranks, store.port, stacks / str(rank)),
            daemon=False,  # a loader may have workers
        )
        process.start()
        sender.close()
        processes.append(process)
        connections[receiver] = rank
    outcomes: dict[int, tuple[bool, Any]] = {}
    try:
        while connections and (ready := wait(connections, timeout=deadline - time.monotonic())):
            for connection in ready:
                rank = connections.pop(connection)
                outcomes[rank] = _received(connection, processes[rank], stacks / str(rank))
            if any(not succeeded for succeeded, _ in outcomes.values()):
                # The others may wait for the failed one: leave them time to report it.
                deadline = min(deadline, time.monotonic() + 5.0)
    finally:
        for rank in connections.values():
            pid = processes[rank].pid
            assert pid is not None, "it was started"
            with contextlib.suppress(ProcessLookupError):  # it may have just exited
                os.kill(pid, signal.SIGABRT)  # it writes its traceback, and exits
        for process in processes:
            process.join(timeout=1.0 if connections else 10.0)
            process.kill()
            process.join()
        # It has threads. If frames of an error kept it alive, it would abort each process forked
        # until then, such as a loader's worker, when garbage is collected there.
        del store
    tracebacks = {rank: text for rank, (succeeded, text) in outcomes.items() if not succeeded}
    for rank in sorted(connections.values()):
        tracebacks[rank] = (
            f"rank {rank} had not returned after {timeout_s:g} s, or was killed, here:\n"
            + _written(stacks / str(rank))
        )
    if tracebacks:
        message = "\n".join(f"--- rank {rank} ---\n{text}" for rank, text in tracebacks.items())
        raise RankError(f"{len(tracebacks)} of {num_ranks} ranks failed\n{message}", tracebacks)
    return [outcomes[rank][1] for rank in range(num_ranks)]


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """The environment variables that torchrun sets for a rank on one host."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _run_rank(
    sender: Connection, work: bytes, rank: int, num_ranks: int, port: int, stack: Path
) -> None:
    """Body of a rank's process: make the call in `work` and send its outcome."""
    import torch

    # A loader's workers start as in a script, not from another server.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable(stack.open("w"))  # for SIGABRT, and for crashes
    torch.set_num_threads(1)
    os.environ.update(rank_environment(rank, num_ranks, port))
    try:
        function, args = loads(work)
        # By value: multiprocessing would share tensors with a process that is exiting.
        outcome = pickle.dumps((True, function(*args)))
    except BaseException:  # noqa: BLE001  # the parent raises it
        outcome = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(outcome)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _received(receiver: Any, process: Any, stack: Path) -> tuple[bool, Any]:
    try:
        outcome: tuple[bool, Any] = pickle.loads(receiver.recv_bytes())  # noqa: S301  # from our child
    except EOFError:
        process.join(timeout=5.0)
        died = f"the process died with exit code {process.exitcode}"
        if not stack.exists():
            died += (
                " before the function was called. Each rank imports the script that is run: start "
                'ranks there, and do all that must be done once, under if __name__ == "__main__":'
            )
        return False, f"{died}\n{_written(stack)}"
    return outcome


def _written(stack: Path) -> str:
    return stack.read_text() if stack.exists() else ""  # it may have exited before writing
