"""Weights without the rest of a run: load those of another run, export them to files."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from dream_callbacks.checkpoint.catalog import (
    Checkpoint,
    choose,
    directory_at,
    filesystem_at,
    read_catalog,
)
from dream_callbacks.checkpoint.errors import CheckpointError
from dream_callbacks.checkpoint.format.state_codec import encode
from dream_callbacks.checkpoint.io.filesystem import Filesystem, below, is_url
from dream_callbacks.checkpoint.io.local_filesystem import LocalFilesystem
from dream_callbacks.checkpoint.manager import coordination
from dream_callbacks.checkpoint.restore import SavedState
from dream_callbacks.checkpoint.retention import Choice, ResumeMode
from dream_trainer.callbacks import Callback
from dream_trainer.trainer import AbstractTrainer, Counters
from dream_trainer.trainer.mixins import ModelSetupMixin
from dream_trainer.world import Coordination

logger = logging.getLogger(__name__)

Format: TypeAlias = Literal["safetensors", "torch"]

_SUFFIXES: Mapping[Format, str] = {"safetensors": ".safetensors", "torch": ".pt"}


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
            *_named("not in the model, unused", self.unused),
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
        root, step = find_directory(self.trainer, self.path)
        choice = Choice(self.resume_mode if step is None else step, self.monitor, self.mode)
        _, self.report = load_weights_at(self.trainer, root, choice, verify=self.verify)


def find_directory(trainer: AbstractTrainer, path: str | Path) -> tuple[str | Path, int | None]:
    """`directory_at`, on rank 0 for all. Collective."""
    return coordination(trainer.world).on_rank_zero(lambda: directory_at(path))


def load_weights_at(
    trainer: AbstractTrainer, root: str | Path, choice: Choice, *, verify: bool
) -> tuple[Counters, PartialLoad]:
    """Load the weights of a checkpoint that match by name and shape. Collective.

    Args:
        trainer: The trainer with the models.
        root: A directory of checkpoints.
        choice: Which of them.
        verify: Compare checksums before loading; otherwise only sizes.

    Returns:
        The counters of the checkpoint, and what was loaded.

    Raises:
        CheckpointError: On all ranks, if there is none that is intact, or nothing matches.
    """
    ranks = coordination(trainer.world)
    filesystem = filesystem_at(root)
    with contextlib.ExitStack() as held:
        checkpoint = choose(
            filesystem,
            ranks.on_rank_zero(lambda: read_catalog(filesystem)),
            ranks,
            choice,
            verify=verify,
            held=held,
        )
        if checkpoint is None:
            raise CheckpointError(f"there is no checkpoint in {filesystem}; give another path")
        saved = ranks.each(lambda: SavedState(filesystem, checkpoint))
        report = _load(trainer, below(root, checkpoint.name), saved, ranks)
    counters = saved.shared["trainer"]["counters"]
    step, epoch = counters["global_step"], counters["current_epoch"]
    return Counters(global_step=step, current_epoch=epoch), report


def _load(
    trainer: AbstractTrainer, path: str | Path, saved: SavedState, ranks: Coordination
) -> PartialLoad:
    models = trainer.named_models()
    live = encode({"models": ranks.each(trainer.model_state_dict)}, ranks.rank).tensors
    names = _matching_names(saved, set(models))
    fits = {
        name: tensor
        for name, tensor in live.items()
        if name in names and saved.index[names[name]].shape == tensor.shape
    }
    report = PartialLoad(
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
            f"model like this one.\n{report}"
        )
    ranks.each_without_timeout(lambda: saved.read({names[name]: t for name, t in fits.items()}))
    ranks.each(lambda: _give(trainer, fits))
    if ranks.is_global_zero:
        logger.info("%s", report)
    return report


def _give(trainer: AbstractTrainer, tensors: dict[str, Tensor]) -> None:
    """Load tensors into the models, whose state dict may hold copies."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    for name, model in trainer.named_models().items():
        prefix = f"models.{name}."
        own: dict[str, Any] = {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
        if own:
            set_model_state_dict(model, own, options=StateDictOptions(strict=False))


class ExportCallback(Callback[ModelSetupMixin]):
    """Writes the models' weights at the end of the run, loadable into a plain `nn.Module`.

    Sharded weights are gathered; rank 0 writes. Collective; rank 0 needs host memory for a full
    model. Nothing is written after an error. Each file has a `<file>.sha256` for
    `sha256sum --check`.

    Args:
        path: A file, or a folder with one file per model. Relative to the run directory.
        format: "safetensors", or "torch" for `torch.load(weights_only=True)`.

    Raises:
        ValueError: If the format is unknown.
    """

    def __init__(self, path: str | Path, format: Format = "safetensors") -> None:  # noqa: A002  # the contract's name
        if format not in _SUFFIXES:
            raise ValueError(f'format={format!r}: "safetensors" or "torch" is required')
        _check_output(path)
        self.path = path
        self.format: Format = format

    def post_setup(self) -> None:
        if self.format == "safetensors":
            _safetensors()
        self._files()

    def post_fit(self) -> None:
        if self.trainer.exception is not None:
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        ranks = coordination(self.trainer.world)
        for name, path in self._files().items():
            model = self.trainer.named_models()[name]
            tensors: dict[str, Any] = get_model_state_dict(model, options=options)
            ranks.on_rank_zero(functools.partial(_write_weights, path, tensors, self.format))
            if ranks.is_global_zero:
                logger.info("exported %s", path)

    def _files(self) -> dict[str, Path]:
        return files_of(
            self.trainer.run_dir / self.path, tuple(self.trainer.named_models()), self.format
        )


def export_checkpoint(
    filesystem: Filesystem,
    checkpoint: Checkpoint,
    path: str | Path,
    kind: Format,
) -> list[Path]:
    """Write the weights of a verified checkpoint; needs no model.

    Returns:
        The files.

    Raises:
        CheckpointError: If the checkpoint has no models.
        ValueError: If there is no such path for them.
        ImportError: If safetensors is required and not installed.
    """
    _check_output(path)
    if kind == "safetensors":
        _safetensors()
    saved = SavedState(filesystem, checkpoint)
    models = tuple(saved.shared["models"])
    if not models:
        raise CheckpointError(f"{checkpoint.name} holds no model; choose another checkpoint")
    files = files_of(Path(path), models, kind)
    for name, file in files.items():
        prefix = f"models.{name}."
        tensors = {key: saved.new_tensor(key) for key in saved.index if key.startswith(prefix)}
        saved.read(tensors)
        _write_weights(file, {k.removeprefix(prefix): t for k, t in tensors.items()}, kind)
    return list(files.values())


def _check_output(path: str | Path) -> None:
    if is_url(path):
        raise ValueError(
            f"path={str(path)!r} is a URL, and weights are exported to files of this machine; "
            "give a path, and copy"
        )


def files_of(path: Path, models: tuple[str, ...], kind: Format) -> dict[str, Path]:
    """Output file of each model.

    Raises:
        ValueError: If several models would share one file, or a name would lead outside of the
            folder: names in a checkpoint are untrusted.
    """
    for name in models:
        if Path(name).name != name:
            raise ValueError(
                f"{name!r:.200} isn't the name of a model: its file would lie outside of {path}"
            )
    if not path.suffix:
        return {name: path / f"{name}{_SUFFIXES[kind]}" for name in models}
    if len(models) != 1:
        raise ValueError(
            f"path={str(path)!r} is one file, and there are {len(models)} models "
            f"({', '.join(models)}); give a folder, that is, a path without an ending"
        )
    return {models[0]: path}


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


def _write_weights(path: Path, tensors: Mapping[str, Tensor], kind: Format) -> None:
    """Write tensors to a file atomically, and its checksum file.

    Raises:
        ImportError: If safetensors is required and not installed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        # Tied weights are written under each name.
        if own.untyped_storage().data_ptr() in memory:
            own = own.clone()
        memory.add(own.untyped_storage().data_ptr())
        contiguous[name] = own
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if kind == "safetensors":
            _safetensors().save_file(contiguous, temporary, metadata={"format": "pt"})
        else:
            torch.save(contiguous, temporary)
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    path.with_name(f"{path.name}.sha256").write_text(f"{digest}  {path.name}\n")
    LocalFilesystem(path.parent).sync()


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        raise ImportError(
            "exporting as safetensors needs safetensors: "
            "pip install 'dream-callbacks-checkpoint[safetensors]'"
        ) from None
    return safetensors.torch
