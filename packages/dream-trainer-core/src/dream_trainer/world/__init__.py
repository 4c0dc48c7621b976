"""torch.distributed as the trainer sees it: ranks, device, mesh, collectives, random state."""

from dream_trainer.world.world import World

__all__ = ["World"]
