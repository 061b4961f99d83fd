"""One layer's attention: text densely, vision tokens by three branches that their gates mix."""

from __future__ import annotations

import torch

from ..base import AttentionCall
from .compress import compress
from .gates import gates_of
from .plan import BranchPlan, Index, VideoNSAPlan, take


def attend(step: VideoNSAPlan, call: AttentionCall) -> None:
    """Write the layer's output; ``step.gate_sums`` gets the gates' sums of each row."""
    plan: BranchPlan = step.attention
    if plan.text is not None:
        _run(call, plan.text, plan.text_sequences)
    gates = gates_of(take(call.hidden, plan.vision), call.modules)  # [vision, heads, 3]
    step.gate_sums[call.layer] = _sum_by_row(gates, plan, len(step.tokens))
    query = take(call.query, plan.vision)
    mixed = _branches(step, call, query, gates)  # [vision, heads, head_size]
    call.output[plan.vision] = mixed.to(call.output.dtype)


def _branches(
    step: VideoNSAPlan, call: AttentionCall, query: torch.Tensor, gates: torch.Tensor
) -> torch.Tensor:
    plan: BranchPlan = step.attention
    by_group = query.unflatten(1, (call.kv_heads, -1))  # [vision, kv_heads, group, d]
    with_gates = gates.unflatten(1, (call.kv_heads, -1)).transpose(0, 1)
    g_cmp, g_slc, g_swa = with_gates.unsqueeze(-2).unbind(-1)  # [kv_heads, vision, group, 1]

    traced = None
    if step.trace is not None:
        shape = plan.number, call.kv_heads, plan.blocks
        traced = torch.zeros(shape, dtype=torch.bool, device=query.device)
    mixed = compress(
        by_group, plan, call.key_sums, call.value_sums, call.scale, call.head_ranks, traced
    ).mul_(g_cmp)
    if traced is not None:
        step.trace.cubes(call.layer, traced)
    asking = by_group.transpose(0, 1).contiguous()  # [kv_heads, vision, group, d]
    selected = torch.empty_like(asking, dtype=call.output.dtype)
    call.run_sequences(
        asking.flatten(0, 1),
        plan.selection(call.kv_heads),
        selected.flatten(0, 1),
        one_kv_head=True,
    )
    mixed.addcmul_(selected.float(), g_slc)
    windowed = torch.empty_like(query, dtype=call.output.dtype)
    for window in plan.windows:
        part = take(query, window.tokens)
        output = torch.empty_like(part, dtype=windowed.dtype)
        call.run_sequences(part, window.sequences, output, window=window.size)
        windowed[window.tokens] = output
    mixed.addcmul_(windowed.unflatten(1, (call.kv_heads, -1)).transpose(0, 1).float(), g_swa)
    return mixed.transpose(0, 1).flatten(1, 2)


def _run(call: AttentionCall, tokens: Index, sequences) -> None:
    output = call.output[tokens]
    call.run_sequences(take(call.query, tokens).contiguous(), sequences, output)
    if not isinstance(tokens, slice):
        call.output[tokens] = output


def _sum_by_row(gates: torch.Tensor, plan: BranchPlan, rows: int) -> torch.Tensor:
    """``[rows, branches]``: each row's sum over its vision tokens of the mean over heads."""
    sums = gates.new_zeros(rows, gates.shape[-1])
    return sums.index_add_(0, plan.vision_row, gates.mean(1))
