"""VideoNSA's compressed branch and its choice of blocks, without waiting for the GPU.

A program takes some tokens with the query heads of one KV head and goes over the mean keys twice:
first for the output and the log-sum-exp of each query, then, with that known, for the importances,
the probabilities summed over the heads of the group.  Logits are computed again rather than kept,
as in ``score.py``: keeping them would write ``heads * tokens * blocks`` numbers.

Logits must be fp32: in bf16 near-ties between blocks come out the other way.  Tensor cores have no
fp32, but a bf16 query times an fp32 key is the exact sum of the query times three bf16 numbers
whose sum is the key.  Other dtypes take plain fp32 products.

:func:`best` takes the most important columns of each row without a sort: the bits of a float that
is not negative order like the float, so halving their range finds the last value that is kept (as
``nucleus.py`` does by mass).  The twins are in ``videonsa_twins.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import MAX_CHOICES, interpreted, scores_heads_of
from .score import LOG2_E, SHARED_BYTES

# Importances held at a time, in numbers: they are read once, by `best`, and then of no use.
SLAB_IMPORTANCES = 1 << 25


def compress_and_choose(
    query: torch.Tensor,
    tokens: torch.Tensor,
    mean_keys: torch.Tensor,
    mean_values: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    longest: int,
    scale: float,
    places: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`compress`, then :func:`best` of its importances, in slabs of tokens.

    Returns:
        ``[n, heads, d]`` fp32, and ``[n, kv_heads, places]`` int32: the chosen means, by their
        place in ``mean_keys`` (``begin`` added), rising, then -1.
    """
    n, kv_heads = len(tokens), len(mean_keys)
    out = torch.empty(n, *query.shape[1:], device=query.device)
    chosen = torch.empty(n, kv_heads, places, dtype=torch.int32, device=query.device)
    step = max(1, SLAB_IMPORTANCES // (kv_heads * max(1, longest)))
    for first in range(0, n, step):
        slab = slice(first, first + step)
        out[slab], importance = compress(
            query, tokens[slab], mean_keys, mean_values, begin[slab], end[slab], longest, scale
        )
        columns = best(importance, end[slab] - begin[slab], places)
        chosen[slab] = torch.where(columns < 0, -1, columns + begin[slab, None, None])
    return out, chosen


def compress(
    query: torch.Tensor,
    tokens: torch.Tensor,
    mean_keys: torch.Tensor,
    mean_values: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    longest: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``videonsa_twins.compress``.

    Raises:
        ValueError: the head size is no power of two from 16 to 256.
    """
    _, heads, d = query.shape
    if not scores_heads_of(d):
        raise ValueError(f"head_size={d}: the kernel wants a power of two from 16 to 256")
    kv_heads, width, _ = mean_keys.shape
    n, group = len(tokens), heads // kv_heads
    out = torch.empty(n, heads, d, device=query.device)
    importance = torch.empty(n, kv_heads, longest, device=query.device)
    if not n:
        return out, importance
    padded = triton.next_power_of_2(group)
    rows, columns = block_shape(d, padded, query.element_size())
    _compress[triton.cdiv(n, rows // padded), kv_heads](
        query, tokens, mean_keys, mean_values, begin, end, out, importance,
        n, width, longest, scale * LOG2_E,
        HEAD_SIZE=d, GROUP=group, PADDED=padded, TOKENS=rows // padded, COLUMNS=columns,
        SPLIT=query.dtype == torch.bfloat16, WIDEN=interpreted(), num_warps=4, num_stages=1,
    )  # fmt: skip
    return out, importance


def block_shape(head_size: int, padded: int, element_bytes: int) -> tuple[int, int]:
    """Query rows of a program and means of a block, so that both fit in SHARED_BYTES."""
    # Larger blocks spill registers (compiled for compute capability 8.0; nobody has timed them).
    rows, columns = max(16, padded, 128 // element_bytes), 32

    def bytes_used() -> int:  # queries, mean keys in fp32, mean values
        return head_size * (rows * element_bytes + columns * (4 + element_bytes))

    while bytes_used() > SHARED_BYTES and columns > 16:
        columns //= 2
    while bytes_used() > SHARED_BYTES and rows > max(16, padded):
        rows //= 2
    return rows, columns


@triton.jit
def _compress(
    query, tokens, mean_keys, mean_values, begin, end, out, importance,
    n, width, longest, factor,
    HEAD_SIZE: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    head, kv_heads = tl.program_id(1), tl.num_programs(1)
    row = tl.arange(0, TOKENS * PADDED)
    dim = tl.arange(0, HEAD_SIZE)
    nth, member = tl.program_id(0) * TOKENS + row // PADDED, row % PADDED
    there = (nth < n) & (member < GROUP)
    token = tl.load(tokens + nth, mask=there, other=0).to(tl.int64)
    q_row = (token * kv_heads + head) * GROUP + member
    q = tl.load(query + q_row[:, None] * HEAD_SIZE + dim, mask=there[:, None], other=0.0)
    first = tl.load(begin + nth, mask=there, other=width)
    last = tl.load(end + nth, mask=there, other=0)
    low, high = tl.min(first, 0), tl.max(last, 0)
    keys = mean_keys + head.to(tl.int64) * width * HEAD_SIZE
    values = mean_values + head.to(tl.int64) * width * HEAD_SIZE

    top = tl.full([TOKENS * PADDED], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS * PADDED], tl.float32)
    sums = tl.zeros([TOKENS * PADDED, HEAD_SIZE], tl.float32)
    for start in range(low, high, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        logit = _logits(q, keys, column, high, HEAD_SIZE, SPLIT, WIDEN) * factor
        seen = (column[None, :] >= first[:, None]) & (column[None, :] < last[:, None])
        logit = tl.where(seen, logit, float("-inf"))
        higher = tl.maximum(top, tl.max(logit, 1))
        # Until the first mean that is seen all is minus infinity, whose difference would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p, shrink = tl.exp2(logit - base[:, None]), tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        at = column[:, None] * HEAD_SIZE + dim[None, :]
        v = tl.load(values + at, mask=(column < high)[:, None], other=0.0)
        p = p.to(v.dtype)
        if WIDEN:
            p, v = p.to(tl.float32), v.to(tl.float32)
        sums = tl.dot(p, v, acc=sums * shrink[:, None], input_precision="ieee")
        top = higher
    # Where nothing is seen the sums are 0, and so is the output.
    mixed = sums / tl.where(total > 0, total, 1.0)[:, None]
    out_row = (nth.to(tl.int64) * kv_heads + head) * GROUP + member
    tl.store(out + out_row[:, None] * HEAD_SIZE + dim, mixed, mask=there[:, None])

    lse = tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-30)), float("inf"))
    mine = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)  # a row of importances per token
    my_first = tl.load(begin + mine, mask=mine < n, other=width)
    my_last = tl.load(end + mine, mask=mine < n, other=0)
    my_row = importance + (mine.to(tl.int64) * kv_heads + head) * longest - my_first
    for start in range(low, high, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        logit = _logits(q, keys, column, high, HEAD_SIZE, SPLIT, WIDEN) * factor
        p = tl.exp2(logit - lse[:, None])  # 0 in rows of padding, which see nothing
        mass = tl.sum(tl.reshape(p, [TOKENS, PADDED, COLUMNS]), 1)
        seen = (column[None, :] >= my_first[:, None]) & (column[None, :] < my_last[:, None])
        tl.store(my_row[:, None] + column[None, :], mass, mask=seen)


@triton.jit
def _logits(
    q, keys, column, high,
    HEAD_SIZE: tl.constexpr, SPLIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Products ``[rows, columns]`` in fp32 accuracy."""
    dim = tl.arange(0, HEAD_SIZE)
    at = column[None, :] * HEAD_SIZE + dim[:, None]
    k = tl.load(keys + at, mask=(column < high)[None, :], other=0.0)  # [d, columns]
    if SPLIT:
        one = k.to(tl.bfloat16)
        rest = k - one.to(tl.float32)
        two = rest.to(tl.bfloat16)
        three = (rest - two.to(tl.float32)).to(tl.bfloat16)
        if WIDEN:  # the interpreter has no bf16 products
            q = q.to(tl.float32)
            one, two, three = one.to(tl.float32), two.to(tl.float32), three.to(tl.float32)
        logit = tl.dot(q, three, input_precision="ieee")  # the smallest first
        logit = tl.dot(q, two, acc=logit, input_precision="ieee")
        logit = tl.dot(q, one, acc=logit, input_precision="ieee")
    else:
        logit = tl.dot(q.to(tl.float32), k, input_precision="ieee")
    return logit


def best(importance: torch.Tensor, count: torch.Tensor, places: int) -> torch.Tensor:
    """As ``videonsa_twins.best``.

    Raises:
        ValueError: a row has more entries than a program holds.
    """
    n, kv_heads, longest = importance.shape
    if longest > MAX_CHOICES:
        raise ValueError(f"{longest} blocks to choose from: the kernel takes {MAX_CHOICES}")
    chosen = torch.empty(n, kv_heads, places, dtype=torch.int32, device=importance.device)
    if chosen.numel():
        block = max(16, triton.next_power_of_2(longest))
        _best[n, kv_heads](
            importance, count, chosen, longest, places,
            BLOCK=block, PLACES=triton.next_power_of_2(places),
            num_warps=1 if block <= 512 else 4 if block <= 4096 else 8,
        )  # fmt: skip
    return chosen


@triton.jit
def _best(importance, count, chosen, longest, places, BLOCK: tl.constexpr, PLACES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    entries = tl.load(count + tl.program_id(0))
    column = tl.arange(0, BLOCK)
    inside = column < entries
    value = tl.load(importance + row * longest + column, mask=inside, other=0.0)
    bits = tl.where(inside, tl.maximum(value, 0.0).to(tl.int32, bitcast=True), -1)

    # The smallest value that fewer than `places` entries exceed: in (low, high].
    low = tl.full([], -2, tl.int32)
    high = tl.full([], 0x7F800000, tl.int32)  # infinity: nothing is above it
    for _ in range(32):
        middle = low + (high - low) // 2
        few = tl.sum((bits > middle).to(tl.int32), 0) < places
        low = tl.where(few, low, middle)
        high = tl.where(few, middle, high)
    above, equal = bits > high, bits == high
    nth = tl.cumsum(equal.to(tl.int32), 0)  # of the entries of that value: the earlier first
    more = places - tl.sum(above.to(tl.int32), 0)
    keep = inside & (above | (equal & (nth <= more)))
    rank = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(chosen + row * places + rank, column, mask=keep)
    place = tl.arange(0, PLACES)
    empty = (place >= tl.sum(keep.to(tl.int32), 0)) & (place < places)
    tl.store(chosen + row * places + place, -1, mask=empty)
