"""Detection of host–device syncs: by CUDA itself, or on the CPU by operations that would sync.

On the CPU nothing syncs, but a dispatch mode sees the operations that would sync on a GPU: reading
a value (`.item()`, `float(x)`, `if x`), and operations whose output shape depends on values.
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
"""Code that keeps counters, seeds and flags on the CPU, whatever the device."""

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
    """A host–device sync.

    Attributes:
        operation: Name of the operation that syncs.
        stack: Frames outside torch, outermost first.
    """

    operation: str
    stack: tuple[FrameSummary, ...]

    @property
    def place(self) -> str:
        """The innermost line outside torch."""
        if not self.stack:
            return "inside torch"
        frame = self.stack[-1]
        return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"


class SyncWatch(Protocol):
    """Collects syncs from `start` to `stop`."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def take(self) -> list[HostSync]:
        """Syncs since the last call."""


class DispatchWatch(TorchDispatchMode):
    """Detects operations that would sync if their tensors were on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._syncs: list[HostSync] = []

    def start(self) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def take(self) -> list[HostSync]:
        syncs, self._syncs = self._syncs, []
        return syncs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if _would_wait(name, args):
            frames = traceback.extract_stack()[:-1]
            if not _is_host_side(frames):
                operation = "reading a value" if name == _READS else name
                self._syncs.append(HostSync(operation, _user_frames(frames)))
        return func(*args, **(kwargs or {}))


class CudaWatch:
    """Detects syncs by torch's sync debug mode, without showing its warnings."""

    def __init__(self) -> None:
        self._syncs: list[HostSync] = []

    def start(self) -> None:
        self._mode_before = torch.cuda.get_sync_debug_mode()
        self._catching = warnings.catch_warnings()
        self._catching.__enter__()
        warnings.filterwarnings("always", message=_MESSAGE)
        self._show = warnings.showwarning
        warnings.showwarning = self._record  # undone by catch_warnings
        torch.cuda.set_sync_debug_mode("warn")

    def stop(self) -> None:
        torch.cuda.set_sync_debug_mode(self._mode_before)
        self._catching.__exit__(None, None, None)

    def take(self) -> list[HostSync]:
        syncs, self._syncs = self._syncs, []
        return syncs

    def _record(self, message: Any, *args: Any, **kwargs: Any) -> None:
        if _MESSAGE in str(message):
            frames = traceback.extract_stack()[:-1]
            self._syncs.append(HostSync("a CUDA operation", _user_frames(frames)))
        else:
            self._show(message, *args, **kwargs)


def _would_wait(name: str, args: tuple[Any, ...]) -> bool:
    if name == _READS or name.lstrip("_") in _VALUE_DEPENDENT:
        return True
    if name == "repeat_interleave":
        return len(args) == 1  # without output_size
    if name in _INDEXING:
        return any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        )
    return False


def _is_host_side(frames: Sequence[FrameSummary]) -> bool:
    """Whether the tensor would be on the CPU in a GPU run too."""
    for frame in reversed(frames):
        if frame.filename.startswith(_HOST_SIDE):
            return True
        if not frame.filename.startswith(_TORCH):
            return False
    return False


def _user_frames(frames: Iterable[FrameSummary]) -> tuple[FrameSummary, ...]:
    return tuple(
        frame
        for frame in frames
        if not frame.filename.startswith(_TORCH) and frame.filename != __file__
    )
