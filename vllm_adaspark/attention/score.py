"""Which cubes a tile keeps, once per layer.

The score is the paper's: ``P = softmax_j(q . mean_key_j / sqrt(d))`` over the candidate cubes, per
token and head, averaged over the heads of a GQA group.  A VIDEO tile also averages P over its
tokens; every tile chooses once per KV head.

:func:`cube_logits` is the one place that says how well a cube matches a query; replace it to try
another score (design, section 5).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import selection
from .plan import VIDEO, AttentionPlan, ScoreJob
from .state import KeySums

# Logits held at a time, in numbers: bounds memory, and on a CPU keeps the work in cache.
SLAB_LOGITS = 1 << 20


def choose_cubes(
    query: torch.Tensor, key_sums: KeySums, plan: AttentionPlan, scale: float, layer: int
) -> torch.Tensor:
    """The cubes each sparse tile keeps.

    Args:
        query: ``[tokens, heads, head_size]``.
        key_sums: this layer's key sums; its ``kv_heads`` divide ``heads``.
        plan: the step's plan.
        scale: softmax scale, 1 / sqrt(head_size).
        layer: layer index; rows whose first ``dense_layers`` include it keep every candidate.

    Returns:
        ``[sparse, kv_heads, blocks]`` bool, a subset of ``plan.candidates``.
    """
    heads = query.shape[1]
    candidates = plan.candidates.unsqueeze(1)  # [sparse, 1, blocks]
    chosen = torch.zeros_like(candidates.expand(-1, key_sums.kv_heads, -1))
    for job in plan.jobs:
        choose = _choose_together if job.kind == VIDEO else _choose_each
        for rows, items in _slabs(job, heads):
            width = int(job.own_block[rows, items].max())
            row = job.row[rows]
            means = key_sums.means(plan.row_blocks[row, :width])  # [rows, blocks, kv_heads, d]
            # Sums of blocks that are no cubes are stale; a NaN in one must not reach a softmax.
            # The scale goes into the means: there are far fewer of them than of queries.
            means = torch.where(plan.row_cubes[row, :width, None, None], means * scale, 0.0)
            choose(chosen, query, means, plan, job, rows, items)
    if layer < plan.dense_layers_range[1]:
        chosen = torch.where((plan.dense_layers > layer)[:, None, None], candidates, chosen)
    return chosen


def _slabs(job: ScoreJob, heads: int) -> Iterator[tuple[slice, slice]]:
    """Cut a job, by rows or else by tiles or tokens, so that logits fit in SLAB_LOGITS."""
    rows, items = job.own_block.shape
    queries = heads * job.tokens.shape[1] // items  # of one item
    width = int(job.own_block.max())
    per_slab = max(1, SLAB_LOGITS // (queries * width))
    if rows > 1:
        per_slab = max(1, per_slab // items)
        yield from ((slice(i, i + per_slab), slice(None)) for i in range(0, rows, per_slab))
    else:
        yield from ((slice(None), slice(i, i + per_slab)) for i in range(0, items, per_slab))


def cube_logits(query: torch.Tensor, mean_key: torch.Tensor) -> torch.Tensor:
    """How well each cube matches each query: ``q . mean_key``.

    Args:
        query: ``[..., queries, head_size]`` fp32.
        mean_key: ``[..., cubes, head_size]`` fp32, already times the softmax scale.

    Returns:
        ``[..., queries, cubes]``.
    """
    return query @ mean_key.transpose(-1, -2)


def _choose_together(
    chosen: torch.Tensor,
    query: torch.Tensor,
    means: torch.Tensor,
    plan: AttentionPlan,
    job: ScoreJob,
    rows: slice,
    tiles: slice,
) -> None:
    """VIDEO tiles of one row: their tokens' probabilities are averaged before the choice."""
    tile = job.tile_of[0, tiles]
    tile_size = job.tokens.shape[1] // job.tile_of.shape[1]
    kv_heads, width, head_size = chosen.shape[1], means.shape[1], query.shape[2]
    if job.first_token is not None:  # consecutive tokens need no gather
        first = job.first_token + tiles.start * tile_size
        q = query[first : first + len(tile) * tile_size]
    else:
        q = query[job.tokens.view(-1, tile_size)[tiles].flatten()]
    q = q.view(len(tile) * tile_size, kv_heads, -1, head_size).transpose(0, 1)
    q = q.to(torch.float32, memory_format=torch.contiguous_format).flatten(1, 2)
    logits = cube_logits(q, means[0].transpose(0, 1)).view(kv_heads, len(tile), -1, width)
    valid = plan.candidates[tile, :width]  # [tiles, blocks]
    logits += _bias(valid)[None, :, None, :]
    probs = logits.softmax(-1).mean(2).transpose(0, 1)  # [tiles, kv_heads, blocks]
    chosen[tile, :, :width] = _select(probs, valid, tile, plan)


def _choose_each(
    chosen: torch.Tensor,
    query: torch.Tensor,
    means: torch.Tensor,
    plan: AttentionPlan,
    job: ScoreJob,
    rows: slice,
    items: slice,
) -> None:
    """TEXT tiles, of one token each."""
    tile_of = job.tile_of[rows, items]  # [rows, tokens]
    kv_heads, width, head_size = chosen.shape[1], means.shape[1], query.shape[2]
    q = query[job.tokens[rows, items]].float()
    q = q.view(*tile_of.shape, kv_heads, -1, head_size).transpose(1, 2)  # [rows, kv, tokens, g, d]
    logits = cube_logits(q.flatten(2, 3), means.transpose(1, 2)).view(*q.shape[:4], width)
    valid = plan.candidates[tile_of, :width]  # [rows, tokens, blocks]
    logits += _bias(valid)[:, None, :, None, :]
    probs = logits.softmax(-1).mean(3).transpose(1, 2)  # [rows, tokens, kv_heads, blocks]
    tile = tile_of.flatten()
    chosen[tile, :, :width] = _select(probs.flatten(0, 1), valid.flatten(0, 1), tile, plan)


def _bias(valid: torch.Tensor) -> torch.Tensor:
    """0 where valid, else minus infinity, for adding to logits."""
    return torch.zeros(valid.shape, device=valid.device).masked_fill_(~valid, float("-inf"))


def _select(
    probs: torch.Tensor, valid: torch.Tensor, tile: torch.Tensor, plan: AttentionPlan
) -> torch.Tensor:
    """``[n, kv_heads, blocks]`` kept, for the sparse tile ``tile[n]`` of each row of ``probs``."""
    valid = valid.unsqueeze(1).expand_as(probs)
    rule, share, least = (
        setting[tile].unsqueeze(1).expand(probs.shape[:2])
        for setting in (plan.rule, plan.share, plan.min_cubes)
    )
    return selection.select(probs, valid, rule, share, least, plan.rules)
