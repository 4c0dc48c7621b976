"""ExportCallback: unsharded weights, one file per model, with a checksum file."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from dream_callbacks.checkpoint.catalog import Checkpoint
from dream_callbacks.checkpoint.errors import CheckpointError
from dream_callbacks.checkpoint.io.filesystem import Filesystem, is_url
from dream_callbacks.checkpoint.io.local_filesystem import LocalFilesystem
from dream_callbacks.checkpoint.manager import coordination
from dream_trainer.callbacks import Callback
from dream_trainer.trainer.mixins import ModelSetupMixin

logger = logging.getLogger(__name__)

Format: TypeAlias = Literal["safetensors", "torch"]

_SUFFIXES: Mapping[Format, str] = {"safetensors": ".safetensors", "torch": ".pt"}


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
        if is_url(path):
            raise ValueError(
                f"path={str(path)!r} is a URL, and weights are exported to files of this machine; "
                "give a path, and copy"
            )
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


def _write_weights(path: Path, tensors: Mapping[str, Tensor], kind: Format) -> None:
    """Write tensors to a file atomically, and its checksum file.

    Raises:
        ImportError: If safetensors is required and not installed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        # Tied weights are written under each name.
        if own.untyped_storage().data_ptr() in memory:
            own = own.clone()
        memory.add(own.untyped_storage().data_ptr())
        whole[name] = own
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if kind == "safetensors":
            _safetensors().save_file(whole, temporary, metadata={"format": "pt"})
        else:
            torch.save(whole, temporary)
        with temporary.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    path.with_name(f"{path.name}.sha256").write_text(f"{digest}  {path.name}\n")
    LocalFilesystem(path.parent).sync()


def export_checkpoint(
    filesystem: Filesystem,
    checkpoint: Checkpoint,
    path: Path,
    kind: Format,
) -> list[Path]:
    """Write the weights of a verified checkpoint; needs no model.

    Returns:
        The files.

    Raises:
        CheckpointError: If the checkpoint has no models.
    """
    from dream_callbacks.checkpoint.restore import SavedState

    saved = SavedState(filesystem, checkpoint)
    models = tuple(saved.shared["models"])
    if not models:
        raise CheckpointError(f"{checkpoint.name} holds no model; choose another checkpoint")
    files = files_of(path, models, kind)
    for name, file in files.items():
        prefix = f"models.{name}."
        tensors = {key: saved.new_tensor(key) for key in saved.index if key.startswith(prefix)}
        saved.read(tensors)
        _write_weights(file, {k.removeprefix(prefix): t for k, t in tensors.items()}, kind)
    return list(files.values())


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
