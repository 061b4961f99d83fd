"""The step's rows, and the sums of keys (and values) that are kept for each physical KV block.

Sums are keyed by physical block and written when a block's tokens are written.  Prefix caching,
chunked prefill and preemption then need nothing more: a cached block keeps its sums, a block filled
over several steps accumulates them, and a block that is handed out again starts afresh at its first
token.  Which blocks are cubes is no state at all: it follows from the request (requests.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


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

    @property
    def query_lens(self) -> np.ndarray:
        return np.diff(self.query_start)

    @property
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


class BlockSums:
    """One layer's sum of each block's keys, in fp32, of which mean keys are made; or of its values.

    Sums come from the keys as they are written, not from the cache, whose layout belongs to the
    kernel and may be packed or fp8.  Only blocks that may become cubes are kept up to date.
    """

    def __init__(
        self, num_blocks: int, kv_heads: int, head_size: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self._sums = torch.zeros(num_blocks, kv_heads, head_size, device=device)

    @staticmethod
    def bytes_per_block(kv_heads: int, head_size: int) -> int:
        """Memory that one kind of sums takes for a KV block beside the cache, in one layer."""
        return kv_heads * head_size * torch.float32.itemsize

    def write(self, vectors: torch.Tensor, writes: SumWrites) -> None:
        """Add this step's keys (or values) ``[tokens, kv_heads, head_size]``."""
        if writes.whole_blocks is not None:
            cubes = vectors[writes.whole_tokens].unflatten(0, (-1, self.block_size))
            self._sums[writes.whole_blocks] = cubes.sum(dim=1, dtype=torch.float32)
        if writes.part_blocks is not None:
            self._sums[writes.fresh_blocks] = 0
            self._sums.index_add_(0, writes.part_blocks, vectors[writes.part_tokens].float())

    @property
    def sums(self) -> torch.Tensor:
        """``[physical blocks, kv_heads, head_size]`` fp32; stale where a block is no cube."""
        return self._sums

    def of(self, blocks: torch.Tensor) -> torch.Tensor:
        """The sums of ``blocks [...]``, ``[..., kv_heads, head_size]`` fp32; a copy."""
        return self._sums.index_select(0, blocks.flatten()).unflatten(0, blocks.shape)


@dataclass(frozen=True)
class SumWrites:
    """Which tokens of the step feed which block sums; index tensors on the device.

    Blocks written whole in this step are summed at once; video blocks that a chunk edge cuts
    accumulate over the steps that write them.
    """

    # [whole_blocks * block_size]; a slice where they are consecutive, which saves a copy
    whole_tokens: torch.Tensor | slice | None
    whole_blocks: torch.Tensor | None
    part_tokens: torch.Tensor | None
    part_blocks: torch.Tensor | None  # [part_tokens] physical block of each
    fresh_blocks: torch.Tensor | None  # part blocks whose first token is among these

    @property
    def empty(self) -> bool:
        return self.whole_blocks is None and self.part_blocks is None
