"""FSDP2: prefetching in the order of execution."""

from dream_callbacks.fsdp.callback import OptimizeFSDP

__all__ = ["OptimizeFSDP"]
