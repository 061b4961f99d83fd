"""From kept blocks to a paged kernel's own arguments.

Every (tile, KV head) becomes a *virtual sequence* of a model with one KV head: its block table
lists the kept blocks and, last, the tile's own block.  The head-major cache ``[blocks, kv_heads,
...]`` is viewed as ``[blocks * kv_heads, 1, ...]``: block b of head h becomes ``b * kv_heads + h``.
Virtual sequences are ordered head by head, so queries need one transposition and no index.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..kernels import use_triton
from .tiles import TilePlan


@dataclass(frozen=True)
class Sequences:
    """Sequences for a paged attention kernel; their queries lie one after the other.

    The last query of a sequence sees all of its keys, each one before it sees one key less.

    Attributes:
        query_start: ``[n + 1]`` int32 first query of each sequence.
        seq_lens: ``[n]`` int32 keys of each.
        block_table: ``[n, blocks]`` int32; columns past a sequence's keys are never read.
        queries: of all sequences.
        max_query_len: the most queries that a sequence has.
        max_seq_len: the most keys, or more.
        schedules: what the CPU adapter made of these lengths before, so that the layers of a step
            need not do it again.
    """

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    queries: int
    max_query_len: int
    max_seq_len: int
    schedules: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class VirtualBatch:
    """Arguments for a paged attention kernel; ``n = kv_heads * tiles`` virtual sequences.

    The table may lie in the step's scratch: it lasts until the next layer chooses.
    """

    seq_lens: torch.Tensor  # [n] int32
    block_table: torch.Tensor  # [n, blocks + 1] int32; the last column is never read
    kept_blocks: torch.Tensor  # [kv_heads, tiles] int32, own block included


def build_tables(chosen: torch.Tensor, plan: TilePlan, block_size: int) -> VirtualBatch:
    """Block tables for one layer.

    Args:
        chosen: ``[sparse, kv_heads, blocks]`` bool, from score.choose_cubes.
        plan: the step's plan.
        block_size: tokens in a KV block.
    """
    if use_triton(chosen):
        from ..kernels.tables import compact_tables

        table, seq_lens, kept_blocks = compact_tables(
            chosen, plan.always, plan.blocks, plan.sparse_of, plan.tail_gap, block_size
        )
        return VirtualBatch(seq_lens, table, kept_blocks)
    kv_heads = chosen.shape[1]
    tiles, width = plan.always.shape
    shape = (kv_heads, tiles, width)

    def buffer(name: str, dtype: torch.dtype, *, spare: int = 0) -> torch.Tensor:
        return plan.scratch.take(name, (kv_heads, tiles, width + spare), dtype, chosen.device)

    kept = buffer("kept", torch.bool)  # the others lie where the scores were
    if len(chosen) == tiles:  # the sparse tiles are all there are, in the same order
        torch.bitwise_or(chosen.transpose(0, 1), plan.always, out=kept)
    else:
        kept.copy_(plan.always.expand(shape))
        kept[:, plan.sparse_tiles] |= chosen.transpose(0, 1)

    head = torch.arange(kv_heads, dtype=torch.int32, device=kept.device)[:, None, None]
    virtual = torch.add(plan.blocks * kv_heads, head, out=buffer("products", torch.int32))
    # Compact to the left: the k-th kept block goes to column k, all others to a spare column 0.
    column = torch.cumsum(kept, -1, out=buffer("logits", torch.int64))
    kept_blocks = column[..., -1].int()  # [kv_heads, tiles]
    table = buffer("probabilities", torch.int32, spare=2).zero_()
    table.scatter_(-1, column.mul_(kept), virtual)

    seq_lens = kept_blocks * block_size - plan.tail_gap
    return VirtualBatch(seq_lens.view(-1), table.flatten(0, 1)[:, 1:], kept_blocks)


@dataclass(frozen=True)
class SharedTensors:
    """What the layers of a step share: they run one after the other, so buffers can be used again.

    On a CPU this saves the page faults of two large allocations per layer.
    """

    query_start: torch.Tensor  # [kv_heads * tiles + 1] int32 first query of each virtual sequence
    query: torch.Tensor  # [kv_heads, tokens, group, d]
    output: torch.Tensor  # the same, in the output's dtype

    @classmethod
    def make(
        cls, plan: TilePlan, query: torch.Tensor, output: torch.Tensor, kv_heads: int
    ) -> SharedTensors:
        """For queries like ``query`` and outputs like ``output``, ``[tokens, heads, d]``."""
        head = torch.arange(kv_heads, dtype=torch.int32, device=query.device)
        starts = plan.query_start[:-1] + head[:, None] * plan.num_tokens
        query_start = torch.cat([starts.view(-1), plan.query_start[-1:] * kv_heads])
        shape = (kv_heads, plan.num_tokens, query.shape[1] // kv_heads, query.shape[2])
        return cls(query_start, query.new_empty(shape), output.new_empty(shape))


def to_virtual(query: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``[tokens, heads, d]`` into ``out [kv_heads, tokens, heads / kv_heads, d]``."""
    return out.copy_(query.unflatten(1, (len(out), -1)).transpose(0, 1))
