"""Where the host waits for the device: found on CUDA by CUDA itself, on the CPU by what would wait.

On the CPU nothing waits, but the operations that would on a GPU can be seen on their way to the
kernels: reading a value (`.item()`, `float(x)`, `if x`), and whatever has an output whose shape
depends on values.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from traceback import FrameSummary
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dream_trainer.world import cpu_collectives

_TORCH = str(Path(torch.__file__).parent)

_HOST_SIDE = (
    *(str(Path(_TORCH, part)) for part in ("optim", "utils/data", "distributed")),
    str(cpu_collectives.__file__),
)
"""What keeps counters, seeds and flags on the CPU, whatever the device."""

_READS = "_local_scalar_dense"

_VALUE_DEPENDENT = (
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "unique",
    "unique2",
    "unique_consecutive",
    "unique_dim",
)

_INDEXING = ("index", "index_put", "index_put_")

_MESSAGE = "called a synchronizing"


@dataclass(frozen=True)
class HostSync:
    """A place where the host waits.

    Attributes:
        operation: What waits.
        stack: Lines outside of torch, outermost first.
    """

    operation: str
    stack: tuple[FrameSummary, ...]

    @property
    def place(self) -> str:
        """The innermost line outside of torch."""
        if not self.stack:
            return "inside of torch"
        frame = self.stack[-1]
        return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"


class SyncWatch(Protocol):
    """Collects what it sees from `start` to `stop`."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def take(self) -> list[HostSync]:
        """What was seen since the last time."""


class DispatchWatch(TorchDispatchMode):
    """Sees the operations that would wait if their tensors were on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._seen: list[HostSync] = []

    def start(self) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def take(self) -> list[HostSync]:
        seen, self._seen = self._seen, []
        return seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if _would_wait(name, args):
            frames = traceback.extract_stack()[:-1]
            if not _is_host_side(frames):
                operation = "reading a value" if name == _READS else name
                self._seen.append(HostSync(operation, _outside_of_torch(frames)))
        return func(*args, **(kwargs or {}))


class CudaWatch:
    """Lets CUDA warn whenever it waits, and keeps these warnings to itself."""

    def __init__(self) -> None:
        self._seen: list[HostSync] = []

    def start(self) -> None:
        self._mode_before = torch.cuda.get_sync_debug_mode()
        self._catching = warnings.catch_warnings()
        self._catching.__enter__()
        warnings.filterwarnings("always", message=_MESSAGE)
        self._show = warnings.showwarning
        warnings.showwarning = self._note  # undone by catch_warnings
        torch.cuda.set_sync_debug_mode("warn")

    def stop(self) -> None:
        torch.cuda.set_sync_debug_mode(self._mode_before)
        self._catching.__exit__(None, None, None)

    def take(self) -> list[HostSync]:
        seen, self._seen = self._seen, []
        return seen

    def _note(self, message: Any, *args: Any, **kwargs: Any) -> None:
        if _MESSAGE in str(message):
            frames = traceback.extract_stack()[:-1]
            self._seen.append(HostSync("a CUDA operation", _outside_of_torch(frames)))
        else:
            self._show(message, *args, **kwargs)


def _would_wait(name: str, args: tuple[Any, ...]) -> bool:
    if name == _READS or name.lstrip("_") in _VALUE_DEPENDENT:
        return True
    if name == "repeat_interleave":
        return len(args) == 1  # without the size of its output
    if name in _INDEXING:
        return any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        )
    return False


def _is_host_side(frames: Sequence[FrameSummary]) -> bool:
    """Whether the tensor would be on the CPU on a GPU machine too."""
    for frame in reversed(frames):
        if frame.filename.startswith(_HOST_SIDE):
            return True
        if not frame.filename.startswith(_TORCH):
            return False
    return False


def _outside_of_torch(frames: Iterable[FrameSummary]) -> tuple[FrameSummary, ...]:
    return tuple(
        frame
        for frame in frames
        if not frame.filename.startswith(_TORCH) and frame.filename != __file__
    )
