"""The layer on torch.distributed: ranks, mesh, collectives, requests, signals, failures."""

from dream_trainer.world.coordination import Coordination, RankFailure
from dream_trainer.world.faults.failure import Failure, RemoteError
from dream_trainer.world.requests import Request, Requests
from dream_trainer.world.signals import RUN_SIGNALS
from dream_trainer.world.simulated import SimulatedWorld
from dream_trainer.world.worker_signals import protected_workers
from dream_trainer.world.world import World

__all__ = [
    "RUN_SIGNALS",
    "Coordination",
    "Failure",
    "RankFailure",
    "RemoteError",
    "Request",
    "Requests",
    "SimulatedWorld",
    "World",
    "protected_workers",
]
