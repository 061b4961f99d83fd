"""Kept blocks to block tables in one launch: union, running count, scatter and lengths.

One program per (tile, KV head) walks along the request's blocks, keeps count, and writes each kept
block at its rank.  The twin is ``paged/tables.py``'s ``build_tables``, which does the same with
a cumulative sum and a scatter over all of ``[kv_heads, tiles, blocks]``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def compact_tables(
    chosen: torch.Tensor,
    always: torch.Tensor,
    blocks: torch.Tensor,
    sparse_of: torch.Tensor,
    tail_gap: torch.Tensor,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block tables of the virtual batch, ``n = kv_heads * tiles`` sequences, head by head.

    Args:
        chosen: ``[sparse, kv_heads, blocks]`` bool.
        always: ``[tiles, blocks]`` bool, attended without being chosen.
        blocks: ``[tiles, blocks]`` int32 physical blocks.
        sparse_of: ``[tiles]`` int32, each tile's row of ``chosen``, -1 for DENSE ones.
        tail_gap: ``[tiles]`` int32 slots of the last block after the tile's last token.
        block_size: tokens in a KV block.

    Returns:
        ``table [n, blocks + 1]`` int32, zero after the kept ones; ``seq_lens [n]`` int32;
        ``kept_blocks [kv_heads, tiles]`` int32.
    """
    kv_heads = chosen.shape[1]
    tiles, width = always.shape
    device = chosen.device
    table = torch.empty(kv_heads * tiles, width + 1, dtype=torch.int32, device=device)
    seq_lens = torch.empty(kv_heads * tiles, dtype=torch.int32, device=device)
    kept_blocks = torch.empty(kv_heads, tiles, dtype=torch.int32, device=device)
    _compact[tiles, kv_heads](
        chosen.contiguous().view(torch.uint8), always.view(torch.uint8), blocks, sparse_of,
        tail_gap, table, seq_lens, kept_blocks, width, block_size,
        CHUNK=min(1024, triton.next_power_of_2(width + 1)), num_warps=4,
    )  # fmt: skip
    return table, seq_lens, kept_blocks


@triton.jit
def _compact(
    chosen, always, blocks, sparse_of, tail_gap, table, seq_lens, kept_blocks, width, block_size,
    CHUNK: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    tiles, kv_heads = tl.num_programs(0), tl.num_programs(1)
    sparse = tl.load(sparse_of + tile)
    chosen_row = (tl.maximum(sparse, 0).to(tl.int64) * kv_heads + head) * width
    choices = tl.where(sparse >= 0, width, 0)
    tile_row = tile.to(tl.int64) * width
    sequence = head * tiles + tile
    table_row = sequence.to(tl.int64) * (width + 1)

    count = tl.full([], 0, tl.int32)
    for first in range(0, width, CHUNK):
        column = first + tl.arange(0, CHUNK)
        inside = column < width
        keep = tl.load(always + tile_row + column, mask=inside, other=0)
        keep |= tl.load(chosen + chosen_row + column, mask=column < choices, other=0)
        keep = (keep != 0).to(tl.int32)
        rank = count + tl.cumsum(keep, 0) - keep
        block = tl.load(blocks + tile_row + column, mask=inside, other=0)
        tl.store(table + table_row + rank, block * kv_heads + head, mask=keep != 0)
        count += tl.sum(keep, 0)
    for first in range(0, width + 1, CHUNK):
        column = first + tl.arange(0, CHUNK)
        tl.store(table + table_row + column, 0, mask=(column >= count) & (column <= width))
    tl.store(kept_blocks + sequence, count)
    tl.store(seq_lens + sequence, count * block_size - tl.load(tail_gap + tile))
