"""Callbacks that `prove` adds to a run: Recorder and Killer."""

from __future__ import annotations

import ctypes
import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, cast

from torch import Tensor

from dream_callbacks.checkpoint.callback import CheckpointCallback
from dream_callbacks.checkpoint.errors import CheckpointError
from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.format.state_codec import encode
from dream_trainer.callbacks import Callback
from dream_trainer.trainer import BaseTrainer

KillIn: TypeAlias = Literal["step", "validation"]

KINDS = ("loaded", "batch", "result", "state", "validation")
"""Kinds of records, in the order in which they occur."""

LOADED = ("models.", "optimizers.")
"""Prefixes of values that must be restored before the first step."""

_LEFT_OUT = ("dataloaders.", "trainer.callbacks.CheckpointCallback")
"""Loader states have no common form; the batches show the position in the data."""

_DURABLE_WITHIN_S = 30.0


class Recorder(Callback[BaseTrainer]):
    """Records digests of everything that must be equal between two runs.

    Args:
        path: JSON lines file; gets a line per batch, result, state and validation.
        resumed_at: Step at which the run must resume; 0 for a new run.
    """

    after: ClassVar = {Callback}

    def __init__(self, path: Path, resumed_at: int = 0) -> None:
        self.path = path
        self.resumed_at = resumed_at

    def pre_fit(self) -> None:
        self.path.unlink(missing_ok=True)
        step = self.trainer.global_step
        if step != self.resumed_at:
            raise CheckpointError(
                f"the run should have gone on at step {self.resumed_at} and did at step {step}"
            )
        if self.resumed_at:
            state = self._state()
            self._write("loaded", {k: v for k, v in state.items() if k.startswith(LOADED)})

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        self._write("batch", dict(_digests(batch, "batch")))

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self._write("result", dict(_digests(result, "result")))
        if not self.trainer.is_accumulating_gradients:
            self._write("state", self._state())

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self._write("validation", dict(_digests(result, "result")))

    def _state(self) -> dict[str, str]:
        parts = encode(self.trainer.state_dict(), self.trainer.world.rank)
        values = {**dict(_digests(parts.tensors, "")), **dict(_leaves(parts.shared, ""))}
        for name, document in parts.local.items():
            values |= dict(_leaves(document, name))
        return {name: v for name, v in values.items() if not name.startswith(_LEFT_OUT)}

    def _write(self, kind: str, values: Mapping[str, str]) -> None:
        counters = self.trainer.counters
        place = [counters.global_step, counters.local_batches]
        line = json.dumps({"kind": kind, "place": place, "values": values}) + "\n"
        # One unbuffered write: the process may be killed.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


class Killer(Callback[BaseTrainer]):
    """Kills its process once the checkpoint of a step is durable and all ranks have reached it.

    Args:
        step: The step.
        kill_in: Kill in the next "step" or the next "validation".
        mark: File to create before the kill.
    """

    def __init__(self, step: int, kill_in: KillIn, mark: Path) -> None:
        self.step = step
        self.kill_in = kill_in
        self.mark = mark

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        if self.kill_in == "step" and self.trainer.global_step == self.step:
            self._kill()

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if self.kill_in == "validation" and self.trainer.global_step == self.step:
            self._kill()

    def _kill(self) -> None:
        # The first kill ends the other ranks, which must have recorded their last step.
        self.trainer.world.barrier()
        (callback,) = [
            c
            for c in self.trainer.callbacks.values()
            if isinstance(c, CheckpointCallback) and c.parameters.enable
        ]
        folder = Path(callback.directory, file_names.checkpoint_name(self.step))
        deadline = time.monotonic() + _DURABLE_WITHIN_S
        while not folder.is_dir():
            if time.monotonic() > deadline:
                raise CheckpointError(f"{folder} wasn't saved; `every` must be due at that step")
            time.sleep(0.01)
        self.mark.touch()
        for worker in multiprocessing.active_children():
            worker.kill()  # loader workers would take seconds to notice
        os.kill(os.getpid(), signal.SIGKILL)


# Digests


def _digests(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Digest of each tensor and other leaf of a value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _digests(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _digests(item, f"{name}.{index}")
    else:
        yield name, _digest(value)


def _digest(value: Any) -> str:
    if not isinstance(value, Tensor):
        return _hash(repr(value).encode())
    local = cast("Tensor", value.to_local() if hasattr(value, "to_local") else value)
    flat = local.detach().cpu().contiguous().reshape(-1)
    kind = f"{local.dtype} {tuple(local.shape)} "
    return _hash(kind.encode() + ctypes.string_at(flat.data_ptr(), flat.nbytes))


def _leaves(document: Any, name: str) -> Iterator[tuple[str, str]]:
    """Digest of each value in the JSON of a state, without tensors."""
    if isinstance(document, dict) and not any(key.startswith("$") for key in document):
        for key, item in document.items():
            yield from _leaves(item, f"{name}.{key}" if name else key)
    elif not (isinstance(document, dict) and {"$tensor", "$rank_local"} & set(document)):
        yield name, _hash(json.dumps(document).encode())


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
