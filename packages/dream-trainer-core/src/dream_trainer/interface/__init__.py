"""The interface between callbacks and trainers: AbstractTrainer, and intersections of types."""
