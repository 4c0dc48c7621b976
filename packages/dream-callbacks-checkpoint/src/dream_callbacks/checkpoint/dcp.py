"""Write and read tensors through torch.distributed.checkpoint (DCP), with resharding."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystem as TorchFileSystem
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config

from dream_callbacks.checkpoint.errors import DamagedCheckpointError
from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.format.manifest import FileSum
from dream_callbacks.checkpoint.format.state_codec import Path as TreePath
from dream_callbacks.checkpoint.format.tensor_index import TensorIndex
from dream_callbacks.checkpoint.io.filesystem import Filesystem
from dream_callbacks.checkpoint.staging_memory import StagingMemory
from dream_trainer.world import Coordination


@dataclasses.dataclass
class TensorPlan:
    """Pieces of tensors that this rank writes; each piece is written by one rank.

    Attributes:
        plan: DCP's plan of this rank.
        total_bytes: Approximate size of the tensors of all ranks.
        metadata: DCP's metadata of all ranks; only on rank 0.
    """

    plan: SavePlan
    total_bytes: int
    metadata: Metadata | None
    _planner: _Planner

    @classmethod
    def of_state(
        cls, tensors: Mapping[str, Tensor], paths: Mapping[str, TreePath], ranks: Coordination
    ) -> TensorPlan:
        """Divide the tensors among the ranks. Collective.

        Args:
            tensors: By name. Each rank writes its shards of DTensors; one rank writes a plain
                tensor.
            paths: Path of each tensor in the state, for tools that read DCP's files.
            ranks: All ranks of the run.
        """
        planner = _Planner()
        planner.set_up_planner(dict(tensors), is_coordinator=ranks.is_global_zero)
        plan = dataclasses.replace(planner.create_local_plan(), planner_data=dict(paths))
        found: list[Metadata] = []

        def share_out(plans: Sequence[SavePlan]) -> list[tuple[SavePlan, int]]:
            global_plans, metadata = planner.create_global_plan(list(plans))
            all_paths: dict[str, TreePath] = {}
            for global_plan in reversed(global_plans):
                all_paths.update(global_plan.planner_data)
            found.append(dataclasses.replace(metadata, planner_data=all_paths))
            total = sum(
                stored.size.numel() * stored.properties.dtype.itemsize
                for stored in metadata.state_dict_metadata.values()
                if isinstance(stored, TensorStorageMetadata)
            )
            writer = FileSystemWriter("")
            return [
                (dataclasses.replace(part, planner_data=None), total)
                for part in writer.prepare_global_plan(global_plans)
            ]

        final, total_bytes = ranks.via_rank_zero(plan, share_out)
        final = planner.finish_plan(final)
        return cls(final, total_bytes, found[0] if found else None, planner)

    def stage(self, memory: StagingMemory[MetadataIndex]) -> None:
        """Copy this rank's pieces to host memory, so that training can continue.

        Args:
            memory: Has the copies of the previous save, which are overwritten.
        """
        live = self._pieces()
        staged = memory.copies_of(live)
        for index, copy in staged.items():
            copy.copy_(live[index], non_blocking=True)
        _wait_for_devices(live.values())
        self._planner.staged = staged
        self._planner.state_dict = {}

    def has_nan(self, prefix: str) -> bool:
        """Whether this rank's pieces of tensors with a name prefix contain NaN.

        Host sync.
        """
        largest = []  # max propagates NaN: one pass, no temporary of the tensor's size
        for index, piece in self._pieces().items():
            if index.fqn.startswith(prefix):
                if piece.is_floating_point() and piece.numel() and piece.itemsize > 1:
                    largest.append(piece.max().float().cpu())
        return bool(largest) and bool(torch.stack(largest).isnan().any())

    def write(
        self, filesystem: Filesystem, folder: str
    ) -> tuple[list[WriteResult], dict[str, FileSum]]:
        """Write this rank's pieces, in any thread: waits until nothing on a device uses them.

        Returns:
            Locations of the pieces, and checksums of the files.
        """
        _wait_for_devices(self._pieces().values())
        files = _Files(filesystem, folder)
        writer = _writer(filesystem, folder, files)
        # Files have our own checksums; torch would compute a CRC of every tensor as well.
        without_crc = config.patch("save.compute_crc32", False)  # type: ignore[attr-defined]  # is there
        with without_crc:
            results = writer.write_data(self.plan, self._planner).value()
            if len(results) != len(self.plan.items):
                # DCP loses the errors of its writing threads.
                raise RuntimeError(
                    f"{len(results)} of {len(self.plan.items)} pieces of tensors were written"
                )
        return results, files.sums

    def _pieces(self) -> dict[MetadataIndex, Tensor]:
        """This rank's pieces: live, or copies on the host after `stage`."""
        indices = [item.index for item in self.plan.items]
        return {i: cast("Tensor", self._planner.lookup_object(i)).detach() for i in indices}

    def finish(
        self, filesystem: Filesystem, folder: str, results: Sequence[list[WriteResult]]
    ) -> dict[str, FileSum]:
        """Write the tensor index and DCP's metadata. On rank 0, with the results of all ranks.

        Returns:
            Checksums of the files.
        """
        assert self.metadata is not None, "rank 0 has it"
        files = _Files(filesystem, folder)
        _writer(filesystem, folder, files).finish(self.metadata, list(results))
        index = TensorIndex.of_save(self.metadata, (r for part in results for r in part))
        return {
            **files.sums,
            file_names.INDEX: filesystem.write(folder, file_names.INDEX, index.encode()),
        }


