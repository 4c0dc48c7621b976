"""ModelSummary: prints the modules of the models with their sizes and placements."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text
from torch import nn

from dream_callbacks.summary.console import write
from dream_callbacks.summary.model_rows import Row, model_rows
from dream_trainer.callbacks import RankZeroCallback
from dream_trainer.trainer import AbstractTrainer


class ModelSummary(RankZeroCallback[AbstractTrainer]):
    """Prints a table of the models once they are set up.

    For each module down to `depth`: number of parameters over all ranks, number of trainable
    parameters, dtypes, placement (sharded or replicated), and the bytes of parameters and buffers
    on rank 0. Shared tensors count once. No forward pass, no collectives.

    Args:
        depth: Levels of modules to show below each model; 0 shows only the models.

    Raises:
        ValueError: If `depth` isn't a whole number of at least 0.
    """

    def __init__(self, depth: int = 1) -> None:
        self.depth = validate_depth(depth)

    def post_setup(self) -> None:
        trainer = self.trainer
        write(
            model_table(
                trainer.named_models(), self.depth, is_distributed=trainer.world.is_distributed
            )
        )


def validate_depth(depth: object) -> int:
    """Validate and return a depth.

    Raises:
        ValueError: If it isn't a whole number of at least 0.
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise ValueError(
            f"depth={depth!r}: a whole number of at least 0 is required; 0 shows only the models"
        )
    return depth


def model_table(models: Mapping[str, nn.Module], depth: int, *, is_distributed: bool) -> Table:
    """A table of the modules of some models.

    Args:
        models: Models by name.
        depth: Levels of modules to show below each model.
        is_distributed: Whether to show placements.
    """
    rows = list(model_rows(models, depth))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("module", no_wrap=True)
    table.add_column("type")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("trainable", justify="right", no_wrap=True)
    table.add_column("dtype")
    if is_distributed:
        table.add_column("placement")
    table.add_column("bytes per rank" if is_distributed else "bytes", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row, is_distributed=is_distributed), style=_style(row))
    return table


def _cells(row: Row, *, is_distributed: bool) -> list[Text]:
    tied = f", tied to {', '.join(row.tied_to)}" if row.tied_to else ""
    cells = [
        f"{'  ' * row.level}{row.name}",
        f"{row.kind}{tied}",
        f"{row.num_parameters:,}",
        _share(row.num_trainable, row.num_parameters),
        ", ".join(row.dtypes),
        *([", ".join(row.placements)] if is_distributed else []),
        num_bytes(row.num_bytes),
    ]
    return [Text(cell) for cell in cells]


def _style(row: Row) -> str:
    return "bold" if row.level == 0 else ""


def _share(part: int, whole: int) -> str:
    if not whole:
        return ""
    return {whole: "all", 0: "none"}.get(part, f"{part:,}")


def num_bytes(count: int) -> str:
    """Format a number of bytes as "12 B", "1.5 KiB", "2.3 GiB"."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:,.1f} {unit}"
