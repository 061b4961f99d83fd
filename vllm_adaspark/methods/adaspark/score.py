"""Which cubes a tile keeps, once per layer.

The score is the paper's: ``P = softmax_j(q . mean_key_j / sqrt(d))`` over the candidate cubes, per
token and head, averaged over the heads of a GQA group.  Or, if the server's ``score`` is
``"bounds"``, the same with the largest product that the bounds of a cube's keys allow in place of
``q . mean_key_j``: a single token that matters is not averaged away.  Either way a logit is one
product of what a query asks with what is kept of a block (paged/state.py).

A VIDEO tile also averages P over some of its tokens (settings.cube_queries); every tile chooses
once per KV head.  A VIDEO tile's logits are matrix products in the model's dtype, as in attention
itself: rounding averages out over many queries, and bf16 products are four times as fast.  A TEXT
tile's logits are fp32; probabilities always are.

Under tensor parallelism a rank scores with the query heads it holds; what others must contribute to
its choice comes from them (heads.py), so that the choice does not depend on how many ranks there
are.

How well a cube matches a query is said in two places: :func:`cube_logits` on a CPU, and the kernels
in ``kernels/score.py`` on a GPU.
"""

from __future__ import annotations

from bisect import bisect_left

import torch

from ...kernels import scores_heads_of, use_triton
from ...paged.heads import HeadRanks
from ...paged.scratch import Scratch
from ...paged.state import BlockSummaries
from ...paged.tiles import VIDEO
from . import choose as selection
from .plan import AttentionPlan, ScoreJob

# Logits held at a time, in numbers.  Fewer would fit a CPU's cache, but a product of few queries
# spends its time on preparing the keys.
SLAB_LOGITS = 1 << 21


def choose_cubes(
    query: torch.Tensor,
    key_summaries: BlockSummaries,
    plan: AttentionPlan,
    scale: float,
    layer: int,
    ranks: HeadRanks | None = None,
) -> torch.Tensor:
    """The cubes each sparse tile keeps.

    Args:
        query: ``[kv_heads, tokens, group, head_size]``, any strides.
        key_summaries: this layer's.
        plan: the step's plan.
        scale: softmax scale, 1 / sqrt(head_size).
        layer: layer index; rows whose first ``dense_layers`` include it keep every candidate.
        ranks: the tensor-parallel ranks that hold the model's other heads; None for a single rank.

    Returns:
        ``[sparse, kv_heads, blocks]`` bool, a subset of ``plan.candidates``.
    """
    kv_heads, _, group, head_size = query.shape
    sparse, blocks = plan.candidates.shape
    probs = torch.zeros(sparse, kv_heads, blocks, device=query.device)
    fused = use_triton(query) and scores_heads_of(head_size * key_summaries.number)
    factor = scale / key_summaries.divisor  # from a product with a cube's summary to its logit
    for job in plan.jobs:
        if fused:
            _score_fused(probs, query, key_summaries, plan, job, scale)
            continue
        score = _score_together if job.kind == VIDEO else _score_each
        row_slabs, item_slabs = _slabs(job, kv_heads * group)
        for rows in row_slabs:
            row, width = job.row[rows], int(job.own_block[rows].max())
            # What is kept of blocks that are no cubes is stale, and their logits overwritten.
            keys = key_summaries.of(plan.row_blocks[row, :width]).transpose(1, 2)
            if job.kind == VIDEO:  # scaled here: there are fewer cubes than queries
                keys = keys.mul_(factor).to(_product_dtype(query)).contiguous()
                queries = _queries(query, job.tokens[0], plan.scratch).to(keys.dtype)
            else:
                queries = query[:, job.tokens[rows]].float().mul_(factor)
            queries = key_summaries.asking(queries)
            for items in item_slabs:
                width = int(job.own_block[rows, items].max())
                score(probs, queries, keys[:, :, :width], plan, job, rows, items)

    own = slice(None)
    if ranks is not None:
        # A budget's p is one for all KV heads of the model.
        probs, own = ranks.complete(probs, all_heads=bool(plan.budget))
    candidates = plan.candidates.unsqueeze(1).expand_as(probs)
    rule, share, least = (each.unsqueeze(1) for each in (plan.rule, plan.share, plan.min_cubes))
    chosen = selection.select(probs, candidates, rule, share, least, plan.rules, plan.budget)
    chosen, candidates = chosen[:, own], candidates[:, own]
    if layer < plan.most_dense_layers:
        chosen = torch.where((plan.dense_layers > layer)[:, None, None], candidates, chosen)
    return chosen


