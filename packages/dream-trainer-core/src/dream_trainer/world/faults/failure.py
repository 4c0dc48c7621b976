"""Failure: the first error of a run, as every rank reports it."""

from __future__ import annotations

import re
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

_LOST_CONNECTION = re.compile(
    r"gloo/transport|Connection (closed|reset|refused)|Broken pipe|ncclRemoteError"
    r"|communicator was aborted|Socket closed|socket error",
    re.IGNORECASE,
)

_TIMEOUT = re.compile(
    r"Timed out waiting|collective operation timeout|wait timeout after \d+ ?ms", re.IGNORECASE
)
"""Of gloo; of NCCL, where it blocks the main thread; of the store in which its ranks meet."""


@dataclass(frozen=True)
class Failure:
    """The first error of a run.

    Args:
        rank: The rank that failed.
        pid: Process id.
        host: Host name.
        what: The error and where it was raised, in one line.
        time_s: Unix time in seconds.
        is_on_all_ranks: Whether every rank raises the same error.
    """

    rank: int
    pid: int
    host: str
    what: str
    time_s: float
    is_on_all_ranks: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host}) {self.what}"


class RemoteError(RuntimeError):
    """Raised on a rank because another rank failed first, or an NCCL collective on the device.

    Attributes:
        failure: The failure.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


class Interruption(BaseException):
    """Raised in the main thread of a rank when another one, or the device of this one, fails.

    `fit` then raises a RemoteError.

    Not an Exception: torch (DTensor, torch.compile, futures), `logging` and user code catch
    those, and raise an error of their own or continue.

    Attributes:
        failure: The failure.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure

    def remote_error(self, error: BaseException) -> RemoteError:
        """The RemoteError to raise instead of the first error that left the loop after this.

        Args:
            error: This, or an error that other code raised from it. One that wraps this isn't
                shown, since its message reads as if this rank were at fault. Any other is the
                cause of the RemoteError.
        """
        remote = RemoteError(self.failure)
        if self in error_chain(error):
            remote.__traceback__ = self.__traceback__
            remote.__suppress_context__ = True
        else:
            remote.__cause__ = error
        return remote


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all causes and contexts that are reachable from it, each once."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        each = pending.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            yield each
            pending += (each.__context__, each.__cause__)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error may be a consequence of another rank's death."""
    return any(
        isinstance(each, dist.DistError)
        # Collectives raise RuntimeError; an OSError comes from a loader's worker.
        or (not isinstance(each, OSError) and _LOST_CONNECTION.search(str(each)) is not None)
        for each in error_chain(error)
    )


def is_timeout(error: BaseException) -> bool:
    """Whether a collective timed out waiting for another rank, or NCCL while it connected them."""
    return isinstance(error, RuntimeError) and _TIMEOUT.search(str(error)) is not None


def described(error: BaseException, step: int) -> str:
    """Where an error was raised, its type and its message, in one line."""
    text = " ".join(str(error).split())[:300]
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("raised in ")]
    if notes:
        place = re.sub(r" on rank \d+", "", notes[0].removeprefix("raised in "))
    else:
        place = _place(traceback.extract_tb(error.__traceback__))
    return f"{place}: {what}" if "at step" in place else f"{place} at step {step}: {what}"


_OURS = str(Path(__file__).parents[1])
_TORCHS = str(Path(torch.__file__).parent)
_PYTHONS = sysconfig.get_paths()["stdlib"]


def _place(stack: traceback.StackSummary) -> str:
    """The innermost frame of the user's code."""
    users = [each for each in stack if not each.filename.startswith((_OURS, _TORCHS, "<"))]
    if not stack:
        return "unknown code"
    frame = (users or stack)[-1]
    return f"{frame.name} ({Path(frame.filename).name}, line {frame.lineno})"


def place_of_main_thread() -> str:
    """The main thread's innermost frame, and the innermost outside of torch and Python."""
    ident = threading.main_thread().ident
    frame = sys._current_frames().get(ident or 0)  # noqa: SLF001  # documented, despite its name
    if frame is None:
        return "Python's shutdown"
    stack = [
        (
            each.f_code.co_filename,
            f"{each.f_code.co_name} ({Path(each.f_code.co_filename).name}, line {line})",
        )
        for each, line in traceback.walk_stack(frame)
    ]
    _, innermost = stack[0]
    caller = next(
        (place for name, place in stack if not name.startswith((_TORCHS, _PYTHONS, "<"))), innermost
    )
    return innermost if caller == innermost else f"{innermost}, called in {caller}"


def was_shown(failure: Failure) -> bool:
    """Whether the traceback that ended this process shows the failure in its last line."""
    error = getattr(sys, "last_value", None)
    if error is None:
        return False
    lines: tuple[str, ...] = (str(error), *getattr(error, "__notes__", ()))
    return lines[-1] == str(failure)
