"""FindGraphBreaksCallback: where, in which module and why torch.compile cuts the graph."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dream_callbacks.profile.break_report import entry, is_cut, module_names, summary
from dream_callbacks.profile.compilations import Compilation, CompileWatch
from dream_trainer.callbacks import Callback

logger = logging.getLogger(__name__)


class FindGraphBreaksCallback(Callback):
    """Writes down each graph break, each function left uncompiled and each recompilation.

    It watches the run's own compilations, in training and validation; nothing is reset, patched
    or run twice, and training goes on. Each entry names the module instance that was being
    called (`model.blocks.3`) and the user's lines. What is compiled for one instance serves the
    others of its class if its guards hold; these are listed with the entry. The first breaks are
    also logged, once, as a warning.

    Costs 1 µs per batch, and the import of dynamo in `pre_fit`. The file is written on global
    rank 0, from its own compilations; a later `fit` adds to it.

    Args:
        log_file: Where to write; a relative path lies in the run directory.
        skip: Optimizer steps at the beginning of each `fit` whose compilations are left out; to
            see only what is compiled after the first step, for example.
        fullgraph: Make graph breaks and functions left uncompiled an error, on each rank, at the
            end of the batch that had them.

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
        self._seen: list[Compilation] = []
        self._forget()

    @property
    def path(self) -> Path:
        """The file; it is there once something was compiled."""
        return self.trainer.run_dir / self.log_file

    # Hooks

    def pre_fit(self) -> None:
        self._forget()
        self._first_step = self.trainer.global_step
        self._names = module_names(self.trainer.named_models())
        self._watch = CompileWatch()
        self._watch.start()

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self._look(self.trainer.global_step + self.trainer.is_accumulating_gradients)

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self._look(self.trainer.global_step + 1)

    def post_fit(self) -> None:
        if self._watch is None:
            return
        self._write(self._take(self.trainer.global_step + 1))
        if self.trainer.world.is_global_zero:
            self._conclude()
        self._forget()

    # Inside

    def _look(self, step: int) -> None:
        """Report what was compiled in an optimizer step, numbered from 1."""
        new = self._take(step)
        self._write(new)
        if not any(map(is_cut, new)):
            return
        if self._num_warned_of == 0 and self.trainer.world.is_global_zero:
            self._warn(f"in step {step}")
        if self.fullgraph:
            entries = "\n".join(entry(c, self._seen, self._names) for c in new if is_cut(c))
            raise RuntimeError(
                f"{summary(new, self._names)}; fullgraph=True requires that nothing is cut: "
                f"change the code, or set fullgraph=False to go on\n{entries}"
            )

    def _take(self, step: int) -> list[Compilation]:
        new = [] if self._watch is None else self._watch.take()
        if self.skip and step - self._first_step <= self.skip:
            return []
        self._seen += new
        return new

    def _conclude(self) -> None:
        num_cut = sum(map(is_cut, self._seen))
        if not self._seen:
            logger.info(
                "nothing was compiled in this fit; call model.compile(), or set "
                "DeviceParameters(compile_model=True)"
            )
        elif num_cut == 0:
            logger.info("torch.compile: %s", summary(self._seen, self._names))
        elif num_cut > self._num_warned_of:
            self._warn("by the end of fit")

    def _warn(self, when: str) -> None:
        self._num_warned_of = sum(map(is_cut, self._seen))
        text = summary(self._seen, self._names)
        logger.warning("torch.compile, %s: %s; see %s", when, text, self.path)

    def _write(self, new: list[Compilation]) -> None:
        if not new or not self.trainer.world.is_global_zero:
            return
        title = f"# step {self.trainer.global_step}: {summary(new, self._names)}"
        if len(new) == len(self._seen):
            title = f"# {self.trainer.experiment}, torch {torch.__version__}\n{title}"
        entries = [
            entry(c, self._seen, self._names) for c in new if is_cut(c) or c.recompile_reason
        ]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n\n".join([title, *entries]) + "\n\n")
        except OSError as error:
            logger.error("graph breaks couldn't be written to %s: %s", self.path, error)

    def _forget(self) -> None:
        if self._watch is not None:
            self._watch.stop()
        self._watch = None
        self._names = {}
        self._seen = []
        self._first_step = 0
        self._num_warned_of = 0

    def __getstate__(self) -> dict[str, Any]:
        # A copy watches nothing, and doesn't take the models along.
        return super().__getstate__() | {"_watch": None, "_names": {}, "_seen": []}
