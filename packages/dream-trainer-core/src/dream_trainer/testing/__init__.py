"""For authors of callbacks: a tiny real trainer, ranks in a test, conformance checks."""

from dream_trainer.testing.conformance import check_callback
from dream_trainer.testing.device_copies import BlockingCopies
from dream_trainer.testing.processes import RankError, run_on_ranks
from dream_trainer.testing.trainers import TinyTrainer, tiny_config

__all__ = [
    "BlockingCopies",
    "RankError",
    "TinyTrainer",
    "check_callback",
    "run_on_ranks",
    "tiny_config",
]
