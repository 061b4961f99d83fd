"""The compressed branch, and from the same products the blocks that each token selects.

A query's softmax over the mean keys of the cubes before its own block is the branch's attention
over their mean values; summed over the query heads of a KV head's GQA group it is each cube's
importance.  Logits are in fp32 also with bf16 weights, where rounding would change choices.
Equally important cubes are taken from the earliest on.

On a CPU this is plain PyTorch in slabs of queries whose logits fit in a cache, on a GPU the Triton
kernels of ``kernels/videonsa_compress.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...kernels import MAX_CHOICES, scores_heads_of, use_triton
from ...paged.heads import HeadRanks
from ...paged.state import BlockSums
from .plan import BranchPlan, RowCubes

SLAB = 1 << 21  # logits that are held at a time


def compress(
    query: torch.Tensor,
    plan: BranchPlan,
    key_sums: BlockSums | None,
    value_sums: BlockSums | None,
    scale: float,
    head_ranks: HeadRanks | None,
    traced: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to mean keys, and fill in the table of the step's selection.

    Args:
        query: ``[vision, kv_heads, group, head_size]``.
        plan: the step's.
        key_sums, value_sums: this layer's; None before there was any cube.
        scale: of the logits.
        head_ranks: the tensor-parallel ranks, which may share a KV head's group.
        traced: ``[vision, kv_heads, blocks]`` bool, all False: gets what is selected.

    Returns:
        ``[kv_heads, vision, group, head_size]`` fp32; 0 where a token has no cube before it.
    """
    number, kv_heads, group, size = query.shape
    like = query.new_empty(0, dtype=torch.float32)
    output = plan.buffer("compressed", (kv_heads, number, group, size), like).zero_()
    table = plan.selection(kv_heads).block_table.view(kv_heads, number, -1)
    head = torch.arange(kv_heads, device=query.device)[:, None]
    for row in plan.rows:
        if not len(row.cubes):
            continue
        means = _means(key_sums, row, scale), _means(value_sums, row, 1.0)
        physical = row.cubes * kv_heads + head  # [kv_heads, cubes]
        of_row = _compress_row_fused if _fused(query, row, head_ranks) else _compress_row
        for here, best in of_row(query, row, *means, head_ranks, output):
            chosen = physical.gather(1, best.flatten(1)).view_as(best)
            table[:, here, : best.shape[-1]] = chosen.to(table.dtype)
            if traced is not None:
                used = torch.arange(best.shape[-1], device=best.device) < plan.places[here, None]
                logical = torch.where(used, row.logical[best], -1)  # [kv_heads, tokens, number]
                traced[here] = as_mask(logical.transpose(0, 1), plan.blocks)
    # The own block comes last, so what it lacks at its end is the sequence's alone.
    last = plan.places[None, :, None].expand(kv_heads, -1, -1)
    own = (plan.own_block * kv_heads + head).to(table.dtype)
    table.scatter_(2, last, own[..., None])
    return output


def _means(sums: BlockSums, row: RowCubes, factor: float) -> torch.Tensor:
    """``[kv_heads, cubes, head_size]`` fp32: mean keys or values of a cube's vision tokens, times
    ``factor``."""
    return sums.of(row.cubes).mul_((factor / row.sizes)[:, None, None]).transpose(0, 1).contiguous()


