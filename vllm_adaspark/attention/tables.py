"""From kept blocks to a paged kernel's own arguments.

Every (tile, KV head) becomes a *virtual sequence* of a model with one KV head: its block table
lists the kept blocks and, last, the tile's own block.  The head-major cache ``[blocks, kv_heads,
...]`` is viewed as ``[blocks * kv_heads, 1, ...]``: block b of head h becomes ``b * kv_heads + h``.
Virtual sequences are ordered head by head, so queries need one transposition and no index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .plan import AttentionPlan


@dataclass(frozen=True)
class VirtualBatch:
    """Arguments for a paged attention kernel; ``n = kv_heads * tiles`` virtual sequences."""

    query_start: torch.Tensor  # [n + 1] int32
    seq_lens: torch.Tensor  # [n] int32
    block_table: torch.Tensor  # [n, blocks + 1] int32; the last column is never read
    kept_blocks: torch.Tensor  # [kv_heads, tiles] int64, own block included


def build_tables(
    chosen: torch.Tensor, plan: AttentionPlan, block_size: int, query_start: torch.Tensor
) -> VirtualBatch:
    """Block tables for one layer.

    Args:
        chosen: ``[sparse, kv_heads, blocks]`` bool, from score.choose_cubes.
        plan: the step's plan.
        block_size: tokens in a KV block.
        query_start: from :func:`virtual_query_start`.
    """
    kv_heads = chosen.shape[1]
    tiles, width = plan.always.shape
    kept = plan.always.expand(kv_heads, tiles, width).clone()
    kept[:, plan.sparse_tiles] |= chosen.transpose(0, 1)

    # Compact to the left: the k-th kept block goes to column k, all others to a spare last column.
    rank = kept.cumsum(-1, dtype=torch.int32)
    column = torch.where(kept, rank - 1, width).to(torch.int64)
    head = torch.arange(kv_heads, dtype=torch.int32, device=kept.device)
    physical = plan.blocks * kv_heads + head[:, None, None]  # [kv_heads, tiles, blocks]
    table = torch.zeros(kv_heads, tiles, width + 1, dtype=torch.int32, device=kept.device)
    table.scatter_(-1, column, physical)

    kept_blocks = rank[..., -1]  # [kv_heads, tiles]
    seq_lens = kept_blocks * block_size - plan.tail_gap
    return VirtualBatch(query_start, seq_lens.view(-1), table.flatten(0, 1), kept_blocks)


def virtual_query_start(plan: AttentionPlan, kv_heads: int) -> torch.Tensor:
    """``[kv_heads * tiles + 1]`` int32 first query of each virtual sequence, as in all layers."""
    head = torch.arange(kv_heads, dtype=torch.int32, device=plan.query_start.device)
    starts = plan.query_start[:-1] + head[:, None] * plan.num_tokens
    return torch.cat([starts.view(-1), plan.query_start[-1:] * kv_heads])


def to_virtual(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """``[tokens, heads, d]`` to ``[kv_heads * tokens, heads / kv_heads, d]``, head by head."""
    tokens, heads, size = query.shape
    by_head = query.view(tokens, kv_heads, -1, size).transpose(0, 1)
    return by_head.reshape(-1, heads // kv_heads, size)


def from_virtual(output: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """The inverse of :func:`to_virtual`, as a view ``[tokens, kv_heads, group, d]``."""
    return output.unflatten(0, (kv_heads, -1)).transpose(0, 1)
