"""Faithful mode in a step: which of its rows are prompts with vision tokens, and their layers.

Such a prompt is whole in one step (the server refuses what would cut it, :func:`check_server`).
Its vision tokens run through ``faithful``; its text tokens attend densely by the stock kernel, over
the real KV cache, and get what the released code adds to them.  Everything else in the step is
text: decode steps, requests without vision, and the tokens that a preempted request had generated
and computes again behind its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ...paged.state import StepRows
from ...settings import SettingsError
from ..base import AttentionCall
from .attend import attend_text, sum_by_row
from .faithful import BLOCK, PromptPlan, attend, plan_prompt, rows_per_group
from .gates import gates_of
from .plan import BranchPlan, VideoNSAPlan, build_plan
from .request import VideoNSARequest


def check_server(vllm_config: Any) -> None:
    """Refuse what would show a vision token less than the whole prompt, or half of the KV heads.

    Raises:
        SettingsError: names the option, why, and what to do.
    """
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    later = "a vision token sees the means of later blocks, as the released code computes it"
    refused = [
        (
            scheduler.enable_chunked_prefill,
            f"chunked prefill: {later}, so a prompt must run in one step; start the server with "
            "--no-enable-chunked-prefill (and --max-num-batched-tokens for the longest prompt)",
        ),
        (
            vllm_config.cache_config.enable_prefix_caching,
            f"prefix caching: {later}, so what is cached of a prompt is wrong for another that "
            "goes on differently; start the server with --no-enable-prefix-caching",
        ),
        (
            scheduler.long_prefill_token_threshold > 0,
            f"--long-prefill-token-threshold {scheduler.long_prefill_token_threshold}: {later}, "
            "so a prompt must run in one step; leave it out",
        ),
        (
            parallel.tensor_parallel_size > 1,
            f"--tensor-parallel-size {parallel.tensor_parallel_size}: the released code gives "
            "query heads to other KV heads than their own, which another rank holds; use 1",
        ),
    ]
    for unsupported, what in refused:
        if unsupported:
            raise SettingsError(f'VideoNSA with mode="faithful" does not support {what}')


@dataclass
class FaithfulPlan(VideoNSAPlan):
    """A step with whole prompts that have vision tokens, each with its tokens of the step."""

    prompts: tuple[tuple[slice, PromptPlan], ...] = ()


def build_faithful_plan(
    rows: StepRows, requests: Sequence[VideoNSARequest | None], device: torch.device
) -> FaithfulPlan | None:
    """As plan.build_plan, for this mode."""
    step = build_plan(rows, requests, device)
    if step is None:
        return None
    prompts, pairs = [], []
    for row, (request, length) in enumerate(zip(requests, rows.query_lens, strict=True)):
        counted = 0.0, 0.0, 0.0
        if request is not None and length and step.video_tokens[row]:
            prompt = len(request.is_video)
            first = int(rows.query_start[row])
            assert rows.computed[row] == 0 and length >= prompt, "a prompt is whole in its step"
            config = request.config
            made = plan_prompt(request.is_video, config.block_counts, config.window_size, device)
            prompts.append((slice(first, first + prompt), made))
            counted = _pairs(made)
        pairs.append(counted)
    branches: BranchPlan = step.attention
    cmp_pairs, slc_pairs, swa_pairs = np.array(pairs).T
    branches = replace(
        branches, rows=(), cmp_pairs=cmp_pairs, slc_pairs=slc_pairs, swa_pairs=swa_pairs
    )
    fields = vars(step) | {"attention": branches, "sum_writes": None}
    return FaithfulPlan(**fields, prompts=tuple(prompts))


def _pairs(prompt: PromptPlan) -> tuple[float, float, float]:
    """Pairs of a query and a key in the three branches, for as many query rows as heads.

    In the compressed branch a block before the own one costs only the first of both products.
    """
    position = np.asarray(prompt.vision.cpu())
    ahead = prompt.blocks - prompt.own
    chosen = np.minimum(prompt.own, prompt.places - 1) * BLOCK + position % BLOCK + 1
    near = np.minimum(position + 1, prompt.window)
    return float((prompt.blocks + ahead).sum() / 2), float(chosen.sum()), float(near.sum())


class KernelPages:
    """``faithful.Pages`` over a scratch KV cache, by the kernel of the backend vLLM chose."""

    def __init__(self, call: AttentionCall) -> None:
        self._call = call

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self._run = self._call.open_scratch(key, value)

    def select(
        self, query: torch.Tensor, chosen: torch.Tensor, plan: PromptPlan, scale: float
    ) -> torch.Tensor:
        n, kv_heads, _ = chosen.shape
        sequences = plan.selection(kv_heads)
        table = sequences.block_table.view(kv_heads, n, plan.places)
        head = torch.arange(kv_heads, device=query.device)[:, None]
        table[..., :-1] = chosen.transpose(0, 1).clamp(min=0) * kv_heads + head[..., None]
        # The own block comes last, so what it lacks at its end is the sequence's alone.
        own = (plan.vision // BLOCK * kv_heads + head).to(table.dtype)  # [kv_heads, n]
        table.scatter_(2, plan.counts.expand(kv_heads, n)[..., None], own[..., None])
        asking = query.transpose(0, 1).contiguous()  # [kv_heads, n, rows, d]
        out = torch.empty_like(asking)
        self._run(asking.flatten(0, 1), sequences, out.flatten(0, 1), one_kv_head=True)
        return out.transpose(0, 1)

    def attend_window(self, query: torch.Tensor, plan: PromptPlan, scale: float) -> torch.Tensor:
        out = torch.empty_like(query)
        self._run(query.flatten(1, 2), plan.windows, out.flatten(1, 2), window=plan.window)
        return out


def attend_faithfully(step: FaithfulPlan, call: AttentionCall, misread_lse: bool) -> None:
    """Write the layer's output; ``step.gate_sums`` gets the gates' sums of each row."""
    plan: BranchPlan = step.attention
    attend_text(call, plan)
    of_vision = gates_of(call.hidden[plan.vision], call.modules)
    step.gate_sums[call.layer] = sum_by_row(of_vision, plan, len(step.tokens))
    gates = of_vision.new_zeros(len(call.query), *of_vision.shape[1:])
    gates[plan.vision] = of_vision
    for tokens, prompt in step.prompts:
        out, _ = attend(
            prompt, call.query[tokens], call.key[tokens], call.value[tokens], gates[tokens],
            call.scale, KernelPages(call), misread_lse=misread_lse,
        )  # fmt: skip
        dense = call.output[tokens]
        out[prompt.text] += dense[prompt.text]
        dense.copy_(out)


def row_factor(heads: int, kv_heads: int) -> float:
    """How many query rows the branches run for each query head: 64 for 28 in the released model."""
    return rows_per_group(heads, kv_heads) * kv_heads / heads
