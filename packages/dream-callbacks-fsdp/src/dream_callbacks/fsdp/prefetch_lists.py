"""Prefetch lists of one FSDP root: made from a trace, put to work, taken back, shown."""

from __future__ import annotations

from dream_callbacks.fsdp.prefetch import backward_lists, forward_lists
from dream_callbacks.fsdp.trace import Trace


class PrefetchLists:
    """What each module below a root prefetches.

    Args:
        trace: Of training batches.
        depth: How many modules ahead.

    Attributes:
        forward: Names of modules to prefetch, by the name of the module that does so.
        backward: Likewise; an empty list where nothing is left to gather.
    """

    def __init__(self, trace: Trace, depth: int) -> None:
        self.trace = trace
        self.forward = forward_lists(trace.events, depth)
        self.backward = backward_lists(trace.events, depth, trace.kept)
        modules = trace.root.modules
        self._in_forward = [
            (modules[name], [modules[other] for other in others])
            for name, others in self.forward.items()
        ]

    def use_in_forward(self) -> None:
        """Prefetch in forward from now on; 1 µs per module."""
        for module, others in self._in_forward:
            module.set_modules_to_forward_prefetch(others)

    def stop_in_forward(self) -> None:
        """Prefetch nothing in forward any more."""
        for module, _ in self._in_forward:
            module.set_modules_to_forward_prefetch([])

    def use_in_backward(self) -> None:
        """Prefetch in backward from now on."""
        modules = self.trace.root.modules
        for name, others in self.backward.items():
            # To torch an empty list means its own choice, which would gather modules that
            # backward doesn't reach. The module itself is there already: nothing is gathered.
            names = others or (name,)
            modules[name].set_modules_to_backward_prefetch([modules[other] for other in names])

    def gather_asynchronously(self) -> None:
        """Let a prefetch on the CPU return before the all-gather is done; it blocks otherwise."""
        # Not public, but documented; without it prefetching on gloo gains nothing.
        switch = getattr(self.trace.root.modules[""], "_set_unshard_async_op", None)
        if switch is not None:
            switch(True)

    def __str__(self) -> str:
        root, events = self.trace.root, self.trace.events
        lines = [f"FSDP modules of {root.name}, in the order in which they run"]
        for phase, lists in (("forward", self.forward), ("backward", self.backward)):
            names = [event.module for event in events if event.phase == phase]
            width = max((len(root.full_name(name)) for name in names), default=0)
            lines += [
                f"  {phase:<8}  {root.full_name(name):<{width}}  prefetches "
                + (", ".join(map(root.full_name, lists.get(name, ()))) or "nothing")
                for name in names
            ]
        if self.trace.unused:
            lines.append(f"  not used  {', '.join(map(root.full_name, self.trace.unused))}")
        return "\n".join(lines)
