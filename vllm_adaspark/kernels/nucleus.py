"""Top-p without a sort: the threshold is searched for.

An entry is kept when the mass ranked before it is below the share, or its rank below ``min_keep``.
Both grow as entries get smaller, so the kept entries are those above one value, and of those equal
to it the first few.  The bits of a non-negative float, read as an integer, order like the float;
31 halvings of that range find the value exactly, each a comparison and two sums over a row
in registers.  The twin is ``choose.top_p``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import MAX_CHOICES


def takes(probs: torch.Tensor) -> bool:
    """Whether :func:`top_p` can: fp32, three dimensions at most, rows that fit."""
    return probs.dtype == torch.float32 and probs.ndim <= 3 and probs.shape[-1] <= MAX_CHOICES


def top_p(
    probs: torch.Tensor, valid: torch.Tensor, share: torch.Tensor, min_keep: torch.Tensor
) -> torch.Tensor:
    """As ``choose.top_p``: same arguments, shapes, ties and result.

    For probabilities that it :func:`takes`.  Nothing is copied: broadcast (expanded) arguments are
    read as they are.
    """
    shape = probs.shape
    if not takes(probs):
        raise ValueError(
            f"probs of dtype {probs.dtype} and shape {tuple(shape)}: the kernel takes float32, "
            f"three dimensions at most and {MAX_CHOICES} entries; use choose.top_p"
        )
    kept = torch.empty(shape, dtype=torch.bool, device=probs.device)
    if not kept.numel():
        return kept
    probs, valid, rows = (_three(each.expand(shape)) for each in (probs, valid, kept))
    share, least = (_three(each.expand(shape[:-1]).unsqueeze(-1)) for each in (share, min_keep))
    outer, inner, n = probs.shape
    block = triton.next_power_of_2(n)
    _top_p[outer, inner](
        probs, valid.view(torch.uint8), share, least, rows.view(torch.uint8), n,
        *probs.stride(), *valid.stride(), *share.stride()[:2], *least.stride()[:2],
        *rows.stride()[:2],
        BLOCK=block, num_warps=1 if block <= 256 else 4 if block <= 4096 else 8,
    )  # fmt: skip
    return kept


def _three(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with leading dimensions of one until there are three."""
    return tensor[(None,) * (3 - tensor.ndim)]


@triton.jit
def _top_p(
    probs, valid, share, least, kept, n,
    probs_0, probs_1, probs_2, valid_0, valid_1, valid_2, share_0, share_1, least_0, least_1,
    kept_0, kept_1,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i, j = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < n
    there = tl.load(valid + i * valid_0 + j * valid_1 + column * valid_2, mask=inside, other=0) != 0
    p = tl.load(probs + i * probs_0 + j * probs_1 + column * probs_2, mask=there, other=0.0)
    p = tl.maximum(p, 0.0)  # a negative zero would order as the smallest of all
    bits = tl.where(there, p.to(tl.int32, bitcast=True), -1)
    want = tl.load(share + i * share_0 + j * share_1)
    want = tl.where(want >= 1, float("inf"), want)  # all, also where rounding lets the mass reach 1
    at_least = tl.load(least + i * least_0 + j * least_1).to(tl.int32)

    # The smallest value with too little mass, or too few entries, above it: in (low, high].
    low = tl.full([], -1, tl.int32)
    high = tl.full([], 0x7F800000, tl.int32)  # infinity: nothing is above it
    for _ in range(31):
        middle = low + (high - low) // 2
        above = bits > middle
        mass = tl.sum(tl.where(above, p, 0.0), 0)
        count = tl.sum(above.to(tl.int32), 0)
        enough = (mass >= want) & (count >= at_least)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    above = bits > high
    mass = tl.sum(tl.where(above, p, 0.0), 0)
    count = tl.sum(above.to(tl.int32), 0)
    equal = bits == high
    nth = tl.cumsum(equal.to(tl.int32), 0) - 1  # of the entries of that value: the earlier first
    fits = (mass + nth.to(tl.float32) * p < want) | (count + nth < at_least)
    keep = there & (above | (equal & fits))
    tl.store(kept + i * kept_0 + j * kept_1 + column, keep.to(tl.uint8), mask=inside)
