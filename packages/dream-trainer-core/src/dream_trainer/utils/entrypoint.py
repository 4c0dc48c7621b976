"""Import path of `entrypoint` in dream-trainer 1.x."""

from dream_trainer.entrypoint import entrypoint as entrypoint
