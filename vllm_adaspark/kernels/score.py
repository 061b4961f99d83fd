"""Cube probabilities: scores, softmax and pooling in two passes.

A VIDEO tile's queries (the tokens scored times the GQA group) each have a softmax over the cubes
before them, and the tile wants the mean of those.  A query's softmax is known only after all its
logits, so the mean needs them twice: kept (56 queries of 4096 cubes are 0.9 MB a tile and KV head)
or computed again.  A second product takes less time than writing and reading
them, so each score is computed twice, and charged twice (``kernels.score_products``):

1. a program per block of queries goes over the cubes and leaves the log-sum-exp of each query;
2. a program per block of cubes goes over the queries and sums ``exp(logit - log-sum-exp)``.

Products are in the queries' dtype with fp32 sums, all else in fp32, and in powers of two, which is
what the hardware has.  TEXT tiles, of a handful of queries, take both passes in one program, in
fp32.  The twins are ``methods/adaspark/score.py``'s ``_score_together`` and ``_score_each``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import interpreted, scores_heads_of

LOG2_E = 1.4426950408889634

# A block of queries and the blocks of keys in flight share a program's memory.  So many bytes
# are what the smallest GPUs with bf16 products have (compute capability 8.6 and 8.9: 99 KB).
SHARED_BYTES = 96 << 10


def cube_keys(
    vectors: torch.Tensor,
    blocks: torch.Tensor,
    is_cube: torch.Tensor,
    divisor: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """What is kept of a request's blocks, head by head: mean keys, of sums.

    Args:
        vectors: ``[physical blocks, kv_heads, size]``, see ``BlockSummaries``.
        blocks: ``[width]`` int64 physical blocks.
        is_cube: ``[width]`` bool; what is kept of other blocks is stale, and 0 here.
        divisor: what they are divided by.
        dtype: of the result; the queries'.

    Returns:
        ``[kv_heads, width, size]``.
    """
    _, kv_heads, size = vectors.shape
    width = len(blocks)
    keys = torch.empty(kv_heads, width, size, dtype=dtype, device=vectors.device)
    rows = 16
    _cube_keys[triton.cdiv(width, rows), kv_heads](
        vectors, blocks, is_cube.view(torch.uint8), keys, width, kv_heads, 1.0 / divisor,
        HEAD_SIZE=size, ROWS=rows, num_warps=4,
    )  # fmt: skip
    return keys


@triton.jit
def _cube_keys(
    vectors, blocks, is_cube, keys, width, kv_heads, factor,
    HEAD_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < width
    cube = inside & (tl.load(is_cube + row, mask=inside, other=0) != 0)
    block = tl.load(blocks + row, mask=cube, other=0).to(tl.int64)
    dim = tl.arange(0, HEAD_SIZE)
    source = (block * kv_heads + head)[:, None] * HEAD_SIZE + dim
    kept = tl.load(vectors + source, mask=cube[:, None], other=0.0).to(tl.float32) * factor
    target = (head * width + row).to(tl.int64)[:, None] * HEAD_SIZE + dim
    tl.store(keys + target, kept.to(keys.dtype.element_ty), mask=inside[:, None])


def pool_probabilities(
    probs: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    candidates: torch.Tensor,
    tile_of: torch.Tensor,
    tokens: torch.Tensor,
    limit: torch.Tensor,
    tile_size: int,
    scale: float,
) -> None:
    """Write the pooled probabilities of one request's VIDEO tiles into ``probs``.

    A logit is ``scale`` times the product of what a query asks with what is kept of a cube;
    ``size`` is the length of both, a head's size or twice that.

    Args:
        probs: ``[sparse, kv_heads, blocks]`` fp32, contiguous.  Of the rows of ``tile_of`` the
            columns below ``limit`` are written, the others left as they are.
        query: ``[kv_heads, tokens, group, size]`` contiguous; fp8 must be widened before.
        keys: ``[kv_heads, width, size]`` of the same dtype, from :func:`cube_keys`.
        candidates: ``[sparse, blocks]`` bool, contiguous; all others get 0.
        tile_of: ``[tiles]`` int64, each tile's row of ``probs`` and ``candidates``.
        tokens: ``[tiles * tile_size]`` int64 in ``query``; a tile's are consecutive ones.
        limit: ``[tiles]`` int32, a tile's candidates lie below it; at most ``width``.
        tile_size: tokens of a tile, which is the block size.
        scale: softmax scale.
    """
    kv_heads, in_step, group, head_size = query.shape
    if not scores_heads_of(head_size):
        raise ValueError(f"head_size={head_size}: the kernel wants a power of two from 16 to 256")
    tiles, width = len(tile_of), keys.shape[1]
    lse = torch.empty(kv_heads, tiles, tile_size * group, device=query.device)
    rows, columns, stages = block_shape(head_size, query.element_size(), width)
    shared = dict(
        HEAD_SIZE=head_size,
        QUERIES=tile_size * group,
        GROUP=group,
        ROWS=rows,
        COLUMNS=columns,
        WIDEN=interpreted(),  # the interpreter has no bf16 products
        num_warps=4,
        num_stages=stages,
    )
    valid, factor = candidates.view(torch.uint8), scale * LOG2_E
    _query_lse[triton.cdiv(tile_size * group, rows), tiles, kv_heads](
        query, keys, valid, tile_of, tokens, limit, lse,
        in_step, width, candidates.shape[1], factor, **shared,
    )  # fmt: skip
    _pool[triton.cdiv(width, columns), tiles, kv_heads](
        query, keys, valid, tile_of, tokens, limit, lse, probs,
        in_step, width, candidates.shape[1], factor, **shared,
    )  # fmt: skip


def block_shape(head_size: int, element_bytes: int, width: int) -> tuple[int, int, int]:
    """Queries and cubes in a block, and stages of the pipeline, so that all fit in SHARED_BYTES."""
    rows, columns, stages = 64, min(128, max(16, triton.next_power_of_2(width))), 2
    while (rows + stages * columns) * head_size * element_bytes > SHARED_BYTES:
        if columns > 16:
            columns //= 2
        else:
            rows //= 2
    return rows, columns, stages


@triton.jit
def _query_lse(
    query, keys, candidates, tile_of, tokens, limit, lse,
    in_step, width, blocks, factor,
    HEAD_SIZE: tl.constexpr, QUERIES: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp, base 2, of a block of a tile's queries; plus infinity without candidates."""
    tile, head = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_SIZE)
    first_token = tl.load(tokens + tile * (QUERIES // GROUP)).to(tl.int64)
    first_row = (first_token + head.to(tl.int64) * in_step) * GROUP
    q = tl.load(
        query + (first_row + row)[:, None] * HEAD_SIZE + dim,
        mask=(row < QUERIES)[:, None],
        other=0.0,
    )
    valid_row = candidates + tl.load(tile_of + tile).to(tl.int64) * blocks
    end = tl.load(limit + tile)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < end
        key_row = (head * width + column).to(tl.int64)
        k = tl.load(
            keys + key_row[None, :] * HEAD_SIZE + dim[:, None], mask=inside[None, :], other=0.0
        )
        if WIDEN:
            q, k = q.to(tl.float32), k.to(tl.float32)
        logit = tl.dot(q, k, input_precision="ieee") * factor
        valid = tl.load(valid_row + column, mask=inside, other=0) != 0
        logit = tl.where(valid[None, :], logit, float("-inf"))
        higher = tl.maximum(top, tl.max(logit, 1))
        # Until the first candidate all is minus infinity, whose difference would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logit - base[:, None]), 1)
        top = higher
    result = tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-30)), float("inf"))
    lse_row = (head * tl.num_programs(1) + tile).to(tl.int64) * QUERIES
    tl.store(lse + lse_row + row, result, mask=row < QUERIES)