def read_tensors(
    filesystem: Filesystem, folder: str, index: TensorIndex, wanted: Mapping[str, Tensor]
) -> None:
    """Read tensors of a checkpoint in place; each rank reads its own shards. Not collective.

    Works in any thread: waits until their device doesn't use the tensors, and until it fills them.

    Args:
        filesystem: Directory of the checkpoint.
        folder: Folder of the checkpoint.
        index: Its tensor index.
        wanted: Tensors by name, all of them in the index with the same shape; dtypes are cast.

    Raises:
        DamagedCheckpointError: If a piece can't be read.
    """
    if not wanted:
        return
    metadata = index.as_metadata(wanted)
    reader = FileSystemReader("")
    reader.fs = _Files(filesystem, folder)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    planner = _TensorsOnly(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(wanted), metadata, is_coordinator=True)
    plan = planner.finish_plan(planner.create_local_plan())
    _wait_for_devices(wanted.values())
    try:
        reader.read_data(plan, planner).wait()
    except (OSError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # not the checkpoint's fault: another one would fail as well
    except Exception as error:  # torch raises many types for bytes that aren't a tensor
        if isinstance(error, DamagedCheckpointError):
            raise
        text = str(error).splitlines()[0] if str(error) else ""
        raise DamagedCheckpointError(
            f"a tensor can't be read: {type(error).__name__}: {text:.300}"
        ) from error
    _wait_for_devices(wanted.values())


class _Planner(DefaultSavePlanner):
    """Planner that writes staged copies if there are any."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.staged: Mapping[MetadataIndex, Tensor] | None = None

    def lookup_object(self, index: MetadataIndex) -> Any:
        return super().lookup_object(index) if self.staged is None else self.staged[index]


class _TensorsOnly(DefaultLoadPlanner):
    """Planner that refuses non-tensors, which DCP would unpickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise DamagedCheckpointError(f"{read_item.dest_index.fqn!r} isn't a tensor")


def _wait_for_devices(tensors: Iterable[Tensor]) -> None:
    """Wait for all work on the tensors' devices, on every stream.

    Training may use another stream than this thread's current one, which doesn't wait for it.
    """
    for device in {tensor.device for tensor in tensors} - {torch.device("cpu")}:
        torch.accelerator.synchronize(device)


def _writer(filesystem: Filesystem, folder: str, files: _Files) -> FileSystemWriter:
    # Files are synced together at the end. Nothing is copied ahead: torch would only wait for the
    # current stream of this thread, whatever device a tensor is on, and it would wait for that of
    # the training, once per 10 MB, if all tensors are on the host.
    writer = FileSystemWriter("", overwrite=False, sync_files=False, per_thread_copy_ahead=0)
    writer.fs = files
    writer.set_up_storage_writer(is_coordinator=True)
    return writer


class _Files(TorchFileSystem):
    """DCP's view of a checkpoint folder; records the checksums of new files.

    Only the names of DCP's paths are used.
    """

    def __init__(self, filesystem: Filesystem, folder: str) -> None:
        self._filesystem = filesystem
        self._folder = folder
        self.sums: dict[str, FileSum] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        # The folder is renamed when complete, so that files need no temporary name.
        name = Path(path).name.removesuffix(".tmp")
        if mode == "rb":
            with self._filesystem.open(self._folder, name) as saved:
                yield saved
            return
        with self._filesystem.create(self._folder, name) as file:
            yield file
        self.sums[name] = file.sums

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Does nothing: the folder exists."""

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return False  # the folder was created empty

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Does nothing: files are written under their final name."""
