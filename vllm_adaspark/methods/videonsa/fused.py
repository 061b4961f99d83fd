"""The compressed and the selected branch on a GPU, by the Triton kernels.

One kernel has the compressed branch and the importances from one product, one the choice, and one
the selection, which reads selected blocks where they lie.  Which steps they take is decided here;
all others run the twins (compress.py, and vLLM's kernel over a block table for each token).
"""

from __future__ import annotations

import torch

from ...kernels import scores_heads_of, use_triton
from ..base import AttentionCall
from .plan import BranchPlan


def takes(call: AttentionCall, plan: BranchPlan) -> bool:
    """Whether the kernels can run this layer."""
    # A CPU's cache has another layout, also under Triton's interpreter.
    if not call.query.is_cuda or not use_triton(call.query):
        return False
    from ...kernels.videonsa_compress import MAX_ENTRIES

    sharing = 1 if call.head_ranks is None else call.head_ranks.sharing
    return (
        scores_heads_of(call.query.shape[2])
        and call.kv_cache.dtype == call.query.dtype  # no fp8
        and call.kv_cache.is_contiguous()
        and sharing == 1  # else importances of ranks that share a KV head must be added up
        and plan.flat.places is not None
        and plan.flat.longest <= MAX_ENTRIES
    )


def branches(
    call: AttentionCall, plan: BranchPlan, traced: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The compressed branch in fp32, and the selected one, ``[vision, heads, head_size]`` each.

    ``traced [vision, kv_heads, blocks]`` bool, all False, gets what is selected.
    """
    from ...kernels import videonsa_compress, videonsa_select

    flat, query = plan.flat, call.query.contiguous()
    if len(flat.cubes):
        keys, values = (
            sums.of(flat.cubes).div_(sums.block_size).transpose(0, 1).contiguous()
            for sums in (call.key_sums, call.value_sums)
        )
        compressed, chosen = videonsa_compress.compress_and_choose(
            query, flat.tokens, keys, values.to(query.dtype), flat.begin, flat.end, flat.longest,
            call.scale, flat.places,
        )  # fmt: skip
        nothing, at = chosen < 0, chosen.clamp(min=0).long()
        pages = torch.where(nothing, -1, flat.cubes[at]).int()
        if traced is not None:
            # A place without a cube marks the token's own block, which is attended in any case.
            own = flat.own_logical[:, None, None].expand_as(at)
            traced.scatter_(2, torch.where(nothing, own, flat.logical[at]), True)
    else:
        compressed = query.new_zeros(plan.number, *query.shape[1:], dtype=torch.float32)
        pages = flat.own.new_full((plan.number, call.kv_heads, flat.places), -1)
    selected = videonsa_select.select(
        query, flat.tokens, call.kv_cache, pages, flat.own, flat.offset, call.scale
    )
    return compressed, selected
