"""TrainerSummary: prints the run's configuration, callbacks and models."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dream_callbacks.summary.console import write
from dream_callbacks.summary.model_summary import model_table, validate_depth
from dream_callbacks.summary.run_facts import run_facts
from dream_trainer.callbacks import RankZeroCallback
from dream_trainer.trainer import BaseTrainer


class TrainerSummary(RankZeroCallback[BaseTrainer]):
    """Prints a summary of the run once it is set up.

    Shows the run and its directory, device, layout, precision, training and validation data,
    optimizers, schedulers, callbacks with their hooks, advice on settings that would make training
    faster or more exact at no cost, and the models as in ModelSummary. Runs
    after a checkpoint is restored, so that it shows the step at which the run resumes. No
    collectives.

    Args:
        depth: Levels of modules to show below each model; 0 shows only the models.

    Raises:
        ValueError: If `depth` isn't a whole number of at least 0.
    """

    after = frozenset({"CheckpointCallback", "LoadPartialCheckpointCallback"})

    def __init__(self, depth: int = 1) -> None:
        self.depth = validate_depth(depth)

    def post_setup(self) -> None:
        trainer = self.trainer
        facts = Table.grid(padding=(0, 2, 0, 0))
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column()
        for name, lines in run_facts(trainer).items():
            facts.add_row(Text(name), Text("\n".join(lines)))
        models = model_table(
            trainer.named_models(), self.depth, is_distributed=trainer.world.is_distributed
        )
        write(Group(facts, Text(), models, Text()))
