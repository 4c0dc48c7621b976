"""The launcher, torchrun for example: starting it, its store, its error file, and its exit."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from dream_trainer.world.device import num_devices

if TYPE_CHECKING:
    from torch.distributed import Store

    from dream_trainer.configs.device import DeviceParameters

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_num_stores = 0

_script: Sequence[str] | None = None


@contextlib.contextmanager
def starting_ranks_of(script: Sequence[str] | None) -> Iterator[None]:
    """Inside, `start_ranks` may replace this process, unless a launcher has started it.

    Args:
        script: Command line after `python`: the script or `-m` and a module, and its arguments.
            None if this process runs no script, as in a notebook: then it isn't replaced.
    """
    global _script  # noqa: PLW0603  # there is one main script in a process
    _script = None if "RANK" in os.environ else script
    try:
        yield
    finally:
        _script = None


def start_ranks_if_needed(parameters: DeviceParameters) -> None:
    """Replace this process by torchrun, which runs the script on each rank, if it is to.

    Only inside `starting_ranks_of`, and only the first call has an effect: later worlds of the
    process have as many ranks.
    """
    global _script
    script, _script = _script, None
    if script is None:
        return
    num_ranks = parameters.num_ranks_to_start(num_devices())
    if num_ranks > 1:
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, "-m", *torchrun, *script])


def open_store(rank: int, world_size: int, timeout_s: float) -> Store:
    """Connect to the rendezvous store. Collective.

    torchrun hosts it and keeps it over restarts; without torchrun rank 0 hosts it. Keys have a
    prefix, so those of an earlier attempt, or an earlier world of this process, aren't seen.

    Raises:
        ValueError: If the environment has no address of the store.
    """
    global _num_stores  # noqa: PLW0603  # each rank opens its stores in the same order
    _num_stores += 1
    store, _, _ = next(
        dist.rendezvous("env://", rank, world_size, timeout=timedelta(seconds=timeout_s))
    )
    run, attempt = os.environ.get("TORCHELASTIC_RUN_ID", ""), restart_count()
    return dist.PrefixStore(f"dream_trainer/{run}/{attempt}/{world_size}/{_num_stores}", store)


def restart_count() -> int:
    """Number of restarts of the ranks by torchrun after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def keeps_store() -> bool:
    """Whether torchrun hosts the store, so that it outlives the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def end_with_launcher() -> None:
    """Get SIGTERM when torchrun exits, even by SIGKILL; this rank would live on otherwise."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def record_error(error: BaseException, summary: str, time_s: float) -> None:
    """Write this process's first error to torchrun's error file, for its report.

    Args:
        error: Its traceback is reported.
        summary: One line.
        time_s: Unix time in seconds. torchrun reports the earliest error as the root cause.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None or Path(path).exists():
        return
    text = "".join(traceback.format_exception(error))
    details = {"py_callstack": text, "timestamp": str(int(time_s))}
    report = json.dumps({"message": {"message": summary, "extraInfo": details}})
    with contextlib.suppress(OSError):  # the error itself is raised in any case
        Path(path).write_text(report)
