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

from ...accounts.account import ModelShape
from ...paged.plan import Told
from ...paged.state import StepRows
from ...settings import SettingsError
from ..base import ONE_STEP_SCHEDULER, AttentionCall
from .attend import attend_text, sum_by_row
from .faithful import PromptPlan, attend, plan_prompt, rows_per_group
from .gates import BRANCHES, gates_of
from .plan import BranchPlan, VideoNSAPlan, build_plan
from .request import VideoNSARequest
from .settings import BLOCK


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
        (
            scheduler.scheduler_cls not in (None, ONE_STEP_SCHEDULER),
            f"--scheduler-cls {scheduler.scheduler_cls}: a prompt must run in one step, which our "
            "scheduler sees to; leave it out",
        ),
    ]
    for unsupported, what in refused:
        if unsupported:
            raise SettingsError(f'VideoNSA with mode="faithful" does not support {what}')
    scheduler.scheduler_cls = ONE_STEP_SCHEDULER  # the encoder may have no room for all videos


@dataclass
class FaithfulPlan(VideoNSAPlan):
    """A step with whole prompts that have vision tokens, each with its tokens of the step."""

    prompts: tuple[tuple[slice, PromptPlan], ...] = ()

    def tell(self, shape: ModelShape, layers: range) -> Told:
        """As in paper mode, for more query rows than heads: 64 for 28 in the released model."""
        told = super().tell(shape, layers)
        rows = rows_per_group(shape.heads, shape.kv_heads) * shape.kv_heads / shape.heads
        more = {name: told.flops[name] * rows for name in BRANCHES}
        return replace(told, flops=dict(told.flops) | more)


def build_faithful_plan(
    rows: StepRows, requests: Sequence[VideoNSARequest | None], device: torch.device
) -> FaithfulPlan | None:
    """As plan.build_plan, for this mode."""
    step = build_plan(rows, requests, device, every_block=True)
    if step is None:
        return None
    prompts, cmp_pairs = [], np.zeros(len(requests))
    for row, request in enumerate(requests):
        if request is None or not step.video_tokens[row]:
            continue
        tokens, first = len(request.is_video), int(rows.query_start[row])
        whole = rows.computed[row] == 0 and rows.query_lens[row] >= tokens
        assert whole, "the scheduler runs a prompt in one step"
        config = request.config
        prompt = plan_prompt(request.is_video, config.block_counts, config.window_size, device)
        prompts.append((slice(first, first + tokens), prompt))
        # Logits with all blocks; values only of the own block and later ones.
        cmp_pairs[row] = (2 * prompt.blocks - prompt.own).sum() / 2
    attention = replace(step.attention, cmp_pairs=cmp_pairs)
    fields = vars(step) | {"attention": attention, "sum_writes": None}
    return FaithfulPlan(**fields, prompts=tuple(prompts))


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
    choices = []
    for tokens, prompt in step.prompts:
        out, chosen = attend(
            prompt, call.query[tokens], call.key[tokens], call.value[tokens], gates[tokens],
            call.scale, KernelPages(call), misread_lse=misread_lse,
        )  # fmt: skip
        choices.append(chosen)
        here = call.output[tokens]
        out[prompt.text] += here[prompt.text]  # what the stock kernel gave
        here.copy_(out)
    if step.trace is not None:
        step.trace.cubes(call.layer, _as_mask(choices, plan.blocks))


def _as_mask(choices: list[torch.Tensor], blocks: int) -> torch.Tensor:
    """``[vision, kv_heads, blocks]`` bool; ``choices`` as ``attend`` gives them, by prompt."""
    masks = []
    for chosen in choices:
        mask = chosen.new_zeros(*chosen.shape[:2], blocks + 1, dtype=torch.bool)
        masks.append(mask.scatter_(2, chosen.masked_fill(chosen < 0, blocks), True)[..., :-1])
    return torch.cat(masks)
