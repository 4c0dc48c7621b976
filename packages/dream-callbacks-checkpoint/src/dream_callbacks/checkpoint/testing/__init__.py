"""`prove`: compare a run that is killed and resumed with one that never stops."""

from dream_callbacks.checkpoint.testing.resume_equivalence import Difference, Proof, prove

__all__ = ["Difference", "Proof", "prove"]
