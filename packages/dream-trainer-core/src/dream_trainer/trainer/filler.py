"""Filler steps: a rank that has no batch left joins the collectives of those that have one.

A sharded model gathers its parameters in each forward, on all ranks. So a rank without a batch
runs the step on one that it has had before, or on another rank's, and nothing remains of it: no
result, and no change of metrics, buffers, random numbers and the trainer's attributes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from dream_trainer.trainer.device_transfer import moved_to
from dream_trainer.trainer.evaluation_sets import NO_BATCH, Round
from dream_trainer.world.determinism import random_state_kept

if TYPE_CHECKING:
    from collections.abc import Callable

    from dream_trainer.trainer.base import BaseTrainer
    from dream_trainer.world.world import World

_LARGEST_ACCUMULATOR = 2**20
"""Elements of a tensor attribute up to which it is restored; larger ones are taken to be data."""


class Filler:
    """The filler steps of a rank in one evaluation set. Leave it before metrics are computed.

    Args:
        trainer: The trainer that evaluates.
    """

    def __init__(self, trainer: BaseTrainer) -> None:
        self._trainer = trainer
        self._batch = NO_BATCH
        self._metrics = ExitStack()
        self._has_begun = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._metrics.close()

    def exchange(self, batch: Any, first: Round | None) -> None:
        """Keep a batch, or, in the first round, get one if this rank has none.

        Collective in the first round, if a rank has no batch in it: the only time that batches are
        sent.

        Args:
            batch: As the step gets it; NO_BATCH without one.
            first: The first round; None in later ones.
        """
        world = self._trainer.world
        if batch is not NO_BATCH:
            self._batch = _fresh(batch)  # the step may change its containers
        if first is None or first.is_full:
            return
        sent = _on_host(batch, world) if world.rank == first.source else None
        try:
            received = world.broadcast_object(sent, first.source)
        except Exception as error:
            error.add_note(
                "a rank has no validation batch, and needs a copy of one to take part in "
                "collectives of the model; batches must be picklable for that"
            )
            raise
        if batch is NO_BATCH:
            self._batch = received

    def step(self, run: Callable[[Any], object]) -> None:
        """Run a step on the kept batch, without a trace."""
        if not self._has_begun:
            self._has_begun = True
            self._metrics.enter_context(_metrics_kept(self._trainer))
        batch = _fresh(moved_to(self._trainer.world.device, self._batch))
        with (
            random_state_kept(),
            _buffers_kept(self._trainer.named_models()),
            _attributes_kept(self._trainer),
        ):
            run(batch)


def _on_host(batch: Any, world: World) -> Any:
    """A copy of a batch in host memory."""
    moved = moved_to(torch.device("cpu"), batch)
    if world.device.type != "cpu":
        torch.accelerator.synchronize(world.device)  # it may be on its way
    return _fresh(moved, clones=True)


def _fresh(batch: Any, *, clones: bool = False) -> Any:
    """The batch in new containers; with `clones`, of new tensors without unused memory."""
    if isinstance(batch, Tensor):
        return batch.clone() if clones else batch
    if isinstance(batch, tuple):
        return getattr(batch, "_make", type(batch))(_fresh(item, clones=clones) for item in batch)
    if isinstance(batch, MutableMapping):
        fresh = copy.copy(batch)
        for key, item in batch.items():
            fresh[key] = _fresh(item, clones=clones)
        return fresh
    if isinstance(batch, list):
        return [_fresh(item, clones=clones) for item in batch]
    return copy.copy(batch) if dataclasses.is_dataclass(batch) else batch


@contextmanager
def _buffers_kept(models: Mapping[str, nn.Module]) -> Iterator[None]:
    kept = [
        (module, name, buffer, buffer.clone())
        for model in models.values()
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    yield
    for module, name, buffer, value in kept:
        buffer.copy_(value)
        setattr(module, name, buffer)


@contextmanager
def _metrics_kept(trainer: BaseTrainer) -> Iterator[None]:
    """Restore the attributes of all metrics, and of modules in them."""
    metrics = trainer.named_metrics().values()
    owners = {
        id(part): part
        for metric in metrics
        for part in (metric.modules() if isinstance(metric, nn.Module) else [metric])
    }
    shared: dict[int, Any] = {**owners, id(trainer): trainer, id(trainer.world): trainer.world}
    models = [*trainer.named_models().values(), *owners.values()]
    shared |= {
        id(each): each
        for model in models
        if isinstance(model, nn.Module)
        for each in (*model.modules(), *model.parameters())
    }
    kept = [(part, _copies(vars(part), shared)) for part in owners.values()]
    yield
    for part, attributes in kept:
        vars(part).clear()
        vars(part).update(attributes)


def _copies(attributes: Mapping[str, Any], shared: dict[int, Any]) -> dict[str, Any]:
    copies = {}
    for name, value in attributes.items():
        try:
            copies[name] = copy.deepcopy(value, shared)
        except (TypeError, RuntimeError):  # such as a process group: no state
            copies[name] = value
    return copies


@contextmanager
def _attributes_kept(trainer: BaseTrainer) -> Iterator[None]:
    """Restore a trainer's attributes: their values, the contents of containers, small tensors.

    A step may count or collect something there.
    """
    kept = [(container, copy.copy(container)) for container in _containers(vars(trainer))]
    tensors = [
        (value, value.clone())
        for value in vars(trainer).values()
        if type(value) is Tensor and value.numel() <= _LARGEST_ACCUMULATOR
    ]
    yield
    for container, contents in kept:
        if isinstance(container, dict):
            for key in container.keys() - contents.keys():
                del container[key]
            container.update(contents)
        elif isinstance(container, set):
            container.intersection_update(contents)
            container.update(contents)
        else:
            container.clear()
            container.extend(contents)
    for tensor, value in tensors:
        tensor.copy_(value)


def _containers(root: dict[str, Any]) -> Iterator[Any]:
    """Lists, dicts, sets and deques that are reachable through each other, each once."""
    seen = {id(root)}
    pending: list[Any] = [root]
    while pending:
        container = pending.pop()
        yield container
        for value in container.values() if isinstance(container, dict) else container:
            if isinstance(value, (list, dict, set, deque)) and id(value) not in seen:
                seen.add(id(value))
                pending.append(value)