@triton.jit
def _pool(
    query, keys, candidates, tile_of, tokens, limit, lse, probs,
    in_step, width, blocks, factor,
    HEAD_SIZE: tl.constexpr, QUERIES: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Mean over a tile's queries of the probabilities of a block of cubes."""
    tile, head = tl.program_id(1), tl.program_id(2)
    first = tl.program_id(0) * COLUMNS
    end = tl.load(limit + tile)
    if first >= end:
        return
    column = first + tl.arange(0, COLUMNS)
    inside = column < end
    dim = tl.arange(0, HEAD_SIZE)
    key_row = (head * width + column).to(tl.int64)
    k = tl.load(keys + key_row[:, None] * HEAD_SIZE + dim, mask=inside[:, None], other=0.0)
    first_token = tl.load(tokens + tile * (QUERIES // GROUP)).to(tl.int64)
    first_row = (first_token + head.to(tl.int64) * in_step) * GROUP
    lse_row = (head * tl.num_programs(1) + tile).to(tl.int64) * QUERIES

    mass = tl.zeros([COLUMNS], tl.float32)
    # Cubes are the rows of the product: a sum over queries then stays within a thread.
    for begin in range(0, QUERIES, ROWS):
        row = begin + tl.arange(0, ROWS)
        there = row < QUERIES
        q = tl.load(
            query + (first_row + row)[None, :] * HEAD_SIZE + dim[:, None],
            mask=there[None, :],
            other=0.0,
        )
        if WIDEN:
            q, k = q.to(tl.float32), k.to(tl.float32)
        logit = tl.dot(k, q, input_precision="ieee") * factor
        row_lse = tl.load(lse + lse_row + row, mask=there, other=float("inf"))
        mass += tl.sum(tl.exp2(logit - row_lse[None, :]), 1)
    probs_row = tl.load(tile_of + tile).to(tl.int64)
    valid = tl.load(candidates + probs_row * blocks + column, mask=inside, other=0) != 0
    out = (probs_row * tl.num_programs(2) + head) * blocks
    tl.store(probs + out + column, tl.where(valid, mass / QUERIES, 0.0), mask=inside)


def token_probabilities(
    probs: torch.Tensor,
    query: torch.Tensor,
    vectors: torch.Tensor,
    row_blocks: torch.Tensor,
    candidates: torch.Tensor,
    row: torch.Tensor,
    tile_of: torch.Tensor,
    tokens: torch.Tensor,
    limit: torch.Tensor,
    divisor: int,
    scale: float,
) -> None:
    """As :func:`pool_probabilities` for TEXT tiles: single tokens of several requests, in fp32.

    A program takes a token's few queries over all cubes, twice, and reads what is kept of blocks
    where it is: a token reads few cubes more than once, so there is nothing to prepare.

    Args:
        probs, query, candidates: as there.
        vectors: ``[physical blocks, kv_heads, size]``, see ``BlockSummaries``.
        row_blocks: ``[rows, blocks]`` int64 physical blocks.
        row: ``[job rows]`` int64, the requests' rows of ``row_blocks``.
        tile_of, tokens: ``[job rows, tokens]`` int64, contiguous.
        limit: ``[job rows, tokens]`` int32, a token's candidates lie below it.
        divisor: what ``vectors`` are divided by.
        scale: as there.
    """
    kv_heads, in_step, group, head_size = query.shape
    per_row = tokens.shape[1]
    _token_probabilities[tokens.numel(), kv_heads](
        query, vectors, row_blocks, candidates.view(torch.uint8), row, tile_of, tokens, limit,
        probs, in_step, candidates.shape[1], per_row, scale * LOG2_E / divisor,
        HEAD_SIZE=head_size, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)),
        COLUMNS=32 if head_size <= 128 else 16, num_warps=8, num_stages=2,
    )  # fmt: skip


@triton.jit
def _token_probabilities(
    query, vectors, row_blocks, candidates, row, tile_of, tokens, limit, probs,
    in_step, blocks, per_row, factor,
    HEAD_SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    item, head = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(1)
    dim, member = tl.arange(0, HEAD_SIZE), tl.arange(0, ROWS)
    there = member < GROUP
    first = (head.to(tl.int64) * in_step + tl.load(tokens + item)) * GROUP
    q = tl.load(
        query + (first + member)[:, None] * HEAD_SIZE + dim, mask=there[:, None], other=0.0
    ).to(tl.float32)
    table = row_blocks + tl.load(row + item // per_row) * blocks
    tile = tl.load(tile_of + item)
    valid_row = candidates + tile * blocks
    end = tl.load(limit + item)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for begin in range(0, end, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        valid = tl.load(valid_row + column, mask=column < end, other=0) != 0
        block = tl.load(table + column, mask=valid, other=0)
        key_row = (block * kv_heads + head) * HEAD_SIZE
        k = tl.load(vectors + key_row[:, None] + dim, mask=valid[:, None], other=0.0).to(tl.float32)
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        logit = tl.where(valid[None, :], logit, float("-inf"))
        higher = tl.maximum(top, tl.max(logit, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logit - base[:, None]), 1)
        top = higher
    lse = tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-30)), float("inf"))
    lse = tl.where(there, lse, float("inf"))  # rows beyond the group add nothing

    out = probs + (tile * kv_heads + head) * blocks
    for begin in range(0, end, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        valid = tl.load(valid_row + column, mask=column < end, other=0) != 0
        block = tl.load(table + column, mask=valid, other=0)
        key_row = (block * kv_heads + head) * HEAD_SIZE
        k = tl.load(vectors + key_row[:, None] + dim, mask=valid[:, None], other=0.0).to(tl.float32)
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
        mass = tl.sum(tl.exp2(logit - lse[:, None]), 0)
        tl.store(out + column, tl.where(valid, mass / GROUP, 0.0), mask=column < end)
