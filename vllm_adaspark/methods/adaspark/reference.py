"""The rule that the fast path uses, in plain PyTorch: the twin that tests trust.

The paper's rule (paper.py) chooses for every query token; this is what a paged, chunked engine can
do fast.  A cube is a full KV block of video tokens, the tokens of a cube (or of two) choose
together, once per KV head, and a cube that a chunk edge cuts through runs dense.  The fast path
must equal this one: index sets exactly, outputs to rounding.

How far it strays from the paper's is measured by ``make fidelity`` (docs/fidelity.md).

Written for reading, not for speed: loops, one request at a time, and a choice by Python's
``sorted`` (reference_choice.py).  Half-precision inputs are widened to float32; float64 stays.  Not
covered: RoPE (queries and keys come rotated), batching, the KV cache.  ``config.flops`` is taken as
the share of cubes and tokens to keep, which budget.py works out for a whole request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from ...video.order import spread_tokens
from .reference_choice import choose, choose_under_budget, top_p
from .settings import AdaSparkConfig


@dataclass(frozen=True, slots=True)
class Tile:
    """What some tokens of one KV block, or of two cubes, in one chunk chose together."""

    block: int  # index of the (first) block in the sequence
    tokens: range  # absolute positions of the tile's queries
    kind: str  # "video", "text" or "cut", see tile_attention
    dense: bool  # attends to everything
    candidates: list[int]  # blocks before this one that are cubes
    kept: torch.Tensor  # [kv_heads, candidates] bool
    # How much a probability or a cumulated mass would have to change before another cube is
    # chosen; about 1e-6 or less is a tie that float32 rounding may break either way.
    margin: float


def tile_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    is_video: torch.Tensor,
    block_size: int,
    chunk: tuple[int, int],
    config: AdaSparkConfig,
    layer: int = 0,
    scale: float | None = None,
) -> tuple[torch.Tensor, list[Tile]]:
    """AdaS-Attn as the fast path does it, for one chunk of one request.

    Block ``b`` is tokens ``[b * B, (b + 1) * B)`` of the sequence.  It is a *cube* if all its
    tokens are known (below the chunk's end) and video; every other block is an *anchor block*.
    The chunk's tokens form *tiles*:

    * ``"video"``: a cube wholly in the chunk.  ``config.cube_queries`` of its tokens, spread over
      it, and the heads of a GQA group average their probabilities and choose once per KV head.  Its
      logits, and the scaled keys in them, are rounded to the inputs' dtype.  With
      ``config.tile_cubes=2`` an even block and the next are one tile if both are cubes wholly in
      the chunk and the first may choose; so many tokens of each are averaged.
    * ``"text"``: one token that is not video.  The heads of a GQA group average and choose once.
    * ``"cut"``: the video tokens of any other block.  They attend to everything.

    A logit is that of the cube's mean key, or with ``config.score="bounds"`` that of the largest
    product that a key can have whose every dimension lies between the cube's smallest and largest.

    A tile attends to the cubes it kept, to all anchor blocks before it and to its own block (or
    two) causally.

    Args:
        q: ``[n, heads, d]``; only rows in ``chunk`` are read.
        k, v: ``[n, kv_heads, d]``; only rows below the chunk's end are read.
        is_video: ``[n]`` bool.
        chunk: (start, end), the tokens computed in this step; those before are in the KV cache.
        layer: index of the layer, for ``config.dense_layers``.
        scale: of the logits; ``d ** -0.5`` by default.

    Returns:
        ``[end - start, heads, d]`` output and the tiles in sequence order.
    """
    start, end = chunk
    dtype = q.dtype
    q, k, v = wide(q[start:end]), wide(k[:end]), wide(v[:end])
    _, heads, d = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    scale = d**-0.5 if scale is None else scale

    cubes = {
        block: at
        for block, at in enumerate(_by_block((0, end), block_size))
        if _is_cube(is_video, at, block_size)
    }
    scored_by = _mean if config.score == "mean" else _bounds
    of_cube = {b: scored_by(k[at.start : at.stop]) for b, at in cubes.items()}

    found = []  # (block, tokens, kind, dense, candidates, probs [kv_heads, candidates] or None)
    for block, tokens, kind in _in_tiles(is_video, chunk, block_size, config):
        rows = slice(tokens.start - start, tokens.stop - start)  # of q and out
        candidates = [b for b in cubes if b < block]
        dense = (
            kind == "cut"
            or (kind == "text" and config.text_queries == "dense")
            or len(candidates) < config.dense_below
            or layer < config.dense_layers
            or not config.sparse_attention
        )
        probs = None
        if not dense and candidates:
            keys = scale * torch.stack([of_cube[b] for b in candidates])
            if kind == "video":  # products in the inputs' dtype, see score.py
                of_cube_tokens = spread_tokens(block_size, config.cube_queries).tolist()
                asked = [b + i for b in range(0, len(tokens), block_size) for i in of_cube_tokens]
                queries = q[rows][asked]
                keys = keys.to(dtype).to(q.dtype)
                logits = _largest_logits(queries, keys).to(dtype).to(q.dtype)
            else:
                logits = _largest_logits(q[rows], keys)
            probs = logits.softmax(-1)  # [m, heads, candidates]
            probs = probs.unflatten(1, (kv_heads, group)).mean(2)  # [m, kv_heads, candidates]
            probs = probs.mean(0)  # over the tile's tokens; a text tile has one
        found.append((block, tokens, kind, dense, candidates, probs))

    out = torch.empty_like(q)
    tiles = []
    owed = 0.0  # cubes that the tokens of cut cubes attend above their share, per KV head
    for block, tokens, kind, _, candidates, _ in found:
        whole = range(block * block_size, (block + 1) * block_size)
        cut = kind == "cut" and _is_cube(is_video, whole, block_size)
        if cut and config.flops is not None and len(candidates) >= max(config.dense_below, 1):
            owed += len(tokens) * len(candidates) * (1 - config.flops) / block_size
    probs = [(kind, len(tokens), probs) for _, tokens, kind, _, _, probs in found]
    choices = _choose_in_tiles(probs, config, owed * kv_heads, block_size)
    for (block, tokens, kind, dense, candidates, _), choice in zip(found, choices, strict=True):
        rows = slice(tokens.start - start, tokens.stop - start)
        kept, margin = torch.ones(kv_heads, len(candidates), dtype=torch.bool), math.inf
        if choice is not None:
            kept, margin = choice
        at = torch.arange(end)
        for kv_head in range(kv_heads):
            visible = at <= torch.tensor(tokens)[:, None]  # [m, end]
            for b, keep in zip(candidates, kept[kv_head].tolist(), strict=True):
                if not keep:
                    visible[:, cubes[b].start : cubes[b].stop] = False
            of_group = slice(kv_head * group, (kv_head + 1) * group)
            keys, values = k[:, kv_head], v[:, kv_head]
            out[rows, of_group] = attend(q[rows, of_group], keys, values, visible, scale)
        tiles.append(Tile(block, tokens, kind, dense, candidates, kept, margin))
    return out, tiles


def _choose_in_tiles(
    found: list[tuple[str, int, torch.Tensor | None]],
    config: AdaSparkConfig,
    owed: float,
    block_size: int,
) -> list[tuple[torch.Tensor, float] | None]:
    """Kept cubes ``[kv_heads, candidates]`` and margin of each (kind, tokens, probabilities) of a
    chunk.

    With a budget the video tiles of the chunk share one p, and each text tile has its own; the
    video tiles save what the tokens of cut cubes attended above their share (``owed``).  A cube
    that a tile of two cubes keeps counts twice, as it costs.
    """
    if config.flops is None:
        groups = [[i] for i in range(len(found))]
    else:
        groups = [[i for i, (kind, *_) in enumerate(found) if kind == "video"]]
        groups += [[i] for i, (kind, *_) in enumerate(found) if kind == "text"]
    result: list[tuple[torch.Tensor, float] | None] = [None] * len(found)
    for group in groups:
        group = [i for i in group if found[i][2] is not None]
        rows = [(i, head) for i in group for head in range(len(found[i][2]))]
        if not rows:
            continue
        probs = [found[i][2][head] for i, head in rows]
        if config.flops is None:
            kept, margins = zip(*(choose(row, config) for row in probs), strict=True)
        else:
            of_cut = owed if found[group[0]][0] == "video" else 0.0
            weights = [max(1, found[i][1] // block_size) for i, _ in rows]
            kept, margin = choose_under_budget(
                probs, config.flops, config.min_cubes, of_cut, weights
            )
            margins = [margin]
        for i in group:
            mine = [k for (owner, _), k in zip(rows, kept, strict=True) if owner == i]
            result[i] = torch.stack(mine), min(margins)
    return result


def tile_ffn(
    x: torch.Tensor,
    h: torch.Tensor,
    ffn: Callable[[torch.Tensor], torch.Tensor],
    is_video: torch.Tensor,
    block_size: int,
    chunk: tuple[int, int],
    config: AdaSparkConfig,
    layer: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """AdaS-FFN as the fast path does it: cubes wholly in the chunk choose, all other tokens run.

    Args:
        x: ``[n, hidden]`` residual stream before the post-attention norm.
        h: ``[n, hidden]`` the same after the norm: what the FFN reads.
        ffn: ``[m, hidden]`` to ``[m, hidden]``, without norm and residual.
        is_video, block_size, chunk, layer: as in :func:`tile_attention`.

    Returns:
        ``[end - start, hidden]`` FFN outputs, residual not added, and ``[end - start]`` bool, the
        tokens that ran.
    """
    start, end = chunk
    x, h = wide(x), wide(h)
    branch = ffn(h[start:end])
    active = torch.ones(end - start, dtype=torch.bool)
    if not config.sparse_ffn or layer < config.dense_layers:
        return branch, active
    cubes = [at for at in _by_block(chunk, block_size) if _is_cube(is_video, at, block_size)]
    measured = []
    for tokens in cubes:
        here = slice(tokens.start, tokens.stop)
        rows = x[here] if config.importance == "norm" else h[here] - h[here].mean(0)
        measured.append(rows.norm(dim=-1))
    tiny = torch.finfo(torch.float32).tiny  # tokens that are all alike all run
    importance = [measure / measure.sum().clamp(min=tiny) for measure in measured]
    if config.flops is None:
        runs = [top_p(share, config.p_ffn, min_keep=1)[0] for share in importance]
    elif cubes:
        cut = 0  # tokens of cubes that an edge of the chunk cuts
        for at in _by_block(chunk, block_size):
            first = at.start - at.start % block_size
            whole = range(first, first + block_size)
            cut += len(at) if len(at) < block_size and _is_cube(is_video, whole, block_size) else 0
        owed = cut * (1 - config.flops)
        runs, _ = choose_under_budget(importance, config.flops, min_keep=1, owed=owed)
    else:
        runs = []
    for tokens, which in zip(cubes, runs, strict=True):
        rows = slice(tokens.start - start, tokens.stop - start)  # of branch and active
        h_cube = h[tokens.start : tokens.stop]
        branch[rows], active[rows] = ffn_of(h_cube, ffn, which, config.compensation), which
    return branch, active


def _in_tiles(
    is_video: torch.Tensor, chunk: tuple[int, int], block_size: int, config: AdaSparkConfig
) -> Iterator[tuple[int, range, str]]:
    """A chunk's tokens, tile by tile: (first) block, tokens and kind."""
    blocks = list(_by_block(chunk, block_size))
    while blocks:
        here = blocks.pop(0)
        block = here.start // block_size
        if _is_cube(is_video, here, block_size):
            first_of_two = config.tile_cubes == 2 and block % 2 == 0
            if first_of_two and blocks and _is_cube(is_video, blocks[0], block_size):
                before = _by_block((0, here.start), block_size)
                cubes = sum(_is_cube(is_video, at, block_size) for at in before)
                if cubes >= max(config.dense_below, 1):
                    here = range(here.start, blocks.pop(0).stop)
            yield block, here, "video"
            continue
        for video, run in groupby(here, key=lambda token: bool(is_video[token])):
            tokens = list(run)
            if video:
                yield block, range(tokens[0], tokens[-1] + 1), "cut"
            else:
                yield from ((block, range(token, token + 1), "text") for token in tokens)


def _by_block(chunk: tuple[int, int], block_size: int) -> Iterator[range]:
    """The tokens of a chunk, block by block; the first and the last may be parts of one."""
    start, end = chunk
    for first in range(start - start % block_size, end, block_size):
        yield range(max(start, first), min(end, first + block_size))


def _is_cube(is_video: torch.Tensor, tokens: range, block_size: int) -> bool:
    """Whether these tokens of one block are all of it, and video."""
    return len(tokens) == block_size and bool(is_video[tokens.start : tokens.stop].all())


def _mean(keys: torch.Tensor) -> torch.Tensor:
    """``[1, kv_heads, d]`` of a cube's keys ``[m, kv_heads, d]``."""
    return keys.mean(0, keepdim=True)


def _bounds(keys: torch.Tensor) -> torch.Tensor:
    """``[2, kv_heads, d]``, the smallest and largest of each dimension, likewise."""
    return torch.stack([keys.amin(0), keys.amax(0)])


def _largest_logits(q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """``[m, heads, cubes]`` of queries ``[m, heads, d]`` and ``[cubes, n, kv_heads, d]``: in each
    dimension the vector counts whose product is larger."""
    group = q.shape[1] // keys.shape[2]
    each = keys.repeat_interleave(group, dim=2)  # [cubes, n, heads, d]
    if each.shape[1] == 1:
        return mean_logits(q, keys[:, 0])
    products = q[:, None, None] * each  # [m, cubes, n, heads, d]
    return products.amax(2).sum(-1).transpose(1, 2)


def mean_logits(q: torch.Tensor, mean_keys: torch.Tensor) -> torch.Tensor:
    """``[m, heads, d]`` x ``[cubes, kv_heads, d]`` to ``[m, heads, cubes]``."""
    group = q.shape[1] // mean_keys.shape[1]
    return torch.einsum("mhd,chd->mhc", q, mean_keys.repeat_interleave(group, dim=1))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of ``[m, heads, d]`` queries to the ``visible [m, n]`` of ``[n, d]`` keys."""
    seen = visible.any(0)  # a key no query sees is never touched: 0 * NaN would be NaN
    logits = (q @ k[seen].T * scale).masked_fill(~visible[:, None, seen], -math.inf)
    return logits.softmax(-1) @ v[seen]


def ffn_of(
    h: torch.Tensor,
    ffn: Callable[[torch.Tensor], torch.Tensor],
    active: torch.Tensor,
    compensation: str,
) -> torch.Tensor:
    """FFN outputs of one cube's ``h [m, hidden]``: its ``active [m]`` tokens run."""
    branch = torch.zeros_like(h)
    branch[active] = ffn(h[active])
    if compensation == "mean":
        branch[~active] = branch[active].mean(0)
    if compensation == "centroid" and not active.all():
        branch[~active] = ffn(h[~active].mean(0, keepdim=True))[0]
    return branch


def wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
