"""CheckpointManager: save to a checkpoint directory, and choose from it. No policy."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from dream_callbacks.checkpoint.catalog import (
    Catalog,
    Checkpoint,
    choose,
    damage_of,
    filesystem_at,
    late_metrics_document,
    read_catalog,
)
from dream_callbacks.checkpoint.errors import CheckpointError, error_text
from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.format.manifest import FileSum, Manifest
from dream_callbacks.checkpoint.format.state_codec import EncodedState, encode
from dream_callbacks.checkpoint.io import atomic_commit
from dream_callbacks.checkpoint.retention import Choice, KeepRules, to_delete
from dream_trainer.world import Coordination, RankFailure, World

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import MetadataIndex
    from torch.distributed.checkpoint.storage import WriteResult

    from dream_callbacks.checkpoint.dcp import TensorPlan
    from dream_callbacks.checkpoint.staging_memory import StagingMemory

    _Written: TypeAlias = tuple[list[WriteResult], dict[str, FileSum], bool]
    """From one rank: locations of its pieces, checksums of its files, whether a weight is NaN."""

logger = logging.getLogger(__name__)


@dataclass
class PendingSave:
    """A save from `prepare` to the commit.

    Attributes:
        manifest: Without files and `has_nan`, which are known once everything is written.
        state: State as JSON and tensors.
        tensors: Tensors that this rank writes.
        folder: Temporary folder that it is written to.
    """

    manifest: Manifest
    state: EncodedState
    tensors: TensorPlan
    folder: str


class CheckpointManager:
    """Saves to a checkpoint directory and restores from it. Methods are collective unless noted.

    Args:
        root: Checkpoint directory or its URL.
        world: A launched world.
        rules: Retention rules.
    """

    def __init__(self, root: str | Path, world: World, rules: KeepRules) -> None:
        self.filesystem = filesystem_at(root)
        self.world = world
        self.rules = rules
        self.ranks = coordination(world)
        self.run = self.ranks.on_rank_zero(lambda: uuid.uuid4().hex)
        self.lock = self.filesystem.lock(self.run)
        self._dp_ranks = tuple(self.ranks.gather(lambda: world.dp_rank))
        self._catalog = Catalog()
        self._was_opened = False
        self._changing = threading.Lock()  # a background save may run
        self._known_intact: set[tuple[str, int]] = set()

    # Opening and closing

    def open(self) -> None:
        """Create and lock the directory, and delete leftovers of earlier runs.

        When opened again, check that no other run has saved to it since.

        Raises:
            CheckpointError: If another run holds the lock, or the directory isn't writable.
        """

        def prepare() -> None:
            self.filesystem.make_root()
            fence = self.lock.fence
            self.lock.acquire()
            atomic_commit.probe(self.filesystem)
            atomic_commit.recover(self.filesystem)
            if self._was_opened and self.lock.fence - fence <= 1:
                return  # no other run has held the lock since
            catalog = read_catalog(self.filesystem)
            if self._was_opened and catalog.next_seq != self._catalog.next_seq:
                raise CheckpointError(
                    "another run has saved there after this trainer was set up; set up a new "
                    "trainer, which resumes from its checkpoint"
                )
            self._catalog, self._was_opened = catalog, True

        try:
            self.ranks.on_rank_zero(prepare)
        except (CheckpointError, OSError) as error:
            self.lock.release()
            raise CheckpointError(
                f"checkpoints can't be written to {self.filesystem}: {error_text(error)}. Unless "
                "another run is the cause, set root_dir to a directory that this user may write "
                "to. While another run trains there, validate(), test() and predict() work"
            ) from error

    def is_in_use(self) -> bool:
        """Whether another run is known to hold the lock."""
        return self.ranks.on_rank_zero(self.lock.is_held_elsewhere)

    def look(self) -> None:
        """List the checkpoints without the lock; they may be another run's, and are only read."""

        def read() -> None:
            self._catalog, self._was_opened = read_catalog(self.filesystem), True

        self.ranks.on_rank_zero(read)

    def start_afresh(self) -> None:
        """Move existing checkpoints into a folder `before-N`."""

        def move_aside() -> None:
            if atomic_commit.move_aside(self.filesystem):
                self._catalog = read_catalog(self.filesystem)

        self.ranks.on_rank_zero(move_aside)

    def close(self) -> None:
        """Release the lock. Not collective."""
        self.lock.release()

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Checkpoints in the directory, oldest first. Only on rank 0."""
        return self._catalog.checkpoints

    # Writing

    def prepare(
        self,
        take_state: Callable[[], Mapping[str, Any]],
        *,
        step: int,
        epoch: int,
        reason: str,
        num_train_batches: int | None,
        metrics: Mapping[str, float],
    ) -> PendingSave:
        """Plan a save: divide the state among the ranks and create the temporary folder.

        Args:
            take_state: Returns the state dict.
            step: Optimizer steps done.
            epoch: Number of the current epoch, from 0.
            reason: Why the save happens.
            num_train_batches: Batches per epoch on each rank.
            metrics: Validation results of these weights.

        Raises:
            CheckpointError: If the state can't be serialized, or there is too little free space.
        """
        from dream_callbacks.checkpoint.dcp import TensorPlan

        state = self.ranks.each(lambda: encode(take_state(), self.ranks.rank))
        tensors = TensorPlan.of_state(state.tensors, state.paths, self.ranks)
        folder = self.ranks.on_rank_zero(
            lambda: atomic_commit.begin(self.filesystem, step, self.run, tensors.total_bytes)
        )
        manifest = Manifest(
            step=step,
            epoch=epoch,
            seq=self._catalog.next_seq,
            run=self.run,
            fence=self.lock.fence,
            created_unix=time.time(),
            reason=reason,
            world_size=self.ranks.world_size,
            shape=dataclasses.asdict(self.world.shape),
            dp_ranks=self._dp_ranks,
            num_train_batches=num_train_batches,
            metrics=metrics,
            torch_version=torch.__version__,
            monitor=self.rules.monitor,
            mode=self.rules.mode,
            keeps_best=self.rules.last is None or self.rules.top_k > 0,
        )
        return PendingSave(manifest, state, tensors, folder)

    def stage(self, save: PendingSave, memory: StagingMemory[MetadataIndex]) -> None:
        """Copy this rank's tensors to host memory, so that training can continue during the write.

        Args:
            save: From `prepare`.
            memory: Host memory of the previous save, reused.

        Raises:
            CheckpointError: If a rank runs out of memory.
        """
        with self._abandoning(save, self.ranks):
            self.ranks.each(lambda: save.tensors.stage(memory))
        save.state.tensors.clear()

    def write(self, save: PendingSave, ranks: Coordination | None = None) -> None:
        """Write and commit a save. It is durable when this returns.

        Args:
            save: From `prepare`.
            ranks: Process group of the background thread; default: the main one.

        Raises:
            CheckpointError: If a rank failed to write; the temporary folder is deleted.
        """
        ranks = ranks or self.ranks

        def commit_all(parts: Sequence[_Written]) -> list[None]:
            self._commit(save, parts)
            return [None] * ranks.world_size

        with self._abandoning(save, ranks):
            part = ranks.each_without_timeout(lambda: self._write_own_part(save))
            ranks.via_rank_zero(part, commit_all)

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add validation results to a saved step. Only on rank 0."""
        with self._changing:
            checkpoint = self._catalog.of_step(step)
            if checkpoint is None or checkpoint.manifest.run != self.run:
                return
            news = {k: v for k, v in metrics.items() if k not in checkpoint.metrics}
            if not news:
                return
            late = {**checkpoint.late_metrics, **news}
            document = late_metrics_document(checkpoint.manifest, late)
            try:
                self.filesystem.replace(file_names.metrics_name(step), document, uuid.uuid4().hex)
            except OSError as error:
                logger.warning("the metrics of step %d can't be saved: %s", step, error)
            self._take_in(dataclasses.replace(checkpoint, late_metrics=late))

    def finish(self, save: PendingSave, late_metrics: Mapping[str, float], took_s: float) -> None:
        """Log the save and apply retention. Only on rank 0, after `write`.

        Args:
            save: Committed by `write`.
            late_metrics: Results reported during the write.
            took_s: Seconds from `prepare` to the commit.
        """
        step, reason = save.manifest.step, save.manifest.reason
        logger.info("saved step %d (%s) in %.2f s", step, reason, took_s)
        self.add_metrics(step, late_metrics)
        try:
            self._tidy()
        except OSError as error:
            logger.warning("an old checkpoint in %s can't be deleted: %s", self.filesystem, error)

    def _tidy(self) -> None:
        """Delete the checkpoints that no retention rule keeps."""
        with self._changing:
            present = self.filesystem.entries()  # a user may have deleted some of them
            known = self._catalog.checkpoints
            intact = [c for c in known if c.name in present and self._is_intact(c)]
            for checkpoint in to_delete(intact, self.rules):
                if self.filesystem.is_being_read(checkpoint.name):
                    continue  # deleted after a later save
                atomic_commit.discard(self.filesystem, checkpoint.name)
                remaining = (c for c in self._catalog.checkpoints if c.name != checkpoint.name)
                self._catalog = dataclasses.replace(self._catalog, checkpoints=tuple(remaining))

    # Restoring

    def choose(
        self, choice: Choice, *, verify: bool, held: contextlib.ExitStack | None = None
    ) -> Checkpoint | None:
        """Choose the checkpoint to restore; see `catalog.choose`."""
        return choose(self.filesystem, self._catalog, self.ranks, choice, verify=verify, held=held)

    # Private

    @contextlib.contextmanager
    def _abandoning(self, save: PendingSave, ranks: Coordination) -> Iterator[None]:
        """Delete the temporary folder after an error."""
        try:
            yield
        except BaseException:
            if ranks.is_global_zero:
                atomic_commit.abandon(self.filesystem, save.folder)
            raise

    def _write_own_part(self, save: PendingSave) -> _Written:
        atomic_commit.wait_until_visible(self.filesystem, save.folder)
        results, sums = save.tensors.write(self.filesystem, save.folder)
        name = file_names.rank_name(self.ranks.rank)
        sums[name] = self.filesystem.write(save.folder, name, _json(save.state.local))
        self.filesystem.sync(save.folder, sums)
        return results, sums, save.tensors.has_nan("models.")

    def _commit(self, save: PendingSave, parts: Sequence[_Written]) -> None:
        sums: dict[str, FileSum] = {}
        for _, part_sums, _ in parts:
            sums.update(part_sums)
        own = save.tensors.finish(self.filesystem, save.folder, [part[0] for part in parts])
        own[file_names.STATE] = self.filesystem.write(
            save.folder, file_names.STATE, _json(save.state.shared)
        )
        sums.update(own)
        has_nan = any(has_nan for _, _, has_nan in parts)
        manifest = dataclasses.replace(
            save.manifest, created_unix=time.time(), has_nan=has_nan, files=sums
        )
        name = atomic_commit.publish(self.filesystem, save.folder, manifest, self.lock, own)
        with self._changing:
            self._take_in(Checkpoint(name, manifest))

    def _take_in(self, checkpoint: Checkpoint) -> None:
        others = (c for c in self._catalog.checkpoints if c.name != checkpoint.name)
        ordered = sorted([*others, checkpoint], key=lambda c: (c.manifest.seq, c.step))
        damaged = {n: w for n, w in self._catalog.damaged.items() if n != checkpoint.name}
        self._catalog = Catalog(tuple(ordered), damaged)

    def _is_intact(self, checkpoint: Checkpoint) -> bool:
        """Whether all files have the right size; a positive result is cached."""
        key = (checkpoint.name, checkpoint.manifest.seq)
        if key not in self._known_intact:
            if damage_of(self.filesystem, checkpoint, checksums=False):
                return False
            self._known_intact.add(key)
        return True


class RankCheckpointError(CheckpointError, RankFailure):
    """A checkpoint couldn't be saved or loaded; the message names the ranks."""


def coordination(world: World, kind: str = "control") -> Coordination:
    """Coordination whose errors are CheckpointErrors. The first call per `kind` is collective.

    Args:
        world: A launched world.
        kind: Name of the process group; each thread needs its own. The main thread shares the
            world's: a group connects each rank with every other one.
    """
    return Coordination(world, kind, raises=RankCheckpointError, describe=error_text)


def _json(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
