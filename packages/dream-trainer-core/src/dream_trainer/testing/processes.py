"""Ranks inside a test: a function on N gloo processes, with a time limit."""

from __future__ import annotations

import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

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
        tracebacks: Text of each rank's error, by rank; none for ranks that succeeded.
    """

    def __init__(self, message: str, tracebacks: dict[int, str]) -> None:
        super().__init__(message)
        self.tracebacks = tracebacks


def run_on_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 60.0
) -> list[Any]:
    """Call a function on several ranks, as torchrun would, and return what each returned.

    The processes are forked from a server that has imported torch already: four ranks are at
    work in well under a second. The environment is the one that torchrun sets, so a trainer
    inside finds its rank by itself; each rank uses one thread.

    Args:
        function: Defined at the top of a module; called as `function(*args)`.
        num_ranks: How many processes.
        *args: Picklable.
        timeout_s: Seconds until all ranks are killed.

    Returns:
        What each rank returned, by rank; must be picklable.

    Raises:
        RankError: If a rank raised, died or took too long, with all tracebacks.
    """
    context = multiprocessing.get_context("forkserver")
    preloaded = [*_PRELOADED, *(name for name in ("pytest", "numpy") if name in sys.modules)]
    context.set_forkserver_preload(preloaded)
    port, deadline = _free_port(), time.monotonic() + timeout_s
    processes = []
    connections: dict[Any, int] = {}
    for rank in range(num_ranks):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_run_rank,
            args=(sender, _reference(function), args, rank, num_ranks, port, timeout_s),
            daemon=True,
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
                outcomes[rank] = _received(connection, processes[rank])
            if any(not succeeded for succeeded, _ in outcomes.values()):
                # The others may wait for the one that failed: a moment to say so themselves.
                deadline = min(deadline, time.monotonic() + 5.0)
    finally:
        for process in processes:
            process.join(timeout=0.0 if connections else 10.0)
            process.kill()
            process.join()
    tracebacks = {rank: text for rank, (succeeded, text) in outcomes.items() if not succeeded}
    for rank in sorted(connections.values()):
        tracebacks[rank] = f"rank {rank} had not returned after {timeout_s:g} s, or was cut off"
    if tracebacks:
        message = "\n".join(f"--- rank {rank} ---\n{text}" for rank, text in tracebacks.items())
        raise RankError(f"{len(tracebacks)} of {num_ranks} ranks failed\n{message}", tracebacks)
    return [outcomes[rank][1] for rank in range(num_ranks)]


def _run_rank(
    sender: Connection,
    reference: tuple[str, str, str],
    args: tuple[Any, ...],
    rank: int,
    num_ranks: int,
    port: int,
    timeout_s: float,
) -> None:
    """Body of a rank's process."""
    import torch

    faulthandler.dump_traceback_later(timeout_s * 0.9, exit=False)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        outcome: tuple[bool, Any] = True, _resolved(reference)(*args)
    except BaseException:  # noqa: BLE001  # the parent raises it
        outcome = False, traceback.format_exc()
    # By value: multiprocessing would share tensors with a process that is about to end.
    sender.send_bytes(pickle.dumps(outcome))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _received(receiver: Any, process: Any) -> tuple[bool, Any]:
    try:
        outcome: tuple[bool, Any] = pickle.loads(receiver.recv_bytes())  # noqa: S301  # our child's
    except EOFError:
        process.join(timeout=5.0)
        return False, f"the process died with exit code {process.exitcode}"
    return outcome


def _reference(function: Callable[..., Any]) -> tuple[str, str, str]:
    """Module, file and name of a function: test modules can't be imported by name."""
    if "<locals>" in function.__qualname__:
        raise ValueError(
            f"{function.__qualname__} is defined inside a function, where other processes can't "
            "find it; move it to the top of the module and give it arguments"
        )
    file = sys.modules[function.__module__].__file__
    assert file is not None, f"{function.__module__} has no file"
    module = "__mp_main__" if function.__module__ == "__main__" else function.__module__
    return module, file, function.__qualname__


def _resolved(reference: tuple[str, str, str]) -> Any:
    name, file, qualname = reference
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None, f"{file} can't be imported"
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    found: Any = sys.modules[name]
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
