"""One layer's attention: text densely, vision tokens by three branches that their gates mix."""

from __future__ import annotations

import torch

from ...paged.tables import Sequences
from ..base import AttentionCall
from .compress import compress
from .gates import gates_of
from .plan import BranchPlan, Index, VideoNSAPlan, take
from .select import select

SLAB = 128  # tokens whose branches are mixed at a time


def attend(step: VideoNSAPlan, call: AttentionCall) -> None:
    """Write the layer's output; ``step.gate_sums`` gets the gates' sums of each row."""
    plan: BranchPlan = step.attention
    if plan.text is not None:
        attend_text(call, plan.text, plan.text_sequences)
    with call.mapped(plan.vision):
        gates = gates_of(take(call.hidden, plan.vision), call.modules)  # [vision, heads, 3]
    step.gate_sums[call.layer] = _sum_by_row(gates, plan, len(step.tokens))
    query = take(call.query, plan.vision)
    output = _branches(step, call, query, gates)
    if not isinstance(plan.vision, slice):
        call.output[plan.vision] = output


def _branches(
    step: VideoNSAPlan, call: AttentionCall, query: torch.Tensor, gates: torch.Tensor
) -> torch.Tensor:
    """``[vision, heads, head_size]``: the branches, mixed; in the layer's output if it is a slice
    of that."""
    plan: BranchPlan = step.attention
    traced = None
    if step.trace is not None:
        shape = plan.number, call.kv_heads, plan.blocks
        traced = torch.zeros(shape, dtype=torch.bool, device=query.device)
    by_group = query.unflatten(1, (call.kv_heads, -1))
    compressed = compress(
        by_group,
        plan,
        call.key_summaries,
        call.value_summaries,
        call.scale,
        call.head_ranks,
        traced,
    ).transpose(0, 1)
    if traced is not None:
        step.trace.cubes(call.layer, traced)
    selected = select(call, plan, query)
    output = _windowed(call, plan, query)
    # All are [vision, kv_heads, group, d] from here on, and taken in slabs that stay in a cache.
    by_branch = gates.unflatten(1, (call.kv_heads, -1)).unsqueeze(-2).unbind(-1)
    windowed = output.unflatten(1, (call.kv_heads, -1))
    for tensors in zip(*(x.split(SLAB) for x in (compressed, selected, windowed, *by_branch))):
        cmp, slc, swa, of_cmp, of_slc, of_swa = tensors
        mixed = cmp.mul_(of_cmp).addcmul_(slc.float(), of_slc).addcmul_(swa.float(), of_swa)
        swa.copy_(mixed)
    return output


def _windowed(call: AttentionCall, plan: BranchPlan, query: torch.Tensor) -> torch.Tensor:
    """``[vision, heads, head_size]``, in the layer's output if it is a slice of that."""
    if isinstance(plan.vision, slice):
        windowed = call.output[plan.vision]
    else:
        windowed = plan.buffer("windowed", query.shape, call.output)
    for window in plan.windows:
        part = take(query, window.tokens).contiguous()
        whole = isinstance(window.tokens, slice)
        output = windowed[window.tokens] if whole else torch.empty_like(part, dtype=windowed.dtype)
        call.run_sequences(part, window.sequences, output, window=window.size)
        if not whole:
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
