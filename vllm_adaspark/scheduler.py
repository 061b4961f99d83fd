"""vLLM's schedulers, with two rules of ours for requests with video: where their chunks may end.

**No chunk ends inside a block that chooses as one** (``Method.uncut_blocks``).  AdaSpark chooses
once per cube, and a cube that a chunk edge cuts would run dense; where chunks end follows from what
else is in a step, so an answer would depend on its neighbours.  A chunk that would end inside such
a block ends before it.  If nothing of it is left, the request waits for the next step, and whoever
is behind it gets the tokens.  Cubes that choose together (``tile_cubes``) are one such block, and a
prefix hit that would end between them ends before both.  A server whose steps may be shorter than
that cuts as stock vLLM does, and says so when it starts.

**Prompts in one step** (``Settings.one_step``).  Where a method drops tokens between layers, a
prompt's text decides which video tokens go on, so it must run in one step; and its KV blocks must
be its own, because later layers write survivors into the front slots, and not even the same
request again could use them.  So here

* such a prompt waits until a step has room for all of it; whatever runs beside it comes in chunks;
* its blocks are looked up by nobody: it reads no prefix, and its block hashes carry a salt of its
  own, also where clients share a ``cache_salt``.

The encoder's and the processor's caches still serve the same video.  A prompt that no step can hold
would wait for ever; the processor refuses it (models/processing.py).

Requests without video, and those whose sparsity is off, are scheduled as by stock vLLM.  Written
for vLLM 0.32.0, whose ``_try_schedule_encoder_inputs`` is the one place that may shorten a
request's part of a step, and whose ``_get_local_prefix_cache_hit`` says where its first one begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from .methods.base import method_class, server_settings
from .models.layout import layout_of
from .requests import Prompt, media_of, settings_of

logger = init_logger("vllm.adaspark")

Scheduled = tuple[list[int], int, int, list[int], list[int]]  # the second: how many tokens run


@dataclass(frozen=True)
class ChunkRules:
    """What the scheduler must heed of a request.

    Attributes:
        tokens: of the prompt that this was made for.
        one_step: whether the prompt must run in one step, in blocks of its own.
        uncut: ``[blocks]`` int, see ``Method.uncut_blocks``; None where a chunk may end anywhere.
    """

    tokens: int
    one_step: bool = False
    uncut: np.ndarray | None = None

    def chunk_end(self, end: int, size: int) -> int:
        """Where a chunk ends that would end before token ``end``; ``size``: tokens in a block."""
        block = end // size
        if self.uncut is None or block >= len(self.uncut) or self.uncut[block] < 0:
            return end
        return int(self.uncut[block]) * size


class ChunkRulesMixin:
    """Mixed in before a stock scheduler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        hf_config = self.vllm_config.model_config.hf_config
        self._method = method_class(hf_config)
        self._after_video = layout_of(hf_config).after_video
        self._rules: WeakKeyDictionary[Request, ChunkRules] = WeakKeyDictionary()
        self._size = self.vllm_config.cache_config.block_size
        tile = server_settings(hf_config).tile_tokens
        self._may_cut = self._shortest_whole_step() < tile
        if self._may_cut:
            logger.warning(
                "AdaSpark: steps of this server may hold less than the %d tokens that choose "
                "together, so chunk edges cut cubes, which then run dense, and a choice may depend "
                "on what shares the step; set --max-num-batched-tokens, --max-num-scheduled-tokens "
                "and --long-prefill-token-threshold to %d or more",
                *(tile, tile),
            )

    def _shortest_whole_step(self) -> int:
        """The most tokens that a request gets in a step that it has for itself."""
        scheduler, drafts = self.scheduler_config, self.vllm_config.speculative_config
        slots = drafts.max_num_new_slots_for_drafting if drafts is not None else 0
        limits = [self.max_num_scheduled_tokens, scheduler.max_num_batched_tokens - slots]
        if scheduler.long_prefill_token_threshold > 0:
            limits.append(scheduler.long_prefill_token_threshold)
        return min(limits)

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests and self._rules_of(request).one_step:
            request.skip_reading_prefix_cache = True  # also after a preemption
            request.cache_salt = f"{request.cache_salt or ''}/{request.request_id}"
            request.block_hashes.clear()  # made with the client's salt
            request.update_block_hashes()
        super().add_request(request)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        """As stock, but a hit that would end between blocks that choose together ends before."""
        blocks, tokens, *rest = super()._get_local_prefix_cache_hit(request)
        end = self._rules_of(request).chunk_end(tokens, self._size)
        if end < tokens and not self._may_cut:
            whole = end // self._size
            blocks = KVCacheBlocks(tuple(group[:whole] for group in blocks.blocks))
            tokens = end
        return blocks, tokens, *rest

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        **kwargs: Any,
    ) -> Scheduled:
        """As stock, under the request's rules.  It is called for every request with media."""
        rules = self._rules_of(request)
        nothing = [], 0, encoder_compute_budget, [], []
        needs = request.num_prompt_tokens - num_computed_tokens
        one_step = rules.one_step and needs > 0
        if one_step and num_new_tokens < needs:
            return nothing
        num_new_tokens = self._uncut(rules, num_computed_tokens, num_new_tokens)
        scheduled = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, **kwargs
        )
        # The encoder may have had no room for a video, and the chunk then ends before that.
        if one_step and scheduled[1] < needs:
            self.encoder_cache_manager.free(request)
            return nothing
        inputs, left, *rest = scheduled
        left = self._uncut(rules, num_computed_tokens, left)
        return (inputs, left, *rest) if left else nothing

    def _uncut(self, rules: ChunkRules, start: int, new: int) -> int:
        """How many of ``new`` tokens from ``start`` on may run, so that no block is cut."""
        if self._may_cut or rules.uncut is None:
            return new
        return max(rules.chunk_end(start + new, self._size) - start, 0)

    def _rules_of(self, request: Request) -> ChunkRules:
        rules = self._rules.get(request)
        if rules is None or rules.tokens != request.num_prompt_tokens:
            rules = self._rules[request] = self._make_rules(request)
        return rules

    def _make_rules(self, request: Request) -> ChunkRules:
        tokens, features = request.num_prompt_tokens, request.mm_features
        media = media_of(features, self._method.media)
        if not media:
            return ChunkRules(tokens)
        settings = settings_of(media[0], self._method.settings_class)
        prompt = Prompt.from_features(tokens, features, after_video=self._after_video)
        return ChunkRules(
            tokens,
            settings.one_step,
            self._method.uncut_blocks(settings, prompt),
        )


class ChunkScheduler(ChunkRulesMixin, Scheduler):
    """vLLM's scheduler under our rules."""


class ChunkAsyncScheduler(ChunkRulesMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler under our rules."""


def scheduler_for(*, vllm_config: Any, **kwargs: Any) -> Scheduler:
    """The scheduler of an engine; vLLM's engine core calls this as it would a class.

    Whether scheduling is asynchronous is settled after our start-up check has run.
    """
    is_async = vllm_config.scheduler_config.async_scheduling
    kind = ChunkAsyncScheduler if is_async else ChunkScheduler
    return kind(vllm_config=vllm_config, **kwargs)
