"""LoadPartialCheckpointCallback: start with the weights of another run."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from dream_callbacks.checkpoint.catalog import choose, directory_at, read_catalog
from dream_callbacks.checkpoint.errors import CheckpointError
from dream_callbacks.checkpoint.format.state_codec import encode
from dream_callbacks.checkpoint.io.filesystem import below, filesystem_at
from dream_callbacks.checkpoint.manager import coordination
from dream_callbacks.checkpoint.restore import SavedState
from dream_callbacks.checkpoint.retention import ResumeMode
from dream_trainer.callbacks import Callback
from dream_trainer.trainer.mixins import ModelSetupMixin
from dream_trainer.world import Coordination

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartialLoad:
    """Report of a partial load; names such as "model.blocks.0.weight".

    Attributes:
        checkpoint: Path of the checkpoint.
        loaded: Tensors that were loaded.
        missing: Tensors of the trainer that aren't in the checkpoint.
        unused: Tensors of the checkpoint that aren't in the trainer.
        mismatched: Saved and live shape of tensors whose shapes differ, by name.
    """

    checkpoint: str | Path
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def __str__(self) -> str:
        lines = [
            f"{len(self.loaded)} tensors were loaded from {self.checkpoint}",
            *_named("not in the checkpoint, unchanged", self.missing),
            *_named("not in the trainer, unused", self.unused),
            *_named(
                "of another shape, unchanged",
                [f"{n} {list(was)} → {list(now)}" for n, (was, now) in self.mismatched.items()],
            ),
        ]
        return "\n".join(lines)


class LoadPartialCheckpointCallback(Callback[ModelSetupMixin]):
    """Loads only the weights of a checkpoint that match by name and shape.

    Counters, optimizers, schedulers and position in the data are not loaded: the run starts from
    step 0 with these weights, in any layout. Acts in `post_setup`, before other callbacks; a
    CheckpointCallback that resumes from a checkpoint of this run overwrites the weights. The source
    is verified, only read, and protected from deletion while it is read. `report` lists what was
    loaded and what wasn't.

    Args:
        path: A checkpoint, a directory of checkpoints, or a run directory; or a URL of one.
        resume_mode: Which checkpoint of a directory: "last", "best", "min", "max" or a step.
        monitor: Metric of "best", "min" and "max".
        mode: Whether "best" means low or high.
        verify: Compare checksums before loading; otherwise only sizes.
    """

    before: ClassVar = {Callback}

    report: PartialLoad | None = None

    def __init__(
        self,
        path: str | Path,
        resume_mode: ResumeMode = "last",
        *,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        verify: bool = True,
    ) -> None:
        self.path = path
        self.resume_mode = resume_mode
        self.monitor = monitor
        self.mode: Literal["min", "max"] = mode
        self.verify = verify

    def post_setup(self) -> None:
        ranks = coordination(self.trainer.world)
        root, step = ranks.on_rank_zero(lambda: directory_at(self.path))
        filesystem = filesystem_at(root)
        with contextlib.ExitStack() as held:
            checkpoint = choose(
                filesystem,
                ranks.on_rank_zero(lambda: read_catalog(filesystem)),
                ranks,
                self.resume_mode if step is None else step,
                self.monitor,
                self.mode,
                verify=self.verify,
                held=held,
            )
            if checkpoint is None:
                raise CheckpointError(f"there is no checkpoint in {filesystem}; give another path")
            saved = ranks.each(lambda: SavedState(filesystem, checkpoint))
            self._load(below(root, checkpoint.name), saved, ranks)

    def _load(self, path: str | Path, saved: SavedState, ranks: Coordination) -> None:
        models = self.trainer.named_models()
        live = encode({"models": ranks.each(self.trainer.model_state_dict)}, ranks.rank).tensors
        names = _matching_names(saved, set(models))
        fits = {
            name: tensor
            for name, tensor in live.items()
            if name in names and saved.index[names[name]].shape == tensor.shape
        }
        self.report = PartialLoad(
            path,
            tuple(sorted(map(_short, fits))),
            tuple(sorted(_short(name) for name in live if name not in names)),
            tuple(sorted(_short(there) for here, there in names.items() if here not in live)),
            {
                _short(name): (tuple(saved.index[names[name]].shape), tuple(tensor.shape))
                for name, tensor in sorted(live.items())
                if name in names and name not in fits
            },
        )
        if not fits:
            raise CheckpointError(
                f"nothing in {path} matches the trainer; give a checkpoint of a "
                f"model like this one.\n{self.report}"
            )
        ranks.each_without_timeout(lambda: saved.read({names[name]: t for name, t in fits.items()}))
        ranks.each(lambda: self._give(fits))
        if ranks.is_global_zero:
            logger.info("%s", self.report)

    def _give(self, tensors: dict[str, Tensor]) -> None:
        """Load tensors into the models, whose state dict may hold copies."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        for name, model in self.trainer.named_models().items():
            prefix = f"models.{name}."
            own: dict[str, Any] = {
                key.removeprefix(prefix): tensor
                for key, tensor in tensors.items()
                if key.startswith(prefix)
            }
            if own:
                set_model_state_dict(model, own, options=StateDictOptions(strict=False))


def _matching_names(saved: SavedState, models: set[str]) -> dict[str, str]:
    """Saved names of weights, by their names in the trainer.

    If both have a single model, its name may differ.
    """
    names = [name for name in saved.index if name.startswith("models.")]
    there = set(saved.shared["models"])
    if len(models) == len(there) == 1:
        (now,), (then,) = models, there
        return {f"models.{now}.{name.removeprefix(f'models.{then}.')}": name for name in names}
    return {name: name for name in names}


def _short(name: str) -> str:
    return name.removeprefix("models.")


def _named(what: str, names: Any) -> list[str]:
    return [f"  {what}: {', '.join(names)}"] if names else []
