"""VideoNSA as a method: which of its parts runs at which moment (methods/base.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ... import VIDEONSA_ARCHITECTURE
from ...paged.state import StepRows
from ...requests import Prompt
from ...settings import SettingsError
from ..base import AttentionCall, Method
from . import faithful_serve
from .attend import attend
from .faithful_serve import FaithfulPlan, attend_faithfully, build_faithful_plan
from .gates import gate_modules
from .plan import VideoNSAPlan, build_plan
from .request import VideoNSARequest
from .settings import VideoNSASettings


class VideoNSA(Method):
    """Compressed, selected and windowed attention for vision tokens (arXiv 2510.02295)."""

    settings_class = VideoNSASettings
    media = ("video", "image")
    sums_values = True
    wants_hidden = True
    tokens_choose = True

    @classmethod
    def check_server(cls, settings: VideoNSASettings, vllm_config: Any) -> None:
        """Refuse a checkpoint without gates, and what faithful mode cannot work with."""
        architectures = vllm_config.model_config.hf_config.architectures
        if VIDEONSA_ARCHITECTURE not in architectures:
            raise SettingsError(
                f"method=videonsa with a checkpoint of architecture {', '.join(architectures)}: "
                "VideoNSA mixes its branches by gates that only a checkpoint trained for it has "
                f"(architecture {VIDEONSA_ARCHITECTURE}); serve such a one, or leave the method out"
            )
        if settings.faithful:
            faithful_serve.check_server(vllm_config)

    @classmethod
    def attention_modules(
        cls, text_config: Any, quant_config: Any, prefix: str
    ) -> dict[str, torch.nn.Module]:
        """The gates' two projections."""
        return gate_modules(text_config, quant_config, prefix)

    def needs_one_step(self, settings: VideoNSASettings) -> bool:
        """In faithful mode, where a vision token sees later blocks."""
        return settings.enabled and settings.faithful

    def refuse(self, settings: VideoNSASettings, named: Any, prompt: Prompt) -> None:
        """Refuse a prompt that needs one step and does not fit in it."""
        if not self.needs_one_step(settings) or self.step_tokens is None:
            return
        if prompt.tokens > self.step_tokens and prompt.of(self.media).any():
            raise ValueError(
                f"this prompt has {prompt.tokens} tokens and this server runs {self.step_tokens} "
                "in a step, while VideoNSA in faithful mode must see a prompt at once: start the "
                "server with a larger --max-num-batched-tokens, or send fewer or smaller frames"
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
        """See plan.build_plan, and faithful_serve.build_faithful_plan."""
        build = build_faithful_plan if self.settings.faithful else build_plan
        return build(rows, requests, device)

    def attend(self, plan: VideoNSAPlan, call: AttentionCall) -> None:
        """See attend.attend, and faithful_serve.attend_faithfully."""
        if isinstance(plan, FaithfulPlan):
            attend_faithfully(plan, call, misread_lse=self.settings.lse == "released")
        else:
            attend(plan, call)
