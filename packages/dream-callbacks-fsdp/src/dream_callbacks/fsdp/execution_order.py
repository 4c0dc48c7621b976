"""The order in which FSDP2 modules run, forward and backward, in one training batch.

FSDP2 logs when a module begins; for one batch a filter on its logger reads these records.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.distributed.fsdp import FSDPModule

from dream_callbacks.fsdp import torch_private
from dream_callbacks.fsdp.prefetch import Event


@dataclass(frozen=True)
class Root:
    """An outermost FSDP module, with the FSDP modules below it.

    Attributes:
        name: "model", or "model.encoder" if the model itself isn't sharded.
        modules: FSDP modules by name below the root; the root itself is "".
    """

    name: str
    modules: Mapping[str, FSDPModule]

    def full_name(self, name: str) -> str:
        """Name of a module below the trainer, without the names of wrappers."""
        parts = f"{self.name}.{name}".split(".")
        return ".".join(
            part for part in parts if part and part not in torch_private.WRAPPED_MODULE_NAMES
        )


def find_roots(models: Mapping[str, nn.Module]) -> list[Root]:
    """All outermost FSDP modules of some models."""
    roots: list[Root] = []
    for model_name, model in models.items():
        below: set[int] = set()
        for path, module in model.named_modules(prefix=model_name):
            if id(module) in below:
                continue
            inside = dict(module.named_modules())
            if isinstance(module, FSDPModule):
                modules = {n: inner for n, inner in inside.items() if isinstance(inner, FSDPModule)}
                below.update(map(id, inside.values()))
                roots.append(Root(path, modules))
    return roots


@dataclass(frozen=True)
class Trace:
    """The order of modules below one root in a batch.

    Attributes:
        root: The root.
        events: Forwards and backwards of modules below the root, in order.
        kept: Names of modules that were still unsharded when backward began.
        unused: Names of modules that shard parameters and didn't run.
    """

    root: Root
    events: Sequence[Event[str]]
    kept: frozenset[str]
    unused: Sequence[str]


class Tracer(logging.Filter):
    """Records the order from `start` to `stop`.

    Args:
        roots: Roots of the modules to record.
    """

    def __init__(self, roots: Sequence[Root]) -> None:
        super().__init__()
        self._roots = roots
        self._events: list[list[Event[str]]] = [[] for _ in roots]
        self._kept: list[frozenset[str] | None] = [None for _ in roots]
        self._seen: list[set[str]] = [set() for _ in roots]
        self._sharded = [
            {name: _parameter_of(module) for name, module in root.modules.items()} for root in roots
        ]
        self._logger = logging.getLogger(torch_private.FSDP_LOGGER)
        self._level_before: int | None = None

    def start(self) -> None:
        """Start recording."""
        self._level_before = self._logger.level
        self._level_of_others = self._logger.getEffectiveLevel()
        self._logger.addFilter(self)
        self._logger.setLevel(logging.DEBUG)

    def stop(self) -> list[Trace]:
        """Stop recording.

        Returns:
            A trace per root; a second call returns the same.
        """
        if self._level_before is not None:
            self._logger.setLevel(self._level_before)
            self._logger.removeFilter(self)
            self._level_before = None
        return [self._trace(place) for place in range(len(self._roots))]

    def filter(self, record: logging.LogRecord) -> bool:
        """Record a message; pass only records that would be logged without this filter."""
        logged = torch_private.logged_pass(record)
        if logged is not None:
            began, names = logged
            place = self._root_of(names[0])
            if place is not None:
                self._seen[place].update(names)
                self._record(place, began, names[0])  # the first stands for all sharded together
        return record.levelno >= self._level_of_others

    def _record(self, place: int, began: str, name: str) -> None:
        events = self._events[place]
        if began == "backward":
            event = Event[str]("backward", name)
            if self._kept[place] is None:
                self._kept[place] = self._unsharded(place)
        else:
            event = Event[str]("recompute" if torch_private.is_in_backward() else "forward", name)
        # Several parameter groups, or modules that share one, log the same event.
        if not events or events[-1] != event:
            events.append(event)

    def _trace(self, place: int) -> Trace:
        return Trace(
            root=self._roots[place],
            events=self._events[place],
            kept=self._kept[place] or frozenset(),
            unused=[
                name
                for name, parameter in self._sharded[place].items()
                if parameter is not None and name not in self._seen[place]
            ],
        )

    def _root_of(self, name: str) -> int | None:
        places = [place for place, root in enumerate(self._roots) if name in root.modules]
        if len(places) > 1:
            # Several roots have a module of this name; the one that logs is on the stack.
            found = torch_private.logging_module(
                [self._roots[place].modules[name] for place in places]
            )
            return None if found is None else places[found]
        return places[0] if places else None

    def _unsharded(self, place: int) -> frozenset[str]:
        return frozenset(
            name
            for name, module in self._roots[place].modules.items()
            if _parameter_of(module) is not self._sharded[place][name]
        )


def _parameter_of(module: FSDPModule) -> nn.Parameter | None:
    """A parameter that a module shards itself; another object while it is unsharded."""
    assert isinstance(module, nn.Module)
    pending: list[nn.Module] = [module]
    while pending:
        current = pending.pop()
        for parameter in current.parameters(recurse=False):
            return parameter
        pending += [child for child in current.children() if not isinstance(child, FSDPModule)]
    return None
