"""The GPU benchmark's own paged attention, for machines without vLLM.  The plugin does not use it.

A flash-attention loop in Triton over the pages of a block table, as the plugin hands it to vLLM's
kernels: each sequence has one KV head, its queries are the last of its tokens, and the heads of the
GQA group are further rows of the same product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_adaspark.kernels import interpreted

LOG2_E = 1.4426950408889634

# (rows, columns, warps, stages): the benchmark takes the fastest for a page size.
CONFIGS = ((64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2))


def paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start: torch.Tensor,
    max_query_len: int,
    scale: float,
    out: torch.Tensor,
    config: tuple[int, int, int, int] = CONFIGS[0],
) -> None:
    """Causal attention of ``n`` sequences.

    Args:
        query: ``[queries, group, head_size]`` contiguous, of all sequences in turn.
        cache: ``[pages, page_size, 2 * head_size]`` contiguous, keys then values.
        block_table: ``[n, width]`` int32.
        seq_lens: ``[n]`` int32 keys of each sequence, its own queries included.
        query_start: ``[n + 1]`` int32.
        max_query_len: the most queries of a sequence.
        scale: softmax scale.
        out: like ``query``.
        config: one of ``CONFIGS``.
    """
    _, group, head_size = query.shape
    rows, columns, warps, stages = config
    sequences = len(seq_lens)
    _paged_attention[triton.cdiv(max_query_len * group, rows), sequences](
        query, cache, block_table, seq_lens, query_start, out, block_table.stride(0),
        scale * LOG2_E, GROUP=group, HEAD_SIZE=head_size, PAGE=cache.shape[1], ROWS=rows,
        COLUMNS=columns, WIDEN=interpreted(), num_warps=warps, num_stages=stages,
    )  # fmt: skip


@triton.jit
def _paged_attention(
    query, cache, block_table, seq_lens, query_start, out, table_stride, factor,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # Later tiles have more keys: they go first, so that none of them is left over at the end.
    sequence = tl.num_programs(1) - 1 - tl.program_id(1)
    start = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - start
    length = tl.load(seq_lens + sequence)
    first_row = tl.program_id(0) * ROWS
    if first_row >= queries * GROUP:
        return
    row = first_row + tl.arange(0, ROWS)
    there = (row < queries * GROUP)[:, None]
    dim = tl.arange(0, HEAD_SIZE)
    at = (start.to(tl.int64) * GROUP + row)[:, None] * HEAD_SIZE + dim
    q = tl.load(query + at, mask=there, other=0.0)
    last = length - queries + row // GROUP  # the last key that a row sees
    table = block_table + sequence.to(tl.int64) * table_stride

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, HEAD_SIZE], tl.float32)
    unmasked = (length - queries) // COLUMNS * COLUMNS
    for first in range(0, unmasked, COLUMNS):
        top, total, sums = _step(
            q, cache, table, first, length, last, factor, top, total, sums,
            HEAD_SIZE, PAGE, COLUMNS, False, WIDEN,
        )  # fmt: skip
    for first in range(unmasked, length, COLUMNS):
        top, total, sums = _step(
            q, cache, table, first, length, last, factor, top, total, sums,
            HEAD_SIZE, PAGE, COLUMNS, True, WIDEN,
        )  # fmt: skip
    tl.store(out + at, (sums / total[:, None]).to(out.dtype.element_ty), mask=there)


@triton.jit
def _step(
    q, cache, table, first, length, last, factor, top, total, sums,
    HEAD_SIZE: tl.constexpr, PAGE: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """A block of keys: pages may be larger or smaller than it."""
    column = first + tl.arange(0, COLUMNS)
    dim = tl.arange(0, HEAD_SIZE)
    if PAGE >= COLUMNS:
        slot = tl.load(table + first // PAGE).to(tl.int64) * PAGE + column % PAGE
    elif MASKED:
        page = tl.load(table + column // PAGE, mask=column < length, other=0)
        slot = page.to(tl.int64) * PAGE + column % PAGE
    else:
        slot = tl.load(table + column // PAGE).to(tl.int64) * PAGE + column % PAGE
    at = slot[:, None] * (2 * HEAD_SIZE) + dim[None, :]
    if MASKED:
        k = tl.load(cache + at, mask=(column < length)[:, None], other=0.0)
        v = tl.load(cache + at + HEAD_SIZE, mask=(column < length)[:, None], other=0.0)
    else:
        k = tl.load(cache + at)
        v = tl.load(cache + at + HEAD_SIZE)
    if WIDEN:
        q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
    logit = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        logit = tl.where(column[None, :] <= last[:, None], logit, float("-inf"))
    higher = tl.maximum(top, tl.max(logit, 1) * factor)
    p = tl.exp2(logit * factor - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(p, 1)
    sums = sums * shrink[:, None]
    sums = tl.dot(p.to(v.dtype), v, acc=sums, input_precision="ieee")
    return higher, total, sums
