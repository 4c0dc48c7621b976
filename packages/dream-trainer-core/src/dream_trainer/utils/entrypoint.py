"""Where dream-trainer 1.x had `entrypoint`."""

from dream_trainer.entrypoint import entrypoint as entrypoint
