"""VideoNSA as a method: which of its parts runs at which moment (methods/base.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ... import VIDEONSA_ARCHITECTURE
from ...paged.state import StepRows
from ...requests import Prompt
from ...settings import SettingsError
from ..base import SCHEDULER, AttentionCall, Method
from . import faithful, faithful_step
from .attend import attend
from .compress import SLAB
from .gates import gate_modules
from .plan import VideoNSAPlan, build_plan
from .request import VideoNSARequest
from .settings import BLOCK, VideoNSASettings

MOST_BLOCKS = 32  # that a request may ask for whatever the server's setting: those of the release


def _check_faithful(vllm_config: Any) -> None:
    """Refuse what faithful mode cannot do, and let the scheduler keep prompts in one step."""
    scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    refused = [
        (
            scheduler.enable_chunked_prefill,
            "chunked prefill, because a vision token sees the means of later blocks; add "
            "--no-enable-chunked-prefill",
        ),
        (
            cache.enable_prefix_caching,
            "prefix caching, because a prompt's keys and values depend on what comes after them; "
            "add --no-enable-prefix-caching",
        ),
        (
            vllm_config.speculative_config is not None,
            "--speculative-config, which nobody has tried with it; leave it out",
        ),
        (
            parallel.tensor_parallel_size > 1,
            f"--tensor-parallel-size {parallel.tensor_parallel_size}, because its query rows see "
            "KV heads of other ranks; leave it out",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size}; leave it out",
        ),
        (
            scheduler.long_prefill_token_threshold > 0,
            f"--long-prefill-token-threshold {scheduler.long_prefill_token_threshold}, because a "
            "prompt must run in one step; leave it out",
        ),
        (
            scheduler.scheduler_cls not in (None, SCHEDULER),
            f"--scheduler-cls {scheduler.scheduler_cls}, because a prompt must run in one step, "
            "which our scheduler sees to; leave it out",
        ),
    ]
    for unsupported, what in refused:
        if unsupported:
            raise SettingsError(f"mode=faithful does not support {what}")
    scheduler.scheduler_cls = SCHEDULER


class VideoNSA(Method):
    """Compressed, selected and windowed attention for vision tokens (arXiv 2510.02295)."""

    settings_class = VideoNSASettings
    media = ("video", "image")
    wants_hidden = True
    tokens_choose = True

    def __init__(self, settings: VideoNSASettings, text_config: Any, device_type: str) -> None:
        super().__init__(settings, text_config, device_type)
        self._hidden = text_config.hidden_size
        self._most_blocks = max(settings.block_counts, MOST_BLOCKS)

    @classmethod
    def check_server(cls, settings: VideoNSASettings, vllm_config: Any) -> None:
        """Refuse a checkpoint without gates, and in faithful mode what it cannot do."""
        architectures = vllm_config.model_config.hf_config.architectures
        if VIDEONSA_ARCHITECTURE not in architectures:
            raise SettingsError(
                f"method=videonsa with a checkpoint of architecture {', '.join(architectures)}: "
                "VideoNSA mixes its branches by gates that only a checkpoint trained for it has "
                f"(architecture {VIDEONSA_ARCHITECTURE}); serve such a one, or leave the method out"
            )
        if settings.mode == "faithful":
            _check_faithful(vllm_config)

    @classmethod
    def attention_modules(
        cls, text_config: Any, quant_config: Any, prefix: str
    ) -> dict[str, torch.nn.Module]:
        """The gates' two projections."""
        return gate_modules(text_config, quant_config, prefix)

    def step_bytes(self, tokens: int, heads: int, kv_heads: int, head_size: int, item: int) -> int:
        """Two branches and their mixture in fp32, inputs and outputs of the others, and tables."""
        if self.settings.mode == "faithful":
            heads = kv_heads * faithful.rows_per_group(heads, kv_heads)
        numbers = heads * head_size * (3 * torch.float32.itemsize + 3 * item)
        numbers += 2 * self._hidden * item  # the gates' inputs
        places = kv_heads * self._most_blocks * (2 * torch.int64.itemsize)
        return tokens * (numbers + places) + 2 * SLAB * torch.int64.itemsize

    def refuse(self, settings: VideoNSASettings, named: Any, prompt: Prompt) -> None:
        """Refuse more blocks than there is memory for, and faithfully a prompt in several steps."""
        if not settings.enabled:
            return
        blocks = min(settings.block_counts, -(-prompt.tokens // BLOCK))
        if blocks > self._most_blocks:
            raise SettingsError(
                f"block_counts={settings.block_counts}: this server has memory for "
                f"{self._most_blocks} blocks a token; ask for no more, or start the server with a "
                "larger block_counts"
            )
        limit = self.step_tokens
        if limit is None or prompt.tokens <= limit or not prompt.of(self.media).any():
            return
        if settings.one_step:
            raise SettingsError(
                f"the prompt has {prompt.tokens} tokens, and this server runs {limit} in a step, "
                "while VideoNSA's faithful mode needs a prompt in one: send a shorter video, or "
                "start the server with a larger --max-num-batched-tokens"
            )

    def describe(self, settings: VideoNSASettings, prompt: Prompt) -> VideoNSARequest:
        """A request with videos or images, whose tokens are all vision tokens."""
        return VideoNSARequest(settings, prompt.of(self.media))

    def told(self, request: VideoNSARequest) -> dict[str, Any]:
        """Its settings under the names that users know."""
        config = request.config
        return {
            "mode": config.mode,
            "block_counts": config.block_counts,
            "window_size": config.window_size,
            "trace": config.trace,
            "off": not config.enabled,
        }

    def plan(
        self,
        rows: StepRows,
        requests: Sequence[VideoNSARequest | None],
        device: torch.device,
    ) -> VideoNSAPlan | None:
        """See plan.build_plan, and faithful_step.build_plan."""
        build = faithful_step.build_plan if self.settings.mode == "faithful" else build_plan
        return build(rows, requests, device)

    def attend(self, plan: VideoNSAPlan, call: AttentionCall) -> None:
        """See attend.attend, and faithful_step.attend."""
        if isinstance(plan, faithful_step.FaithfulStep):
            faithful_step.attend(plan, call)
        else:
            attend(plan, call)
