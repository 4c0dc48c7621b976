"""Manifest: description of a checkpoint with size and checksum of each file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from dream_callbacks.checkpoint.errors import DamagedCheckpointError
from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.format.state_codec import decode_plain, encode_plain

FORMAT = 1
"""Incremented when older readers can't read the format."""

_NUMBERS: Mapping[str, Callable[[Any], float]] = {
    "step": int,
    "epoch": int,
    "seq": int,
    "fence": int,
    "created_unix": float,
    "world_size": int,
}

_ADDED: Mapping[str, Callable[[Any], Any]] = {
    "monitor": str,
    "mode": {"min": "min", "max": "max"}.__getitem__,
    "keeps_best": bool,
}
"""Fields that manifests written by earlier versions lack."""

_SEAL = re.compile(rb'\{"sha256":"([0-9a-f]{64})",\n')


class FileSum(NamedTuple):
    """Size and CRC-32 of a file."""

    num_bytes: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of a checkpoint. Written last: a folder with a manifest is complete.

    Args:
        step: Optimizer steps done.
        epoch: Number of the current epoch, from 0.
        seq: Increases with each save to a directory, also after resuming from an earlier step:
            the newest checkpoint has the highest.
        run: Id of the start of the script that wrote it.
        fence: Fence of the directory lock when it was written.
        created_unix: Unix time; informational.
        reason: Why it was saved.
        world_size: Number of ranks that wrote it.
        shape: Size of each axis of the mesh.
        dp_ranks: Data-parallel rank of each rank.
        num_train_batches: Batches per epoch on each rank.
        metrics: Validation results of these weights.
        has_nan: Whether a weight is NaN.
        torch_version: `torch.__version__`.
        files: Size and checksum of all files except the manifest, by name.
        monitor: Metric that ranks the checkpoints of the run; empty if it isn't known.
        mode: Whether a low or a high metric is better.
        keeps_best: Whether the run's retention keeps the best checkpoint.
    """

    step: int
    epoch: int
    seq: int
    run: str
    fence: int
    created_unix: float
    reason: str
    world_size: int
    shape: Mapping[str, int]
    dp_ranks: tuple[int, ...]
    num_train_batches: int | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    has_nan: bool = False
    torch_version: str = ""
    files: Mapping[str, FileSum] = field(default_factory=dict)
    monitor: str = ""
    mode: Literal["min", "max"] = "min"
    keeps_best: bool = True

    @property
    def num_bytes(self) -> int:
        """Size of the checkpoint without the manifest."""
        return sum(file.num_bytes for file in self.files.values())

    def encode(self) -> bytes:
        """Content of the manifest file."""
        document = {"format": FORMAT, **_shallow_dict(self)}
        document["dp_ranks"] = list(self.dp_ranks)
        document["metrics"] = encode_plain(dict(self.metrics))
        document["files"] = {name: list(sums) for name, sums in sorted(self.files.items())}
        return sealed(document)

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Decode the content of a manifest file.

        Raises:
            DamagedCheckpointError: If it is corrupt or malformed.
        """
        document = unsealed(data)
        if document.get("format") != FORMAT:
            raise DamagedCheckpointError(
                f"{file_names.MANIFEST} has format {document.get('format')!r:.40}, and this "
                f"version of dream-callbacks-checkpoint reads format {FORMAT}; upgrade it"
            )
        try:
            required = cls.__dataclass_fields__.keys() - _ADDED.keys()
            known = {name: document[name] for name in required}
            known |= {n: kind(document[n]) for n, kind in _ADDED.items() if n in document}
            known |= {name: kind(document[name]) for name, kind in _NUMBERS.items()}
            known["dp_ranks"] = tuple(int(dp_rank) for dp_rank in document["dp_ranks"])
            known["metrics"] = {
                str(name): float(value) for name, value in decode_plain(document["metrics"]).items()
            }
            known["shape"] = {str(axis): int(size) for axis, size in document["shape"].items()}
            known["files"] = {
                name: FileSum(int(num_bytes), int(crc32))
                for name, (num_bytes, crc32) in document["files"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DamagedCheckpointError(
                f"{file_names.MANIFEST} lacks a field or has one of the wrong type: {error!r:.200}"
            ) from error
        strange = [name for name in known["files"] if not file_names.is_file_name(name)]
        if strange:
            raise DamagedCheckpointError(
                f"{file_names.MANIFEST} lists {strange[0]!r:.200}, which isn't the name of a file "
                "in the folder; nothing outside of it is read"
            )
        return cls(**known)


def sealed(document: Mapping[str, Any]) -> bytes:
    """Encode a JSON object with the SHA-256 of its content."""
    body = json.dumps(document, separators=(",", ":")).encode()[1:] + b"\n"
    return b'{"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'",\n' + body


def unsealed(data: bytes) -> dict[str, Any]:
    """Decode what `sealed` returned and check the SHA-256.

    Raises:
        DamagedCheckpointError: If it is corrupt.
    """
    seal = _SEAL.match(data)
    if seal is None or hashlib.sha256(data[seal.end() :]).hexdigest().encode() != seal[1]:
        raise DamagedCheckpointError("its own checksum doesn't match")
    document = parsed_json(data)
    del document["sha256"]
    return document


def parsed_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        DamagedCheckpointError: If the data isn't a JSON object.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"not JSON: {error!r:.200}") from error
    if not isinstance(document, dict):
        raise DamagedCheckpointError("not a JSON object")
    return document


def _shallow_dict(manifest: Manifest) -> dict[str, Any]:
    return {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
