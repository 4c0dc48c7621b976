"""Which saved rank's values a rank continues with, when their number or layout changed. Pure."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Whose values a rank continues with.

    Attributes:
        rank: The rank that saved them.
        is_same: Whether that rank read the same part of the data, of as many parts: then every
            value fits, and the run goes on bit for bit.
        is_own: Whether no other rank that reads other data continues with the same values.
    """

    rank: int
    is_same: bool
    is_own: bool


def source_of(dp_rank: int, dp_size: int, saved_dp_ranks: Sequence[int]) -> Source:
    """The saved rank whose values a rank with this part of the data continues with.

    Args:
        dp_rank: Which part of the data the rank reads.
        dp_size: Of how many parts.
        saved_dp_ranks: Which part each rank read that saved.
    """
    saved_size = max(saved_dp_ranks, default=0) + 1
    rank = list(saved_dp_ranks).index(dp_rank % saved_size)
    return Source(rank, is_same=saved_size == dp_size, is_own=dp_rank < saved_size)


def position(
    epoch_batches: int, saved_num_batches: int, num_batches: int, accumulation: int
) -> tuple[int, bool]:
    """Batches of the epoch that are done, when an epoch has another number of batches now.

    The same part of the epoch is done. With a sampler that deals samples out in turn, such as
    DistributedSampler, these are the same samples.

    Args:
        epoch_batches: Batches done on each rank, when it was saved.
        saved_num_batches: Batches of an epoch then.
        num_batches: Batches of an epoch now.
        accumulation: Batches of an optimizer step now; the result is a multiple, or all of them.

    Returns:
        The batches, rounded down, and whether nothing had to be rounded.
    """
    batches, rest = divmod(epoch_batches * num_batches, saved_num_batches)
    if batches == num_batches:
        return batches, rest == 0
    return batches - batches % accumulation, rest == 0 and batches % accumulation == 0


def totals(saved: Sequence[Any], rank: int, ranks_per_part: int) -> dict[str, Any]:
    """The epoch's sums so far, so that those of all ranks still have the same mean.

    Args:
        saved: `epoch_means` of one rank for each part of the data.
        rank: Rank 0 takes all of it; the others begin with nothing.
        ranks_per_part: How many ranks read the same data now: each of them will add it.
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