def _slabs(job: ScoreJob, heads: int) -> tuple[list[slice], list[slice]]:
    """Slabs of rows and of tiles or tokens, one of them whole, whose logits fit in SLAB_LOGITS."""
    rows, items = job.own_block.shape
    queries = heads * job.tokens.shape[1] // items  # of one item
    width = int(job.own_block.max())
    per_slab = max(1, SLAB_LOGITS // (queries * width))
    if rows > 1:
        per_slab = max(1, per_slab // items)
        return [slice(i, i + per_slab) for i in range(0, rows, per_slab)], [slice(0, items)]
    return [slice(None)], [slice(i, i + per_slab) for i in range(0, items, per_slab)]


def cube_logits(
    query: torch.Tensor, key: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """How well each cube matches each query, times the softmax scale.

    Args:
        query: ``[..., queries, n]``: what each query asks (``BlockSummaries.asking``).
        key: ``[..., cubes, n]`` of the same dtype: what is kept of each cube.  One of the two is
            already times the scale and through ``BlockSummaries.divisor``.
        out: where to put the result.

    Returns:
        ``[..., queries, cubes]``.
    """
    return torch.matmul(query, key.transpose(-1, -2), out=out)


def _score_together(
    probs: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    plan: AttentionPlan,
    job: ScoreJob,
    rows: slice,
    tiles: slice,
) -> None:
    """VIDEO tiles of one row: the probabilities of the tokens scored are averaged.

    ``query [kv_heads, tiles * scored * group, n]`` and ``keys [1, kv_heads, cubes, n]`` are those
    of the job, see :func:`cube_logits`.
    """
    tile = job.tile_of[0, tiles]
    kv_heads, width = keys.shape[1:3]
    per_tile = query.shape[1] // job.tile_of.shape[1]
    some = query[:, tiles.start * per_tile : tiles.stop * per_tile]
    shape, device = (kv_heads, some.shape[1], width), query.device
    products = cube_logits(
        some, keys[0], out=plan.scratch.take("products", shape, query.dtype, device)
    )
    logits = plan.scratch.take("logits", shape, torch.float32, device).copy_(products)
    logits = logits.unflatten(1, (len(tile), per_tile))
    # What is no cube is a candidate of no tile; of the cubes, those before the first tile's own
    # block are candidates of all.  So only the last few columns differ from tile to tile.
    logits.index_fill_(-1, job.gaps[: bisect_left(job.gap_blocks, width)], float("-inf"))
    first = int(job.own_block[0, tiles].min())
    logits[..., first:] += _bias(plan.candidates[tile, first:width])[None, :, None, :]
    each = torch.softmax(
        logits, -1, out=plan.scratch.take("probabilities", logits.shape, torch.float32, device)
    )
    probs[tile, :, :width] = each.mean(2).transpose(0, 1)  # [tiles, kv_heads, blocks]


def _product_dtype(query: torch.Tensor) -> torch.dtype:
    return query.dtype if query.dtype.itemsize > 1 else torch.bfloat16  # fp8 queries are widened


def _queries(query: torch.Tensor, tokens: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """``[kv_heads, len(tokens) * group, head_size]`` of some tokens, contiguous."""
    kv_heads, _, group, head_size = query.shape
    by_token = query.transpose(0, 1)
    if not by_token.is_contiguous():
        return query[:, tokens].flatten(1, 2)
    # Whole rows in one pass: a view of the model's own queries takes many times as long otherwise.
    head = torch.arange(kv_heads * group, device=query.device).view(kv_heads, 1, group)
    row = (tokens[:, None] * (kv_heads * group) + head).flatten()  # of [kv_heads, tokens, group]
    queries = scratch.take("queries", (len(row), head_size), query.dtype, query.device)
    torch.index_select(by_token.flatten(0, 2), 0, row, out=queries)
    return queries.view(kv_heads, -1, head_size)


def _score_fused(
    probs: torch.Tensor,
    query: torch.Tensor,
    key_summaries: BlockSummaries,
    plan: AttentionPlan,
    job: ScoreJob,
    scale: float,
) -> None:
    """As :func:`_score_together` and :func:`_score_each`, all tiles of a job at once, in Triton."""
    from ...kernels import score

    # The kernels take the queries of a job together, and no others.
    queries = query[:, job.tokens.flatten()].to(_product_dtype(query))
    queries = key_summaries.asking(queries).contiguous()
    tokens = torch.arange(job.tokens.numel(), device=query.device)
    if job.kind != VIDEO:
        score.token_probabilities(
            probs, queries, key_summaries.vectors, plan.row_blocks, plan.candidates, job.row,
            job.tile_of, tokens.view_as(job.tokens), job.limit, key_summaries.divisor, scale,
        )  # fmt: skip
        return
    width = int(job.own_block.max())
    blocks, is_cube = plan.row_blocks[job.row[0], :width], plan.row_cubes[job.row[0], :width]
    keys = score.cube_keys(
        key_summaries.vectors, blocks, is_cube, key_summaries.divisor, queries.dtype
    )
    score.pool_probabilities(
        probs, queries, keys, plan.candidates, job.tile_of[0], tokens, job.limit[0], job.scored,
        scale,
    )  # fmt: skip


def _score_each(
    probs: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    plan: AttentionPlan,
    job: ScoreJob,
    rows: slice,
    items: slice,
) -> None:
    """TEXT tiles, of one token each.

    ``query [kv_heads, rows, tokens, group, n]`` and ``keys [rows, kv_heads, cubes, n]`` are those
    of the job's rows, see :func:`cube_logits`.
    """
    tile_of = job.tile_of[rows, items]  # [rows, tokens]
    width = keys.shape[2]
    q = query[:, :, items].transpose(0, 1)  # [rows, kv_heads, tokens, group, d]
    logits = cube_logits(q.flatten(2, 3), keys).view(*q.shape[:4], width)
    valid = plan.candidates[tile_of, :width]  # [rows, tokens, blocks]
    logits.masked_fill_(~valid[:, None, :, None, :], float("-inf"))
    pooled = logits.softmax(-1).mean(3).transpose(1, 2)  # [rows, tokens, kv_heads, blocks]
    probs[tile_of, :, :width] = pooled


def _bias(valid: torch.Tensor) -> torch.Tensor:
    """0 where valid, else minus infinity, for adding to logits."""
    return torch.zeros(valid.shape, device=valid.device).masked_fill_(~valid, float("-inf"))
