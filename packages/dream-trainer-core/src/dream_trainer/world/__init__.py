"""torch.distributed as the trainer sees it: ranks, device, mesh, collectives, random state."""

from dream_trainer.world.failure import Failure, RemoteError
from dream_trainer.world.world import World

__all__ = ["Failure", "RemoteError", "World"]
