"""VideoNSA's selected branch: every token attends to KV blocks of its own choice.

A program takes one token and the query heads of one KV head, padded to the 16 rows of a tensor-core
product, and goes over the chosen blocks with an online softmax; the token's own block comes last,
up to the token itself.  Blocks are read where vLLM keeps them, in the head-major cache (layout
LBHNC), so nothing is gathered.  Neighbouring tokens choose much the same blocks and run at the same
time, so most reads are the L2 cache's.

The twin is ``videonsa_twins.select``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import interpreted, scores_heads_of
from .score import LOG2_E

CONFIG = (4, 2)  # warps and pipeline stages of a program; not tuned, see benchmarks/gpu_kernels.py


def select(
    query: torch.Tensor,
    tokens: torch.Tensor,
    cache: torch.Tensor,
    pages: torch.Tensor,
    own: torch.Tensor,
    offset: torch.Tensor,
    scale: float,
    config: tuple[int, int] = CONFIG,
) -> torch.Tensor:
    """As ``videonsa_twins.select``.

    Raises:
        ValueError: the cache's dtype is not the queries', its memory is not contiguous, or a size
            is no power of two that fits.
    """
    _, heads, d = query.shape
    _, kv_heads, block_size, content = cache.shape
    if cache.dtype != query.dtype:
        raise ValueError(f"cache of {cache.dtype}, queries of {query.dtype}: they must be the same")
    if not cache.is_contiguous() or content != 2 * d:
        raise ValueError(
            f"cache of shape {tuple(cache.shape)} and strides {cache.stride()}: the kernel wants "
            f"contiguous [blocks, kv_heads, block_size, {2 * d}]"
        )
    if not scores_heads_of(d) or block_size < 16 or block_size.bit_count() != 1:
        raise ValueError(
            f"head_size={d}, block_size={block_size}: the kernel wants powers of two, from 16 to "
            "256 and from 16"
        )
    n, places, group = len(tokens), pages.shape[2], heads // kv_heads
    out = torch.empty(n, heads, d, dtype=query.dtype, device=query.device)
    if n:
        warps, stages = config
        _select[n, kv_heads](
            query, tokens, cache, pages, own, offset, out, places, scale * LOG2_E,
            HEAD_SIZE=d, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)), PAGE=block_size,
            PLACES=triton.next_power_of_2(max(1, places)), WIDEN=interpreted(),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


@triton.jit
def _select(
    query, tokens, cache, pages, own, offset, out, places, factor,
    HEAD_SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
    PLACES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    nth, head, kv_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    dim, member = tl.arange(0, HEAD_SIZE), tl.arange(0, ROWS)
    there = (member < GROUP)[:, None]
    q_row = (tl.load(tokens + nth).to(tl.int64) * kv_heads + head) * GROUP + member
    q = tl.load(query + q_row[:, None] * HEAD_SIZE + dim, mask=there, other=0.0)

    mine = pages + (nth * kv_heads + head) * places
    place = tl.arange(0, PLACES)
    valid = tl.load(mine + place, mask=place < places, other=-1) >= 0
    used = tl.max(tl.where(valid, place + 1, 0), 0)  # nothing is chosen from there on

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, HEAD_SIZE], tl.float32)
    for nth_place in range(0, used):
        page = tl.load(mine + nth_place)
        end = tl.where(page >= 0, PAGE, 0)  # of a place without a block nothing is read
        top, total, sums = _block(
            q, cache, tl.maximum(page, 0).to(tl.int64) * kv_heads + head, end, factor,
            top, total, sums, HEAD_SIZE, PAGE, WIDEN,
        )  # fmt: skip
    my_block = tl.load(own + nth).to(tl.int64) * kv_heads + head
    top, total, sums = _block(
        q, cache, my_block, tl.load(offset + nth) + 1, factor,
        top, total, sums, HEAD_SIZE, PAGE, WIDEN,
    )  # fmt: skip
    out_row = (nth * kv_heads + head) * GROUP + member
    result = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + out_row[:, None] * HEAD_SIZE + dim, result, mask=there)


@triton.jit
def _block(
    q, cache, block, end, factor, top, total, sums,
    HEAD_SIZE: tl.constexpr, PAGE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One block's first ``end`` tokens; ``block`` counts blocks of a single KV head."""
    dim, slot = tl.arange(0, HEAD_SIZE), tl.arange(0, PAGE)
    seen = slot < end
    at = (block * PAGE + slot)[:, None] * (2 * HEAD_SIZE) + dim[None, :]
    k = tl.load(cache + at, mask=seen[:, None], other=0.0)
    v = tl.load(cache + at + HEAD_SIZE, mask=seen[:, None], other=0.0)
    if WIDEN:  # the interpreter has no bf16 products
        q, k, v = q.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
    logit = tl.dot(q, tl.trans(k), input_precision="ieee") * factor
    logit = tl.where(seen[None, :], logit, float("-inf"))
    higher = tl.maximum(top, tl.max(logit, 1))
    # Before the first block that is there all is minus infinity, whose difference would be NaN.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p, shrink = tl.exp2(logit - base[:, None]), tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    sums = tl.dot(p.to(v.dtype), v, acc=sums * shrink[:, None], input_precision="ieee")
    return higher, total, sums
