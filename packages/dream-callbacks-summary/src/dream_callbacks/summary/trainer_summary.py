"""TrainerSummary: what is about to be trained, on what, and with what."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dream_callbacks.summary.console import write
from dream_callbacks.summary.model_summary import checked_depth, model_table
from dream_callbacks.summary.run_facts import facts_of
from dream_trainer.callbacks import RankZeroCallback
from dream_trainer.trainer import BaseTrainer


class TrainerSummary(RankZeroCallback[BaseTrainer]):
    """Prints what a run consists of, once it is set up.

    The run and its directory, device, layout and precision, how long it trains and on what,
    optimizers, schedulers, the callbacks with the hooks that they run in, and the models as
    ModelSummary shows them. Comes after a checkpoint is restored, to say where the run goes on.
    No collectives.

    Args:
        depth: Levels of modules to show below each model; 0 shows the models alone.

    Raises:
        ValueError: If `depth` isn't a whole number of at least 0.
    """

    after = frozenset({"CheckpointCallback", "LoadPartialCheckpointCallback"})

    def __init__(self, depth: int = 1) -> None:
        self.depth = checked_depth(depth)

    def post_setup(self) -> None:
        trainer = self.trainer
        facts = Table.grid(padding=(0, 2, 0, 0))
        facts.add_column(style="dim", no_wrap=True)
        facts.add_column()
        for name, lines in facts_of(trainer).items():
            facts.add_row(Text(name), Text("\n".join(lines)))
        models = model_table(
            trainer.named_models(), self.depth, is_distributed=trainer.world.is_distributed
        )
        write(Group(facts, Text(), models, Text()))
