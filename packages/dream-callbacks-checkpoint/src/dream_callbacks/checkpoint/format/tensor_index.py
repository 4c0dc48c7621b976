"""TensorIndex: location of each piece of each tensor, as JSON.

DCP's `.metadata` has the same content, but is a pickle: it is only for other tools.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dream_callbacks.checkpoint.errors import DamagedCheckpointError
from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.format.manifest import FileSum, parsed_json
from dream_callbacks.checkpoint.format.state_codec import decode_plain, encode_plain

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata


@dataclass(frozen=True)
class Chunk:
    """A piece of a tensor and its location.

    DCP's reader prescribes the names of the last four fields.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None

    @property
    def volume(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        dtype: Stored dtype.
        shape: Global shape.
        chunks: Pieces that tile the tensor.
    """

    dtype: torch.dtype
    shape: torch.Size
    chunks: tuple[Chunk, ...]

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class TensorIndex(Mapping[str, StoredTensor]):
    """Tensors of a checkpoint by name.

    Args:
        tensors: Tensors by name.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @classmethod
    def of_save(cls, metadata: Metadata, results: Iterable[Any]) -> TensorIndex:
        """Index of what DCP has written.

        Args:
            metadata: Metadata of the global plan.
            results: WriteResult of every piece of all ranks.
        """
        places = {result.index: result.storage_data for result in results}
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            chunks = []
            for chunk in stored.chunks:  # type: ignore[union-attr]  # only tensors are saved
                if math.prod(chunk.sizes) or not stored.size.numel():  # type: ignore[union-attr]
                    place = places[_key(name, chunk.offsets)]
                    chunks.append(
                        Chunk(
                            tuple(chunk.offsets),
                            tuple(chunk.sizes),
                            place.relative_path,
                            place.offset,
                            place.length,
                        )
                    )
            tensors[name] = StoredTensor(
                stored.properties.dtype,  # type: ignore[union-attr]
                torch.Size(stored.size),  # type: ignore[union-attr]
                tuple(chunks),
            )
        return cls(tensors)

    def encode(self) -> bytes:
        """Content of the index file."""
        files = sorted({c.relative_path for tensor in self.values() for c in tensor.chunks})
        numbers = {name: number for number, name in enumerate(files)}
        tensors = {
            name: [
                encode_plain(tensor.dtype),
                list(tensor.shape),
                [
                    [list(c.offsets), list(c.sizes), numbers[c.relative_path], c.offset, c.length]
                    for c in tensor.chunks
                ],
            ]
            for name, tensor in self.items()
        }
        return json.dumps({"files": files, "tensors": tensors}, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, data: bytes, files: Mapping[str, FileSum]) -> TensorIndex:
        """Decode and validate an index file.

        Args:
            data: Content of the file.
            files: Sizes of the checkpoint's files, by name.

        Raises:
            DamagedCheckpointError: If it is malformed, a piece lies outside of its tensor or file
                or is larger than its bytes, pieces overlap, or a part of a tensor is missing.
        """
        document = parsed_json(data)
        try:
            names = [str(name) for name in document["files"]]
            tensors = {
                name: StoredTensor(
                    decode_plain(dtype),
                    torch.Size(shape),
                    tuple(
                        Chunk(tuple(offsets), tuple(sizes), names[number], offset, length)
                        for offsets, sizes, number, offset, length in chunks
                    ),
                )
                for name, (dtype, shape, chunks) in document["tensors"].items()
            }
            for name, tensor in tensors.items():
                _check_filled(name, tensor)
                for chunk in tensor.chunks:
                    _check_place(name, chunk, tensor.dtype, files)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, DamagedCheckpointError):
                raise
            raise DamagedCheckpointError(
                f"{file_names.INDEX} lacks a field or has one of the wrong type: {error!r:.200}"
            ) from error
        return cls(tensors)

    def as_metadata(self, names: Iterable[str]) -> Metadata:
        """DCP's metadata for some tensors, which DCP itself would unpickle."""
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            Metadata,
            TensorProperties,
            TensorStorageMetadata,
        )

        wanted = {name: self[name] for name in names}
        return Metadata(
            state_dict_metadata={
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=tensor.dtype),
                    size=tensor.shape,
                    chunks=[
                        ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes))
                        for c in tensor.chunks
                    ],
                )
                for name, tensor in wanted.items()
            },
            storage_data={
                _key(name, chunk.offsets): chunk
                for name, tensor in wanted.items()
                for chunk in tensor.chunks
            },
        )


def _key(name: str, offsets: Sequence[int]) -> Any:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    return MetadataIndex(name, offsets)


def _check_place(name: str, chunk: Chunk, dtype: torch.dtype, files: Mapping[str, FileSum]) -> None:
    file = files.get(chunk.relative_path)
    if file is None:
        raise DamagedCheckpointError(
            f"{file_names.INDEX}: {name!r} is located in {chunk.relative_path!r:.200}, which is "
            "no file of the checkpoint"
        )
    if not 0 <= chunk.offset <= chunk.offset + chunk.length <= file.num_bytes:
        raise DamagedCheckpointError(
            f"{file_names.INDEX}: {name!r} is located at bytes {chunk.offset} to "
            f"{chunk.offset + chunk.length} of {chunk.relative_path}, which has {file.num_bytes}"
        )
    # An index can't make us allocate more memory than the checkpoint has bytes.
    if chunk.volume * dtype.itemsize > chunk.length:
        raise DamagedCheckpointError(
            f"{file_names.INDEX}: a piece of {name!r} of sizes {chunk.sizes} is located in "
            f"{chunk.length} bytes, which can't hold it"
        )


def _check_filled(name: str, tensor: StoredTensor) -> None:
    """Raise unless the chunks tile the tensor: inside it, disjoint, of its volume."""
    if not isinstance(tensor.dtype, torch.dtype):
        raise DamagedCheckpointError(f"{file_names.INDEX}: {name!r} has no dtype")
    num_dims = len(tensor.shape)
    for chunk in tensor.chunks:
        inside = len(chunk.offsets) == len(chunk.sizes) == num_dims and all(
            0 <= start <= start + size <= limit
            for start, size, limit in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)
        )
        if not inside:
            raise DamagedCheckpointError(
                f"{file_names.INDEX}: a piece of {name!r} at {chunk.offsets} of sizes "
                f"{chunk.sizes} lies outside of its shape {tuple(tensor.shape)}"
            )
    volume = sum(chunk.volume for chunk in tensor.chunks)
    if volume != tensor.shape.numel() or _overlap(tensor.chunks):
        raise DamagedCheckpointError(
            f"{file_names.INDEX}: the pieces of {name!r} don't fill its shape "
            f"{tuple(tensor.shape)}: they have {volume} elements of {tensor.shape.numel()}, or "
            "overlap"
        )


def _overlap(chunks: Sequence[Chunk]) -> bool:
    """Whether two chunks overlap. Fast if they are slices along one axis."""
    boxes = [chunk for chunk in chunks if chunk.volume]
    if len(boxes) < 2:
        return False
    axes = range(len(boxes[0].sizes))
    axis = max(axes, key=lambda axis: len({box.offsets[axis] for box in boxes}))
    boxes.sort(key=lambda box: box.offsets[axis])
    active: list[Chunk] = []
    for box in boxes:
        active = [a for a in active if a.offsets[axis] + a.sizes[axis] > box.offsets[axis]]
        for other in active:
            if all(
                other.offsets[d] < box.offsets[d] + box.sizes[d]
                and box.offsets[d] < other.offsets[d] + other.sizes[d]
                for d in axes
            ):
                return True
        active.append(box)
    return False
