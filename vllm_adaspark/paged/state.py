"""The step's rows, and what is kept of the keys (and values) of each physical KV block.

That is their sum, or their bounds.  It is keyed by physical block and written when a block's tokens
are written.  Prefix caching, chunked prefill and preemption then need nothing more: a cached block
keeps what it has, a block filled over several steps accumulates it, and a block that is handed out
again starts afresh at its first video token.  Which blocks are cubes is no state at all: it follows
from the request (requests.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from ..settings import Settings


@dataclass(frozen=True)
class StepRows:
    """The step's requests, on the host.

    Attributes:
        query_start: ``[rows + 1]`` first token of each row in the step; empty rows are padding.
        seq_lens: ``[rows]`` tokens of each request once this step is done.
        block_table: ``[rows, blocks]`` physical block of each logical block; None in steps whose
            requests have no video.
    """

    query_start: np.ndarray
    seq_lens: np.ndarray
    block_table: np.ndarray | None

    @cached_property
    def query_lens(self) -> np.ndarray:
        return np.diff(self.query_start)

    @cached_property
    def computed(self) -> np.ndarray:
        """Tokens of each request that earlier steps (or the prefix cache) provided."""
        return self.seq_lens - self.query_lens

    @cached_property
    def token_row(self) -> np.ndarray:
        """``[tokens]`` row of each token of the step."""
        return np.repeat(np.arange(len(self.seq_lens)), self.query_lens)

    @cached_property
    def token_position(self) -> np.ndarray:
        """``[tokens]`` position of each token of the step in its request."""
        first = self.computed - self.query_start[:-1]
        return np.arange(len(self.token_row)) + first[self.token_row]


class BlockSummaries:
    """What one layer keeps of each block's keys, or of its values; a score is a product with it.

    It comes from the keys as they are written, not from the cache, whose layout belongs to the
    kernel and may be packed or fp8.  Only blocks that may become cubes are kept up to date.

    Attributes:
        number: how many vectors of the size of a key are kept of a block.
        divisor: what a product with them is divided by.
        vectors: ``[physical blocks, kv_heads, number * head_size]``; stale where a block is no
            cube.
    """

    number: ClassVar[int] = 1
    divisor: int = 1

    def __init__(
        self,
        num_blocks: int,
        kv_heads: int,
        head_size: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """``dtype`` is that of the keys as the model makes them."""
        self.block_size = block_size
        shape, dtype = (num_blocks, kv_heads, self.number * head_size), self.dtype_for(dtype)
        self.vectors = torch.zeros(shape, dtype=dtype, device=device)

    @staticmethod
    def dtype_for(dtype: torch.dtype) -> torch.dtype:
        """In which dtype the vectors for keys of such a dtype are kept."""
        raise NotImplementedError

    @classmethod
    def bytes_per_block(cls, kv_heads: int, head_size: int, dtype: torch.dtype) -> int:
        """Memory that a KV block of such keys takes beside the cache, in one layer."""
        return cls.number * kv_heads * head_size * cls.dtype_for(dtype).itemsize

    @staticmethod
    def asking(query: torch.Tensor) -> torch.Tensor:
        """``[..., number * head_size]``: what is multiplied with ``vectors`` for a query ``[...,
        head_size]``."""
        return query

    def write(self, vectors: torch.Tensor, writes: SummaryWrites) -> None:
        """Take this step's keys (or values) ``[tokens, kv_heads, head_size]``."""
        raise NotImplementedError

    def of(self, blocks: torch.Tensor) -> torch.Tensor:
        """``[..., kv_heads, number * head_size]`` fp32: a copy of what ``blocks [...]`` have."""
        vectors = self.vectors.index_select(0, blocks.flatten())
        return vectors.unflatten(0, blocks.shape).float()


class BlockSums(BlockSummaries):
    """The sum of each block's keys, in fp32, of which mean keys are made; or of its values."""

    @property
    def divisor(self) -> int:
        return self.block_size

    @staticmethod
    def dtype_for(dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def write(self, vectors: torch.Tensor, writes: SummaryWrites) -> None:
        if writes.whole_blocks is not None:
            cubes = vectors[writes.whole_tokens].unflatten(0, (-1, self.block_size))
            self.vectors[writes.whole_blocks] = cubes.sum(dim=1, dtype=torch.float32)
        if writes.part_blocks is not None:
            self.vectors[writes.fresh_blocks] = 0
            self.vectors.index_add_(0, writes.part_blocks, vectors[writes.part_tokens].float())


class BlockBounds(BlockSummaries):
    """The largest and the smallest key of each block, dimension by dimension, in the keys' dtype.

    No key of the block has a larger product with a query than ``sum_d max(q_d * largest_d, q_d *
    smallest_d)`` (Quest, arXiv 2406.10774, section 3.3).  As a query's dimension takes the largest
    if it is positive and the smallest if it is negative, this is one product of twice the size.
    """

    number = 2

    @staticmethod
    def dtype_for(dtype: torch.dtype) -> torch.dtype:
        return dtype

    @staticmethod
    def asking(query: torch.Tensor) -> torch.Tensor:
        return torch.cat([query.clamp(min=0), query.clamp(max=0)], -1)

    def write(self, vectors: torch.Tensor, writes: SummaryWrites) -> None:
        largest, smallest = self.vectors.chunk(2, dim=-1)
        if writes.whole_blocks is not None:
            cubes = vectors[writes.whole_tokens].unflatten(0, (-1, self.block_size))
            self.vectors[writes.whole_blocks] = torch.cat([cubes.amax(1), cubes.amin(1)], -1)
        if writes.part_blocks is not None:
            largest[writes.fresh_blocks] = float("-inf")
            smallest[writes.fresh_blocks] = float("inf")
            some = vectors[writes.part_tokens]
            block = writes.part_blocks[:, None, None].expand_as(some)
            largest.scatter_reduce_(0, block, some, "amax")
            smallest.scatter_reduce_(0, block, some, "amin")


# By ``Settings.key_summary``.
KEY_SUMMARIES: dict[str, type[BlockSummaries]] = {"sums": BlockSums, "bounds": BlockBounds}


def kept_bytes(settings: Settings, kv_heads: int, head_size: int, dtype: torch.dtype) -> int:
    """Bytes that are kept of a KV block beside the cache, in one layer, of keys in ``dtype``."""
    if not settings.summaries_per_block:
        return 0
    size = kv_heads, head_size, dtype
    of_values = (settings.summaries_per_block - 1) * BlockSums.bytes_per_block(*size)
    return KEY_SUMMARIES[settings.key_summary].bytes_per_block(*size) + of_values


@dataclass(frozen=True)
class SummaryWrites:
    """Which tokens of the step feed what is kept of which block; index tensors on the device.

    Blocks of video alone that are written whole in this step are taken at once.  Blocks that a
    chunk edge cuts accumulate over the steps that write them, and so do those that also hold text,
    of which the video tokens count.
    """

    # [whole_blocks * block_size]; a slice where they are consecutive, which saves a copy
    whole_tokens: torch.Tensor | slice | None
    whole_blocks: torch.Tensor | None
    part_tokens: torch.Tensor | None
    part_blocks: torch.Tensor | None  # [part_tokens] physical block of each
    fresh_blocks: torch.Tensor | None  # part blocks whose first video token is among these

    @property
    def empty(self) -> bool:
        return self.whole_blocks is None and self.part_blocks is None
