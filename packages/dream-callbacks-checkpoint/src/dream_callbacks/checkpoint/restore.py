"""Restore a checkpoint into a trainer: bit-exact, or resharded for another number of ranks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dream_callbacks.checkpoint.catalog import Checkpoint
from dream_callbacks.checkpoint.errors import MAX_NAMES, CheckpointError
from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.format.manifest import parsed_json
from dream_callbacks.checkpoint.format.state_codec import decode, encode
from dream_callbacks.checkpoint.format.tensor_index import TensorIndex
from dream_callbacks.checkpoint.io.filesystem import Filesystem
from dream_callbacks.checkpoint.load_target import (
    fitting,
    matched,
    optimizer_tensors,
    own_tensors,
)
from dream_trainer.world import Coordination

if TYPE_CHECKING:
    from dream_trainer.trainer import BaseTrainer

logger = logging.getLogger(__name__)


class SavedState:
    """State and tensor index of a checkpoint. Not collective.

    Args:
        filesystem: Directory of the checkpoint.
        checkpoint: A verified checkpoint.

    Raises:
        DamagedCheckpointError: If a file is malformed.
    """

    def __init__(self, filesystem: Filesystem, checkpoint: Checkpoint) -> None:
        self.filesystem = filesystem
        self.checkpoint = checkpoint
        self.shared = parsed_json(filesystem.read(checkpoint.name, file_names.STATE))
        self.index = TensorIndex.decode(
            filesystem.read(checkpoint.name, file_names.INDEX), checkpoint.manifest.files
        )

    def local(self, rank: int) -> dict[str, Any]:
        """JSON of the rank-local values of a rank, by path in the state."""
        return parsed_json(self.filesystem.read(self.checkpoint.name, file_names.rank_name(rank)))

    def read(self, wanted: Mapping[str, Tensor]) -> None:
        """Read tensors in place, by name."""
        from dream_callbacks.checkpoint.dcp import read_tensors

        read_tensors(self.filesystem, self.checkpoint.name, self.index, wanted)

    def new_tensor(self, name: str) -> Tensor:
        """An uninitialized, unsharded CPU tensor for a saved tensor."""
        stored = self.index[name]
        return torch.empty(stored.shape, dtype=stored.dtype, device="cpu")


def load_into(
    trainer: BaseTrainer,
    filesystem: Filesystem,
    checkpoint: Checkpoint,
    ranks: Coordination,
    *,
    strict: bool,
    resume_data: bool,
) -> None:
    """Restore a verified checkpoint into a trainer. Collective.

    The trainer is unchanged until all state except tensor values has been read and the names,
    shapes and dtypes have been compared.

    Args:
        trainer: A trainer that is set up.
        filesystem: Directory of the checkpoint.
        checkpoint: A verified checkpoint.
        ranks: All ranks of the run.
        strict: Refuse tensor names, shapes and dtypes that differ; otherwise load what matches.
        resume_data: Continue at the next batch; otherwise restart the current epoch.

    Raises:
        CheckpointError: On all ranks, listing all differences.
    """
    world = trainer.world
    saved = ranks.each(lambda: SavedState(filesystem, checkpoint))
    source = source_of(world.dp_rank, world.dp_size, checkpoint.manifest.dp_ranks)
    local = ranks.each(lambda: saved.local(source.rank))
    has_stepped = any(o["param_groups"] for o in saved.shared["optimizers"].values())
    target = ranks.each(lambda: trainer.state_dict(as_target=has_stepped))
    live = encode(target, ranks.rank)
    wanted, differences = matched(saved, live)
    appearing = optimizer_tensors(saved, live)
    if differences and strict:
        raise CheckpointError(
            f"{checkpoint.name} doesn't fit the trainer:\n" + "\n".join(differences) + "\nUse the "
            "model and optimizer that it was saved with, or another experiment name (this is "
            f"{trainer.experiment!r}) for a new run; strict_load=False loads what matches"
        )
    if differences and ranks.is_global_zero:
        logger.warning(
            "strict_load=False, and %s doesn't fit the trainer:\n%s",
            checkpoint.name, "\n".join(differences),
        )  # fmt: skip
    own = own_tensors(saved, local, live.tensors)
    ranks.each_without_timeout(lambda: saved.read({**wanted, **appearing, **own}))
    tensors = {**live.tensors, **appearing, **own}
    shared = saved.shared
    if differences:
        shared = {**shared, **fitting(saved, live)}
    state: dict[str, Any] = ranks.each(lambda: decode(shared, tensors, local))
    if not source.is_same:
        ranks.each(lambda: _reshard_data(state, saved, source, trainer, ranks))
    elif resume_data:
        counters = state["trainer"]["counters"]
        ranks.each(lambda: _refuse_other_data(checkpoint.manifest, counters, trainer))
    ranks.each(lambda: trainer.load_state_dict(state, strict=strict, resume_data=resume_data))


def _reshard_data(
    state: dict[str, Any],
    saved: SavedState,
    source: Source,
    trainer: BaseTrainer,
    ranks: Coordination,
) -> None:
    """Adapt rank-local state to another number of data-parallel ranks.

    Position in the epoch: the same fraction is done. Sums of the epoch so far: all on rank 0.
    Random state: from the saved rank with the same dp rank; additional ranks keep their seeds.
    Other rank-local values: from the saved rank with this dp rank modulo the saved dp size.
    """
    manifest = saved.checkpoint.manifest
    counters = state["trainer"]["counters"]
    before, num_batches = manifest.num_train_batches, trainer.num_train_batches
    done, is_exact = counters["epoch_batches"], True
    if before and num_batches:
        accumulation = trainer.training_parameters.gradient_accumulation_steps
        counters["epoch_batches"], is_exact = resharded_position(
            done, before, num_batches, accumulation
        )
    state["dataloaders"] = {
        name: {} for name in state["dataloaders"]
    }  # loaders skip `epoch_batches`
    dp_ranks = manifest.dp_ranks
    firsts = [dp_ranks.index(dp_rank) for dp_rank in sorted(set(dp_ranks))]
    means = [saved.local(rank).get(_EPOCH_MEANS) or {} for rank in firsts]
    state["trainer"]["epoch_means"] = resharded_totals(
        [decode(part, {}, {}) for part in means],
        ranks.rank,
        trainer.world.world_size // trainer.world.dp_size,
    )
    # Only the metrics know how to merge them; the trainer warns that they restart.
    state["trainer"].pop("train_metrics", None)
    if not source.is_own:
        state["trainer"]["random_state"] = None
    if not ranks.is_global_zero:
        return
    size = trainer.world.dp_size
    logger.warning(
        "%s was saved by %d data-parallel ranks, and there are %d: weights, optimizer and sample "
        "order are the same, random numbers drawn in the model are not",
        saved.checkpoint.name, len(firsts), size,
    )  # fmt: skip
    if not is_exact:
        logger.warning(
            "the %d batches of the epoch that were done don't fit a whole number of the new ones: "
            "a few samples are repeated", done,
        )  # fmt: skip
    callbacks = sorted(p for p in saved.local(0) if p.startswith("trainer.callbacks."))
    if callbacks:
        logger.warning(
            "rank-local states, given to the new ranks in turn: %s",
            ", ".join(callbacks[:MAX_NAMES]),
        )


_EPOCH_MEANS = "trainer.epoch_means"


def _refuse_other_data(manifest: Any, counters: Mapping[str, Any], trainer: BaseTrainer) -> None:
    """Raise if the position in the epoch is beyond the current loader."""
    before, now = manifest.num_train_batches, trainer.num_train_batches
    if before == now or now is None or counters["epoch_stage"] != "train":
        return
    if counters["epoch_batches"] > now:
        raise CheckpointError(
            f"{counters['epoch_batches']} batches of the epoch are done, and an epoch has {now} "
            f"now (it had {before}); the data changed: set resume_data=False to restart the "
            "epoch with it"
        )
    if counters["epoch_batches"]:
        logger.warning(
            "an epoch had %s batches and has %s now; it continues after batch %s. If the data "
            "changed, set resume_data=False to restart the epoch",
            before, now, counters["epoch_batches"],
        )  # fmt: skip


# Pure rules for another number of data-parallel ranks


@dataclass(frozen=True)
class Source:
    """Saved rank whose rank-local values a rank restores.

    Attributes:
        rank: Rank that saved them.
        is_same: Whether the data-parallel size is unchanged: resuming is then bit-exact.
        is_own: Whether no other dp rank restores the same values.
    """

    rank: int
    is_same: bool
    is_own: bool


def source_of(dp_rank: int, dp_size: int, saved_dp_ranks: Sequence[int]) -> Source:
    """Saved rank whose rank-local values a rank restores.

    Args:
        dp_rank: Data-parallel rank of this rank.
        dp_size: Number of data-parallel ranks.
        saved_dp_ranks: Data-parallel rank of each saved rank.
    """
    saved_size = max(saved_dp_ranks, default=0) + 1
    rank = list(saved_dp_ranks).index(dp_rank % saved_size)
    return Source(rank, is_same=saved_size == dp_size, is_own=dp_rank < saved_size)


def resharded_position(
    epoch_batches: int, saved_num_batches: int, num_batches: int, accumulation: int
) -> tuple[int, bool]:
    """Batches of the epoch that are done if an epoch now has another number of batches.

    Keeps the fraction of the epoch. With an interleaving sampler, such as DistributedSampler, the
    same samples are done.

    Args:
        epoch_batches: Batches done on each rank when it was saved.
        saved_num_batches: Batches per epoch when it was saved.
        num_batches: Batches per epoch now.
        accumulation: Batches per optimizer step now; the result is a multiple of it or all
            batches.

    Returns:
        Batches, rounded down, and whether the result is exact.
    """
    batches, rest = divmod(epoch_batches * num_batches, saved_num_batches)
    if batches == num_batches:
        return batches, rest == 0
    return batches - batches % accumulation, rest == 0 and batches % accumulation == 0


def resharded_totals(saved: Sequence[Any], rank: int, ranks_per_part: int) -> dict[str, Any]:
    """Sums of the epoch so far, with the same mean over all ranks as before.

    Args:
        saved: `epoch_means` of one rank per saved dp rank.
        rank: Rank 0 gets the totals; the others get zeros.
        ranks_per_part: Ranks per dp rank now; each of them contributes to the mean.
    """
    merged: dict[str, Any] = {}
    for means in saved:
        for key, (total, weight) in means.items():
            before = merged.get(key, [0.0, 0])
            merged[key] = [
                before[0] + total * ranks_per_part,
                before[1] + weight * ranks_per_part,
            ]
    if rank == 0:
        return merged
    return {key: [0.0, 0] for key in merged}
