"""torch.distributed as the trainer sees it: ranks, device, mesh, collectives, seeds, failure."""

from dream_trainer.world.failure import Failure, RemoteError
from dream_trainer.world.simulated import SimulatedWorld
from dream_trainer.world.world import World

__all__ = ["Failure", "RemoteError", "SimulatedWorld", "World"]