def _compress_row(
    query: torch.Tensor,
    row: RowCubes,
    mean_keys: torch.Tensor,
    mean_values: torch.Tensor,
    head_ranks: HeadRanks | None,
    output: torch.Tensor,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Write one request's part of ``output [kv_heads, vision, group, d]``, slab by slab.

    Yields:
        vision tokens, and ``[kv_heads, tokens, number]`` the cubes of the row that each selects
        (see :func:`most_important`).
    """
    kv_heads, group, size = query.shape[1:]
    first = row.tokens.start
    step = max(1, SLAB // (kv_heads * group * len(row.cubes)))
    for start in range(0, len(row.seen), step):
        end = min(start + step, len(row.seen))
        low, width = int(row.seen[start]), int(row.seen[end - 1])  # rising
        if not width:
            continue
        here = slice(first + start, first + end)
        asking = query[here].transpose(0, 1).float().reshape(kv_heads, -1, size)
        logits = torch.bmm(asking, mean_keys[:, :width].transpose(1, 2))
        logits = logits.view(kv_heads, end - start, group, width)
        seen = row.seen_there[start:end]
        hidden = torch.arange(low, width, device=seen.device) >= seen[:, None]
        logits[..., low:].masked_fill_(hidden[:, None], float("-inf"))
        probs = torch.softmax(logits, -1)
        if not low:
            probs.masked_fill_((seen == 0)[:, None, None], 0)  # nothing but -inf: not a number
        attended = torch.bmm(probs.view(kv_heads, -1, width), mean_values[:, :width])
        output[:, here] = attended.view(kv_heads, end - start, group, size)
        if row.most:
            importance = _importance(probs, head_ranks)
            yield here, most_important(importance, seen, min(row.most, width))


def _fused(query: torch.Tensor, row: RowCubes, head_ranks: HeadRanks | None) -> bool:
    """Whether the Triton kernels take this row: they rate by the query heads of one rank."""
    alone = head_ranks is None or head_ranks.sharing == 1
    fits = scores_heads_of(query.shape[-1]) and len(row.cubes) <= MAX_CHOICES
    return use_triton(query) and alone and fits


def _compress_row_fused(
    query: torch.Tensor,
    row: RowCubes,
    mean_keys: torch.Tensor,
    mean_values: torch.Tensor,
    head_ranks: HeadRanks | None,
    output: torch.Tensor,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """As :func:`_compress_row`, all tokens of the row at once, in Triton."""
    from ...kernels.videonsa_compress import compress_and_choose

    asking = query[row.tokens].flatten(1, 2).contiguous()  # [tokens, heads, d]
    end = row.seen_there.int()
    number = min(row.most, len(row.cubes))
    attended, best = compress_and_choose(
        asking, torch.arange(len(asking), device=query.device), mean_keys,
        mean_values.to(query.dtype), torch.zeros_like(end), end, len(row.cubes), 1.0, number,
    )  # fmt: skip
    output[:, row.tokens] = attended.unflatten(1, (len(mean_keys), -1)).transpose(0, 1)
    if number:
        yield row.tokens, best.clamp(min=0).long().transpose(0, 1)


def as_mask(chosen: torch.Tensor, blocks: int) -> torch.Tensor:
    """``[tokens, kv_heads, blocks]`` bool of ``chosen [tokens, kv_heads, n]``, -1 for none."""
    mask = torch.zeros(*chosen.shape[:2], blocks + 1, dtype=torch.bool, device=chosen.device)
    return mask.scatter_(2, torch.where(chosen < 0, blocks, chosen), True)[..., :blocks]


def _importance(probs: torch.Tensor, head_ranks: HeadRanks | None) -> torch.Tensor:
    """``[kv_heads, tokens, cubes]`` from ``probs [kv_heads, tokens, group, cubes]``."""
    importance = probs.sum(2)
    if head_ranks is None:
        return importance
    complete, mine = head_ranks.complete(importance.transpose(0, 1), all_heads=False)
    return complete[:, mine].transpose(0, 1)


def most_important(importance: torch.Tensor, seen: torch.Tensor, number: int) -> torch.Tensor:
    """The most important cubes of each token, the earlier of equal ones first.

    Args:
        importance: ``[kv_heads, tokens, cubes]`` fp32, not negative.
        seen: ``[tokens]`` cubes that a token may select, the first ones.
        number: to select.

    Returns:
        ``[kv_heads, tokens, number]`` int64.  Where a token sees fewer, those come first and the
        rest is not to be used.
    """
    width = importance.shape[-1]
    # Numbers of fp32 that are not negative are ordered as their bits; the place breaks ties.
    place = torch.arange(width, device=importance.device)
    key = (importance.contiguous().view(torch.int32).long() << 32) | (width - 1 - place)
    key.masked_fill_(place >= seen[:, None], -1)
    return width - 1 - (key.topk(number, -1).values & 0xFFFFFFFF).clamp_(max=width - 1)
