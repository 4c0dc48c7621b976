"""RankSampler: this rank's part of each global batch."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class RankSampler(Sampler[int]):
    """Indices of the samples of one data-parallel rank, in the same global batches on any number.

    The k-th `batch_size` indices of an epoch are a global batch, of which each rank takes an equal
    block. Those left at the end of the epoch are divided too, so that ranks differ by at most one
    sample, or are dropped.

    Args:
        num_samples: Size of the data set.
        batch_size: Global batch size; a multiple of `num_ranks`.
        rank: Data-parallel rank.
        num_ranks: Number of data-parallel ranks.
        shuffle: Shuffle in each epoch, by `seed` and the epoch.
        seed: The same on all ranks.
        drop_last: Drop what is left at the end of an epoch.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        rank: int,
        num_ranks: int,
        shuffle: bool,
        seed: int,
        drop_last: bool,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    @property
    def leaves_ranks_out(self) -> bool:
        """Whether the incomplete batch has fewer samples than there are ranks."""
        return not self.drop_last and 0 < self.num_samples % self.batch_size < self.num_ranks

    def __len__(self) -> int:
        num_full, rest = divmod(self.num_samples, self.batch_size)
        return num_full * (self.batch_size // self.num_ranks) + len(self._block(rest))

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        full = self.num_samples - self.num_samples % self.batch_size
        block = self._block(self.batch_size)
        for begin in range(0, full, self.batch_size):
            yield from order[begin + block.start : begin + block.stop]
        block = self._block(self.num_samples - full)
        yield from order[full + block.start : full + block.stop]

    def _order(self) -> list[int] | range:
        if not self.shuffle:
            return range(self.num_samples)
        # Adding the epoch to the seed would give seed 1 the orders of seed 0, an epoch early.
        seed = zlib.crc32(f"{self.seed} {self.epoch}".encode())
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self.num_samples, generator=generator).tolist()

    def _block(self, size: int) -> range:
        """This rank's positions in a global batch of some size."""
        if size < self.batch_size and self.drop_last:
            return range(0)
        share, rest = divmod(size, self.num_ranks)
        begin = self.rank * share + min(self.rank, rest)
        return range(begin, begin + share + (self.rank < rest))
