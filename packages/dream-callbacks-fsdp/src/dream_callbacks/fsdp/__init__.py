"""FSDP2: prefetching in the order in which modules really run."""

from dream_callbacks.fsdp.callback import OptimizeFSDP

__all__ = ["OptimizeFSDP"]
