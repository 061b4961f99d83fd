"""The selected branch: every vision token attends to the blocks of its own table.

On a GPU a Triton kernel reads the blocks where they lie.  Elsewhere, and for what that kernel does
not take, each (token, KV head) is a sequence of one query for the kernel that vLLM chose.
"""

from __future__ import annotations

import torch

from ...kernels import scores_heads_of, use_triton
from ..base import AttentionCall
from .plan import BranchPlan
from .settings import BLOCK


def select(call: AttentionCall, plan: BranchPlan, query: torch.Tensor) -> torch.Tensor:
    """``[vision, kv_heads, group, head_size]``, once :func:`compress.compress` has made the table.

    ``query [vision, heads, head_size]`` is that of the vision tokens.
    """
    # A CPU's cache has another layout, also under Triton's interpreter.
    if query.is_cuda and use_triton(query) and _taken(call):
        return by_kernel(call, plan, query)
    by_head = query.unflatten(1, (call.kv_heads, -1)).transpose(0, 1)
    asking = plan.buffer("asking", by_head.shape, query).copy_(by_head)
    selected = plan.buffer("selected", by_head.shape, call.output)
    call.run_sequences(
        asking.flatten(0, 1),
        plan.selection(call.kv_heads),
        selected.flatten(0, 1),
        one_kv_head=True,
    )
    return selected.transpose(0, 1)


def _taken(call: AttentionCall) -> bool:
    cache, query = call.kv_cache, call.query
    return scores_heads_of(query.shape[2]) and cache.dtype == query.dtype and cache.is_contiguous()


def by_kernel(call: AttentionCall, plan: BranchPlan, query: torch.Tensor) -> torch.Tensor:
    """As :func:`select`, by the Triton kernel, over a cache with keys and values side by side."""
    from ...kernels import videonsa_select

    kv_heads = call.kv_heads
    table = plan.selection(kv_heads).block_table.view(kv_heads, plan.number, -1)[..., :-1]
    chosen = torch.arange(table.shape[2], device=table.device) < plan.places[:, None]
    pages = torch.where(chosen, table // kv_heads, -1).transpose(0, 1).contiguous()
    selected = videonsa_select.select(
        query.contiguous(),
        torch.arange(plan.number, device=query.device),
        call.kv_cache,
        pages,
        plan.own_block.int(),
        (plan.selected_lens - 1) % BLOCK,
        call.scale,
    )
    return selected.unflatten(1, (kv_heads, -1))
