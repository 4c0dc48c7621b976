"""FindGraphBreaksCallback: reports torch.compile's graph breaks with module, line and reason."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dream_callbacks.profile.break_report import (
    format_entry,
    format_summary,
    has_break,
    module_names,
)
from dream_callbacks.profile.compilations import Compilation, CompileWatch
from dream_trainer.callbacks import Callback

logger = logging.getLogger(__name__)


class FindGraphBreaksCallback(Callback):
    """Writes each graph break, each function left uncompiled and each recompilation to a file.

    It observes the run's own compilations, in training and validation; nothing is reset, patched
    or run twice. Each entry has the name of the module instance that was called
    (`model.blocks.3`) and the user's lines. Code compiled for one instance is reused for others
    of its class if its guards hold; the entry lists them. The first breaks are also logged once,
    as a warning.

    Costs 1 µs per batch, and the import of dynamo in `pre_fit`. The file is written on global
    rank 0, from its own compilations; a later `fit` appends to it.

    Args:
        log_file: File to write; a relative path is relative to the run directory.
        skip: Optimizer steps at the beginning of each `fit` whose compilations are ignored, for
            example to see only recompilations.
        fullgraph: Raise an error for graph breaks and functions left uncompiled, on each rank, at
            the end of the batch.

    Raises:
        ValueError: If `skip` is below 0.
        RuntimeError: In training, with `fullgraph`.
    """

    def __init__(
        self, log_file: str | Path = "graph_breaks.log", skip: int = 0, fullgraph: bool = False
    ) -> None:
        if skip < 0:
            raise ValueError(f"skip={skip}: a number of optimizer steps, at least 0, is required")
        self.log_file = log_file
        self.skip = skip
        self.fullgraph = fullgraph
        self._watch: CompileWatch | None = None
        self._names: dict[nn.Module, str] = {}
        self._compilations: list[Compilation] = []
        self._reset()

    @property
    def path(self) -> Path:
        """Path of the file, which exists once something was compiled."""
        return self.trainer.run_dir / self.log_file

    # Hooks

    def pre_fit(self) -> None:
        self._reset()
        self._first_step = self.trainer.global_step
        self._names = module_names(self.trainer.named_models())
        self._watch = CompileWatch()
        self._watch.start()

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self._report_new(self.trainer.global_step + self.trainer.is_accumulating_gradients)

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self._report_new(self.trainer.global_step + 1)

    def post_fit(self) -> None:
        if self._watch is None:
            return
        self._write(self._take(self.trainer.global_step + 1))
        if self.trainer.world.is_global_zero:
            self._log_summary()
        self._reset()

    # Internals

    def _report_new(self, step: int) -> None:
        """Report new compilations of an optimizer step, numbered from 1."""
        new = self._take(step)
        self._write(new)
        if not any(map(has_break, new)):
            return
        if self._num_warned_of == 0 and self.trainer.world.is_global_zero:
            self._warn(f"in step {step}")
        if self.fullgraph:
            entries = "\n".join(
                format_entry(c, self._compilations, self._names) for c in new if has_break(c)
            )
            raise RuntimeError(
                f"{format_summary(new, self._names)}; fullgraph=True allows no graph break: "
                f"change the code, or set fullgraph=False to continue\n{entries}"
            )

    def _take(self, step: int) -> list[Compilation]:
        if self._watch is None:  # outside of fit
            return []
        new = self._watch.take()
        if self.skip and step - self._first_step <= self.skip:
            return []
        self._compilations += new
        return new

    def _log_summary(self) -> None:
        num_cut = sum(map(has_break, self._compilations))
        if not self._compilations:
            logger.info(
                "nothing was compiled in this fit; call model.compile(), or set "
                "DeviceParameters(compile_model=True)"
            )
        elif num_cut == 0:
            logger.info("torch.compile: %s", format_summary(self._compilations, self._names))
        elif num_cut > self._num_warned_of:
            self._warn("by the end of fit")

    def _warn(self, when: str) -> None:
        self._num_warned_of = sum(map(has_break, self._compilations))
        text = format_summary(self._compilations, self._names)
        logger.warning("torch.compile, %s: %s; see %s", when, text, self.path)

    def _write(self, new: list[Compilation]) -> None:
        if not new or not self.trainer.world.is_global_zero:
            return
        title = f"# step {self.trainer.global_step}: {format_summary(new, self._names)}"
        if len(new) == len(self._compilations):
            title = f"# {self.trainer.experiment}, torch {torch.__version__}\n{title}"
        entries = [
            format_entry(c, self._compilations, self._names)
            for c in new
            if has_break(c) or c.recompile_reason
        ]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n\n".join([title, *entries]) + "\n\n")
        except OSError as error:
            logger.error("graph breaks couldn't be written to %s: %s", self.path, error)

    def _reset(self) -> None:
        if self._watch is not None:
            self._watch.stop()
        self._watch = None
        self._names = {}
        self._compilations = []
        self._first_step = 0
        self._num_warned_of = 0

    def __getstate__(self) -> dict[str, Any]:
        # A copy watches nothing and must not copy the models.
        return super().__getstate__() | {"_watch": None, "_names": {}, "_compilations": []}
