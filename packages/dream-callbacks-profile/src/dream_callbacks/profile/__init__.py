"""Profiling: traces, benchmarks, graph breaks, host syncs, callback costs, memory snapshots."""

from dream_callbacks.profile.benchmark import BenchmarkCallback, BenchmarkResult
from dream_callbacks.profile.callback import ProfileCallback
from dream_callbacks.profile.costs import CallbackCostCallback, Cost
from dream_callbacks.profile.graph_breaks import FindGraphBreaksCallback
from dream_callbacks.profile.host_syncs import FindHostSyncsCallback
from dream_callbacks.profile.memory import MemorySnapshotCallback

__all__ = [
    "BenchmarkCallback",
    "BenchmarkResult",
    "CallbackCostCallback",
    "Cost",
    "FindGraphBreaksCallback",
    "FindHostSyncsCallback",
    "MemorySnapshotCallback",
    "ProfileCallback",
]
