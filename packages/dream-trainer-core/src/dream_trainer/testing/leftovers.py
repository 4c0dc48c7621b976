"""Leftovers of a run in its process: open files, threads, signal handlers, patches, …"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dream_trainer.trainer.base import BaseTrainer
from dream_trainer.world.torch_private import MODULE_HOOKS

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


class Leftovers:
    """Finds what was added to this process since it was constructed."""

    def __init__(self) -> None:
        self._before = _things()

    def found(self, *, wait_s: float = 3.0) -> list[str]:
        """Descriptions of what was added or changed.

        Args:
            wait_s: Seconds that threads may take to end.
        """
        deadline = time.monotonic() + wait_s
        while found := _more(self._before, _things()):
            gc.collect()
            if time.monotonic() > deadline:
                return found
            time.sleep(0.02)
        return []


def patches_of(trainer: BaseTrainer) -> Counter[str]:
    """Patches of a trainer and its models: replaced methods, registered hooks."""
    found = Counter(
        f"trainer.{name}, which was replaced"
        for name in vars(trainer)
        if callable(getattr(type(trainer), name, None))
    )
    for model_name, model in trainer.named_models().items():
        for name, module in model.named_modules():
            where = f"{model_name}.{name}" if name else model_name
            for kind in MODULE_HOOKS:
                found[f"a hook in {where}.{kind}"] += len(vars(module).get(kind, ()))
            if not isinstance(vars(module).get("forward"), (type(None), nn.Module)):
                found[f"{where}.forward, which was replaced"] += 1
    return +found


@contextlib.contextmanager
def unclosed_resources() -> Iterator[list[str]]:
    """Names of the files and sockets that are freed inside without being closed."""
    found: list[str] = []
    before = sys.unraisablehook

    def note(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, ResourceWarning):
            found.append(str(unraisable.exc_value))
        else:
            before(unraisable)

    sys.unraisablehook = note
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            yield found
            gc.collect()
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def quick_collections() -> Iterator[None]:
    """Inside, gc.collect() skips objects from before; torch alone has a million."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def random_numbers() -> tuple[Any, ...]:
    """State of the random number generators, for comparison."""
    return random.getstate(), torch.get_rng_state().tolist()


def _things() -> Counter[tuple[str, str]]:
    things = Counter(("the thread", thread.name) for thread in threading.enumerate())
    things.update(("the open file", target) for target in _open_files())
    things.update(("the environment variable", f"{k}={v}") for k, v in os.environ.items())
    for name in (name for name in _SIGNALS if hasattr(signal, name)):
        things["the signal handler", f"{name}: {signal.getsignal(getattr(signal, name))}"] += 1
    for name in ("stdout", "stderr", "excepthook", "displayhook"):
        things["the changed", f"sys.{name}: {getattr(sys, name)!r}"] += 1
    things.update(("the log handler", repr(handler)) for handler in logging.getLogger().handlers)
    things["the changed", f"working directory: {Path.cwd()}"] += 1
    things["the changed", f"torch.is_grad_enabled(): {torch.is_grad_enabled()}"] += 1
    things["the changed", f"torch.get_default_dtype(): {torch.get_default_dtype()}"] += 1
    things["the changed", f"torch.get_num_threads(): {torch.get_num_threads()}"] += 1
    things["the changed", f"torch.is_anomaly_enabled(): {torch.is_anomaly_enabled()}"] += 1
    return things


def _open_files() -> Iterator[str]:
    folder = Path("/proc/self/fd")
    for descriptor in folder.iterdir() if folder.exists() else ():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            target = str(descriptor.readlink())
            is_numbered = target.startswith(("socket:", "pipe:"))
            yield target.partition(":")[0] if is_numbered else target


def _more(before: Counter[tuple[str, str]], after: Counter[tuple[str, str]]) -> list[str]:
    return sorted(f"{kind} {what}" for kind, what in after - before)
