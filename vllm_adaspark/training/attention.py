"""AdaS-Attn of one layer: the served choice of cubes, then attention that can be differentiated.

``choose_cubes`` is the server's own.  What a query sees follows from it: the cubes its tile kept,
all other blocks before its own, its own block causally.  Attention is PyTorch's, under a mask that
is written out per token.  Queries go in slabs, each over the keys up to its last query.  Where a
sequence has more than MASK_ENTRIES in all, its slabs are computed again for the gradient, so that
only one slab's mask exists at a time: memory grows with the sequence, not with its square.  Time is
that of dense attention, whatever is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..methods.adaspark.plan import AttentionPlan
from ..methods.adaspark.score import choose_cubes
from ..paged.state import KEY_SUMMARIES
from .packing import Step

NAME = "adaspark"  # as attn_implementation
MASK_ENTRIES = 1 << 24  # (KV head, query, key) that may be held: 2048 x 2048 for 4 KV heads
SLAB = 512  # queries


def adaspark_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    step: Step | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """What transformers' AttentionInterface calls.

    Args:
        module: the layer's attention; its ``layer_idx`` counts.
        query: ``[1, heads, tokens, d]``, rotated, the step's tokens.
        key, value: ``[1, kv_heads, tokens, d]``.
        attention_mask: ignored; who sees whom follows from the step.
        step: from the language model's forward.

    Returns:
        ``[1, tokens, heads, d]`` and no weights.

    Raises:
        RuntimeError: there is no step: the layer was called on its own.
    """
    if step is None:
        raise RuntimeError(
            f"attn_implementation={NAME!r} works inside a model that enable_sparse_training was "
            "called on, and only through the whole model"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    return sparse_attention(q, k, v, step, module.layer_idx, scale, dropout)[None], None


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    step: Step,
    layer: int,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of the step's tokens, each over what its tile chose.

    Args:
        q: ``[tokens, heads, d]``, rotated.
        k, v: ``[tokens, kv_heads, d]``.
        step: the forward pass; the choice is left in ``step.cubes[layer]``, or taken from there.
        layer: index of the layer.
        scale: of the logits.
        dropout: of attention weights.

    Returns:
        ``[tokens, heads, d]``.
    """
    plan = step.plan.attention if step.plan is not None else None
    kept = tile_of = None
    if plan is not None:
        if layer not in step.cubes:
            step.cubes[layer] = _choose(q, k, step, layer, scale)
        kept = _kept_blocks(step.cubes[layer], plan)
        tile_of = _tile_of(plan, q.device)
    size = step.plan.block_size if step.plan is not None else 1

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: slice, keys: torch.Tensor):
        blocks = None if kept is None else kept[:, tile_of[rows]]
        return masked_attention(q, k, v, blocks, size, scale, dropout)

    return by_slab(q, k, v, step, attend)


def by_slab(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, step: Step, attend: Callable
) -> torch.Tensor:
    """Attention of the step's tokens, SLAB queries of a sequence at a time.

    Args:
        q: ``[tokens, heads, d]``, rotated.
        k, v: ``[tokens, kv_heads, d]``.
        step: the forward pass.
        attend: of a slab: ``(q [kv_heads, group, m, d], k, v [kv_heads, n, d], rows, keys)`` to
            ``[kv_heads, group, m, d]``; ``rows`` are the queries in the step, ``keys [n]`` the
            tokens that a sequence has up to the last of them.

    Returns:
        ``[tokens, heads, d]``.
    """
    q = q.unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)  # [kv_heads, group, tokens, d]
    k, v = k.transpose(0, 1), v.transpose(0, 1)  # [kv_heads, tokens, d]
    out = []
    for row, keys in enumerate(step.keys):
        first, end = step.rows.query_start[row : row + 2].tolist()
        before = int(step.rows.computed[row])
        again = torch.is_grad_enabled() and len(k) * (end - first) * len(keys) > MASK_ENTRIES
        row_k, row_v = k[:, keys], v[:, keys]
        for a in range(first, end, SLAB):
            b = min(a + SLAB, end)
            seen = before + b - first  # keys up to the slab's last query
            slab = q[:, :, a:b], row_k[:, :seen], row_v[:, :seen], slice(a, b), keys[:seen]
            out.append(checkpoint(attend, *slab, use_reentrant=False) if again else attend(*slab))
    return torch.cat(out, dim=2).permute(2, 0, 1, 3).flatten(1, 2)


def _choose(q: torch.Tensor, k: torch.Tensor, step: Step, layer: int, scale: float) -> torch.Tensor:
    """``[sparse, kv_heads, blocks]`` bool: the cubes each tile keeps.  No gradient."""
    size = step.plan.block_size
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        kept = KEY_SUMMARIES[step.key_summary]
        kept = kept(step.num_blocks, k.shape[1], k.shape[2], size, k.device, k.dtype)
        kept.write(k, step.plan.summary_writes)
        by_head = q.unflatten(1, (k.shape[1], -1)).transpose(0, 1)
        return choose_cubes(by_head, kept, step.plan.attention, scale, layer)


def _kept_blocks(chosen: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """``[kv_heads, tiles, blocks]`` bool, what a tile sees up to its own block."""
    kept = plan.always.expand(chosen.shape[1], *plan.always.shape).clone()
    kept[:, plan.sparse_tiles] |= chosen.transpose(0, 1)
    return kept


def _tile_of(plan: AttentionPlan, device: torch.device) -> torch.Tensor:
    """``[tokens]`` tile of each token of the step."""
    lengths = torch.from_numpy(plan.tiles.length).to(device)
    return torch.repeat_interleave(lengths)


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor | None,
    size: int,
    scale: float,
    dropout: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of the last queries of a sequence to its keys, causally.

    Args:
        q: ``[kv_heads, group, m, d]``.
        k, v: ``[kv_heads, n, d]``, up to the last query.
        blocks: ``[kv_heads, m, blocks]`` bool, which blocks of ``size`` keys a query sees; None for
            all.
        window: how many keys it sees at most, itself the last of them; None for all.

    Returns:
        ``[kv_heads, group, m, d]``.
    """
    m, n = q.shape[2], k.shape[1]
    at = torch.arange(n, device=q.device)
    mine = at[n - m :, None]
    mask = (at <= mine)[None]  # [1, m, n] causal
    if window is not None:
        mask = mask & (at > mine - window)
    if blocks is not None:
        mask = blocks.repeat_interleave(size, dim=2)[:, :, :n] & mask
    return F.scaled_dot_product_attention(
        q,
        k[:, None].expand(-1, q.shape[1], -1, -1),
        v[:, None].expand(-1, q.shape[1], -1, -1),
        attn_mask=mask[:, None],
        dropout_p=dropout,
        scale=scale,
    )
