"""Faithful mode in the engine: whole prompts, each over a scratch KV cache of its own.

What is computed stands in ``faithful.py``; here are the plan of a step, the pages that it needs, on
the kernel of the backend that vLLM chose, and its cost.  A prompt with vision tokens is all in one
step, which the scheduler sees to (scheduler.py), since vision tokens see the means of later blocks.
Text attends densely over the real KV cache, and within a prompt gets the released code's extra
terms; tokens that were generated, and come again after a preemption, do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ...accounts.flops import ModelShape
from ...paged.plan import Told
from ...paged.state import StepRows
from ...paged.tables import Sequences
from ...paged.tiles import Tiles, Tokens, cubes_of
from ..base import AttentionCall
from . import faithful, gates
from .attend import attend_text
from .compress import as_mask
from .faithful import PromptPlan
from .plan import Index, Runs, VideoNSAPlan, index_of, told_everywhere, vision_tiles
from .request import VideoNSARequest
from .settings import BLOCK


@dataclass
class FaithfulPlan:
    """What every layer needs, and on the host ``[rows]`` counts for the accounts."""

    text: Index | None  # tokens of the step that attend densely
    text_sequences: Sequences | None
    prompts: tuple[tuple[int, slice, PromptPlan], ...]  # row, its prompt's tokens in the step, plan
    text_pairs: np.ndarray  # (query, key) pairs of text
    later: np.ndarray  # of vision queries and means from the own block on, which are attended
    before: np.ndarray  # of vision queries and means before it, which are only rated
    slc_pairs: np.ndarray
    swa_pairs: np.ndarray
    selected: np.ndarray  # (vision query, selected block) pairs, the own block not counted
    blocks: int  # that a request of the step has at the most
    cut: Callable[[], Tiles] | None  # see ``tiles``
    first_layer: int = 0

    @cached_property
    def tiles(self) -> Tiles:
        """The step as tiles, for traces: each vision token is one, which chooses among all blocks
        before its own; text tokens choose nothing."""
        return self.cut()


@dataclass
class FaithfulStep(VideoNSAPlan):
    """A step in faithful mode."""

    def tell(self, shape: ModelShape, layers: range) -> Told:
        """FLOPs by branch: of all query rows, those included that the released code pads with."""
        plan: FaithfulPlan = self.attention
        rows = faithful.rows_per_group(shape.heads, shape.kv_heads) * shape.kv_heads
        product = 2 * rows * shape.head_size  # of a query's rows with one vector
        by_part = {
            "text": plan.text_pairs * shape.attention_flops_per_pair,
            "cmp": (2 * plan.later + plan.before) * product,
            "slc": plan.slc_pairs * 2 * product,
            "swa": plan.swa_pairs * 2 * product,
        }
        return told_everywhere(self, by_part, plan.selected, shape, layers)


def build_plan(
    rows: StepRows, requests: Sequence[VideoNSARequest | None], device: torch.device
) -> FaithfulStep | None:
    """The plan of a step, or None when no vision token is in it; see plan.build_plan."""
    on = [
        r if r is not None and r.has_vision(done, end) else None
        for r, done, end in zip(requests, rows.computed, rows.seq_lens, strict=True)
    ]
    if all(request is None for request in on):
        return None
    row_cubes, in_prompt = cubes_of(rows, on, BLOCK)
    table = rows.block_table[:, : row_cubes.shape[1]]
    tokens = Tokens.of(rows, on, row_cubes, in_prompt, BLOCK)
    vision, text = np.flatnonzero(tokens.is_video), np.flatnonzero(~tokens.is_video)
    row, position = tokens.row[vision], tokens.position[vision]
    own = position // BLOCK
    prompts = []
    for r, request in enumerate(on):
        if request is not None:
            assert not rows.computed[r], "a prompt in faithful mode begins in an earlier step"
            first = int(rows.query_start[r])
            config = request.config
            plan = faithful.plan_prompt(
                request.is_video, config.block_counts, config.window_size, device,
                misread_lse=config.lse == "released",
            )  # fmt: skip
            prompts.append((r, slice(first, first + plan.tokens), plan))
    places, window, blocks = np.zeros((3, len(on)), int)
    for r, _, plan in prompts:
        places[r], window[r], blocks[r] = plan.places, plan.window, plan.blocks
    selected = np.minimum(own, places[row] - 1)
    any_block = np.ones_like(row_cubes)

    def by_row(of_row: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.bincount(of_row, values, minlength=len(on))

    text_sequences = None
    if len(text):
        text_sequences = Runs.of(tokens).sequences_of_text(table, device)
    return FaithfulStep(
        attention=FaithfulPlan(
            text=index_of(text, device) if len(text) else None,
            text_sequences=text_sequences,
            prompts=tuple(prompts),
            text_pairs=by_row(tokens.row[text], tokens.position[text] + 1),
            later=by_row(row, blocks[row] - own),
            before=by_row(row, own),
            slc_pairs=by_row(row, selected * BLOCK + position % BLOCK + 1),
            swa_pairs=by_row(row, np.minimum(position + 1, window[row])),
            selected=by_row(row, selected),
            blocks=row_cubes.shape[1],
            cut=lambda: vision_tiles(tokens, any_block),
        ),
        ffn=None,
        summary_writes=None,
        video_tokens=np.bincount(row, minlength=len(on)),
        cubes_seen=by_row(row, own),
        block_size=BLOCK,
        tokens=rows.query_lens,
    )


def attend(step: FaithfulStep, call: AttentionCall) -> None:
    """Write the layer's output; ``step.gate_sums`` gets the gates' sums of each row."""
    plan: FaithfulPlan = step.attention
    if plan.text is not None:
        attend_text(call, plan.text, plan.text_sequences)
    sums, traced = torch.zeros(len(step.tokens), len(gates.BRANCHES)), []
    sums = sums.to(call.output.device)
    for row, tokens, prompt in plan.prompts:
        with call.mapped(tokens):
            of_prompt = gates.gates_of(call.hidden[tokens], call.modules)
        sums[row] = of_prompt[prompt.vision].mean(1).sum(0)
        query, key, value = (x[tokens] for x in (call.query, call.key, call.value))
        pages = KernelPages(call)
        mixed, chosen = faithful.attend(prompt, query, key, value, of_prompt, call.scale, pages)
        output = call.output[tokens]
        if len(prompt.text):
            mixed[prompt.text] += output[prompt.text].float()
        output.copy_(mixed)
        if step.trace is not None:
            traced.append(as_mask(chosen, plan.blocks))
    step.gate_sums[call.layer] = sums
    if step.trace is not None:
        step.trace.cubes(call.layer, torch.cat(traced))


class KernelPages:
    """``faithful.Pages`` on the paged kernel that vLLM chose."""

    def __init__(self, call: AttentionCall) -> None:
        self._call = call

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """See ``faithful.Pages``."""
        self._cache = self._call.scratch_cache(key, value)

    def select(
        self, query: torch.Tensor, chosen: torch.Tensor, plan: PromptPlan, scale: float
    ) -> torch.Tensor:
        """See ``faithful.Pages``: a sequence of one query for each (KV head, token)."""
        n, kv_heads = query.shape[:2]
        sequences = plan.selection(kv_heads)
        table = sequences.block_table.view(kv_heads, n, plan.places)
        head = torch.arange(kv_heads, device=query.device)[:, None]
        table[..., :-1] = chosen.transpose(0, 1).clamp(min=0) * kv_heads + head[..., None]
        # The own block comes behind the chosen ones, so that its missing end is the sequence's.
        own = (plan.vision // BLOCK * kv_heads + head).to(table.dtype)  # [kv_heads, n]
        table.scatter_(2, plan.counts.expand(kv_heads, n)[..., None], own[..., None])
        asking = query.transpose(0, 1).contiguous()  # [kv_heads, n, rows, d]
        output = torch.empty_like(asking)
        self._call.run_sequences(
            asking.flatten(0, 1), sequences, output.flatten(0, 1), one_kv_head=True,
            cache=self._cache,
        )  # fmt: skip
        return output.transpose(0, 1)

    def attend_window(self, query: torch.Tensor, plan: PromptPlan, scale: float) -> torch.Tensor:
        """See ``faithful.Pages``: each run of vision tokens is a sequence."""
        asking = query.flatten(1, 2)
        output = torch.empty_like(asking)
        self._call.run_sequences(
            asking, plan.windows, output, window=plan.window, cache=self._cache
        )
        return output.view_as(query)
