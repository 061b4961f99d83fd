"""One layer's attention: text densely, vision tokens by three branches that their gates mix."""

from __future__ import annotations

import torch

from ...paged.tables import Sequences
from ..base import AttentionCall
from .compress import compress
from .gates import gates_of
from .plan import BranchPlan, Index, VideoNSAPlan, take
from .select import select


def attend(step: VideoNSAPlan, call: AttentionCall) -> None:
    """Write the layer's output; ``step.gate_sums`` gets the gates' sums of each row."""
    plan: BranchPlan = step.attention
    if plan.text is not None:
        attend_text(call, plan.text, plan.text_sequences)
    gates = gates_of(take(call.hidden, plan.vision), call.modules)  # [vision, heads, 3]
    step.gate_sums[call.layer] = _sum_by_row(gates, plan, len(step.tokens))
    query = take(call.query, plan.vision)
    mixed = _branches(step, call, query, gates)  # [vision, heads, head_size]
    call.output[plan.vision] = mixed.to(call.output.dtype)


def _branches(
    step: VideoNSAPlan, call: AttentionCall, query: torch.Tensor, gates: torch.Tensor
) -> torch.Tensor:
    """``[vision, heads, head_size]`` fp32: the branches, mixed."""
    plan: BranchPlan = step.attention
    traced = None
    if step.trace is not None:
        shape = plan.number, call.kv_heads, plan.blocks
        traced = torch.zeros(shape, dtype=torch.bool, device=query.device)
    by_group = query.unflatten(1, (call.kv_heads, -1))
    compressed = compress(
        by_group, plan, call.key_sums, call.value_sums, call.scale, call.head_ranks, traced
    ).transpose(0, 1)
    if traced is not None:
        step.trace.cubes(call.layer, traced)
    selected = select(call, plan, query)
    windowed = _windowed(call, plan, query).unflatten(1, (call.kv_heads, -1))
    # All are [vision, kv_heads, group, d] from here on.
    by_branch = gates.unflatten(1, (call.kv_heads, -1)).unsqueeze(-2).unbind(-1)
    mixed = compressed.mul_(by_branch[0])
    mixed.addcmul_(selected.float(), by_branch[1]).addcmul_(windowed.float(), by_branch[2])
    return mixed.flatten(1, 2)


def _windowed(call: AttentionCall, plan: BranchPlan, query: torch.Tensor) -> torch.Tensor:
    """``[vision, heads, head_size]``."""
    windowed = torch.empty_like(query, dtype=call.output.dtype)
    for window in plan.windows:
        part = take(query, window.tokens)
        output = torch.empty_like(part, dtype=windowed.dtype)
        call.run_sequences(part, window.sequences, output, window=window.size)
        windowed[window.tokens] = output
    return windowed


def attend_text(call: AttentionCall, tokens: Index, sequences: Sequences) -> None:
    """Dense attention of the step's text ``tokens``, into the layer's output; in both modes."""
    output = call.output[tokens]
    call.run_sequences(take(call.query, tokens).contiguous(), sequences, output)
    if not isinstance(tokens, slice):
        call.output[tokens] = output


def _sum_by_row(gates: torch.Tensor, plan: BranchPlan, rows: int) -> torch.Tensor:
    """``[rows, branches]``: each row's sum over its vision tokens of the mean over heads."""
    sums = gates.new_zeros(rows, gates.shape[-1])
    return sums.index_add_(0, plan.vision_row, gates.mean(1))
