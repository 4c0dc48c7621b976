"""Prefetch lists of one FSDP root: computed from a trace, applied, removed, displayed."""

from __future__ import annotations

from dream_callbacks.fsdp import torch_private
from dream_callbacks.fsdp.execution_order import Trace
from dream_callbacks.fsdp.prefetch import backward_lists, forward_lists


class PrefetchLists:
    """The modules that each module below a root prefetches.

    Args:
        trace: Trace of training batches.
        depth: How many modules ahead.

    Attributes:
        forward: Names of modules to prefetch, by name of the prefetching module.
        backward: The same for backward; an empty list if nothing is left to gather.
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
        """Enable prefetching in forward; costs 1 µs per module."""
        for module, others in self._in_forward:
            module.set_modules_to_forward_prefetch(others)

    def stop_in_forward(self) -> None:
        """Disable prefetching in forward."""
        for module, _ in self._in_forward:
            module.set_modules_to_forward_prefetch([])

    def use_in_backward(self) -> None:
        """Enable prefetching in backward."""
        modules = self.trace.root.modules
        for name, others in self.backward.items():
            # With an empty list, torch chooses itself and may gather modules that backward
            # doesn't reach. The module itself is already gathered, so this prefetches nothing.
            names = others or (name,)
            modules[name].set_modules_to_backward_prefetch([modules[other] for other in names])

    def gather_asynchronously(self) -> None:
        """Make prefetches on the CPU asynchronous; by default they block on the all-gather."""
        # Otherwise prefetching on gloo has no benefit.
        torch_private.unshard_asynchronously(self.trace.root.modules[""])

    def __str__(self) -> str:
        root, events = self.trace.root, self.trace.events
        lines = [f"FSDP modules of {root.name}, in order of execution"]
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
