"""AdaS-FFN: which tokens of a cube run the FFN, and what the others get.  Pure torch.

Top-p over a cube's normalised importances picks the active tokens, with a budget at the p that
keeps its share of all tokens of the request's cubes in the step.  Importance is one of

* ``"deviation"``: how far the token's FFN input lies from the cube's mean input, L2.
* ``"norm"``: the L2 norm of the residual stream *before* the post-attention norm (after RMSNorm all
  norms are nearly alike).  The paper's.

A token that skips gets one of

* ``"centroid"``: the FFN of the skipped tokens' mean input, one more evaluation for each cube in
  which a token skips.
* ``"mean"``: the mean of the active tokens' FFN outputs.  The paper's.
* ``"bypass"``: nothing.

The first of each belong together: to first order the error of a token that takes its centroid's
output grows with its distance from it, so the tokens farthest away run (measured in
docs/quality.md).  (Paper: AdaS-FFN.)

Gradients flow through what ran and what compensates: training computes the same (training/).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from ...kernels import use_triton
from . import choose as selection
from .plan import FFNPlan
from .settings import COMPENSATIONS, IMPORTANCES

# Numbers measured at a time on a CPU, so that the float32 copies stay in its cache.
SLAB_NUMBERS = 1 << 18

CENTROID, MEAN = (COMPENSATIONS.index(name) for name in ("centroid", "mean"))


def active_tokens(
    x: torch.Tensor, residual: torch.Tensor, plan: FFNPlan, layer: int
) -> torch.Tensor:
    """Which tokens of each cube run the FFN, ``[cubes, block_size]`` bool.

    Args:
        x: ``[tokens, hidden]`` the FFN's input.
        residual: ``[tokens, hidden]`` stream before the post-attention norm.
        plan: the step's FFN plan.
        layer: layer index; cubes whose first ``dense_layers`` include it are all active.
    """
    measures = {
        IMPORTANCES.index("deviation"): lambda: _deviation(x, plan.tokens),
        IMPORTANCES.index("norm"): lambda: _norm(residual, plan.tokens),
    }
    measured = measures[plan.importances[0]]()
    for other in plan.importances[1:]:
        measured = torch.where((plan.importance == other)[:, None], measures[other](), measured)
    total = measured.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    importance = (measured / total).nan_to_num_(0)  # of what has overflowed, all tokens run
    everywhere = torch.ones_like(importance, dtype=torch.bool)
    least = torch.ones_like(plan.dense_layers)
    active = selection.top_p(importance, everywhere, plan.share, least)
    if plan.budget:
        limited = selection.under_budget(importance, everywhere, least, plan.budget)
        active = torch.where(plan.by_budget[:, None], limited, active)
    if layer < plan.dense_layers_range[1]:
        active |= (plan.dense_layers > layer)[:, None]
    return active


def _norm(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """L2 norms ``[cubes, block_size]`` of ``x[tokens]``, fp32 at the least."""
    if use_triton(x):
        from ...kernels import ffn

        return ffn.token_norms(x, tokens)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x[tokens], dim=-1, dtype=dtype)


def _deviation(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """L2 distances from the cube's mean; shapes as in :func:`_norm`."""
    if use_triton(x):
        from ...kernels import ffn

        return ffn.token_norms(x, tokens, centred=True)
    step = len(tokens)
    if x.device.type == "cpu":
        step = max(1, SLAB_NUMBERS // (tokens.shape[1] * x.shape[1]))
    norms = []
    for some in tokens.split(step):
        slab = x[some]
        centred = slab - slab.mean(1, keepdim=True, dtype=torch.float32)
        norms.append(torch.linalg.vector_norm(centred, dim=-1, dtype=centred.dtype))
    return torch.cat(norms)


def sparse_ffn(
    x: torch.Tensor,
    ffn: Callable[[torch.Tensor], torch.Tensor],
    active: torch.Tensor,
    plan: FFNPlan,
    mapped: Callable[[torch.Tensor], AbstractContextManager] = nullcontext,
) -> torch.Tensor:
    """Run ``ffn`` on the active tokens and all tokens outside the plan's cubes.

    Args:
        x: ``[tokens, hidden]`` FFN input.
        ffn: maps ``[n, hidden]`` to ``[n, hidden]``, token by token.
        active: ``[cubes, block_size]`` bool, from :func:`active_tokens`.
        plan: the step's FFN plan.
        mapped: a context for calling ``ffn``, made from the tokens ``[n]`` that its inputs stand
            for: a centroid stands for its cube's first.
    """
    runs = torch.ones(len(x), dtype=torch.bool, device=x.device)
    runs[plan.tokens] = active
    by_centroid = plan.compensation == CENTROID
    has_centroid = by_centroid & ~active.all(1)
    # The two sizes that depend on the data; on a GPU this is the one wait for them.
    number, centroids = torch.stack([runs.sum(), has_centroid.sum()]).tolist()
    index = torch.nonzero_static(runs, size=number).squeeze(1)
    inputs, stand_for = x[index], index
    if centroids:
        cubes = torch.nonzero_static(has_centroid, size=centroids).squeeze(1)
        inputs = torch.cat([inputs, _means(x[plan.tokens[cubes]], ~active[cubes])])
        stand_for = torch.cat([index, plan.tokens[cubes, 0]])
    with mapped(stand_for):
        outputs = ffn(inputs)

    # One gather makes the result: a token's row is its own output, or what its cube's tokens get.
    row = runs.cumsum(0) - 1
    own = row[plan.tokens]
    fill_row = number + has_centroid.cumsum(0) - 1
    if plan.compensations != (CENTROID,):
        fill = outputs.new_zeros(len(own), outputs.shape[1])
        if MEAN in plan.compensations:
            mean = _means(outputs[own.clamp(min=0)], active)
            fill = torch.where((plan.compensation == MEAN)[:, None], mean, fill)
        nth = torch.arange(len(own), device=x.device)
        fill_row = torch.where(by_centroid, fill_row, len(outputs) + nth)
        outputs = torch.cat([outputs, fill])
    row[plan.tokens] = torch.where(active, own, fill_row[:, None])
    return outputs.index_select(0, row)


def _means(x: torch.Tensor, some: torch.Tensor) -> torch.Tensor:
    """Mean of each cube of ``x [cubes, block_size, hidden]`` over ``some [cubes, block_size]``."""
    # Summed in float32.  Divided by the block size, a power of two, before the sum is rounded:
    # float16 could not hold it.
    part = (some / some.shape[1]).to(x.dtype)
    total = torch.bmm(part.unsqueeze(1), x).squeeze(1)
    factor = some.shape[1] / some.sum(1, keepdim=True).clamp(min=1)
    return (total * factor).to(x.dtype)
