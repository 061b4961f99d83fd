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
from .attend import attend
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
        """Refuse a checkpoint without gates."""
        architectures = vllm_config.model_config.hf_config.architectures
        if VIDEONSA_ARCHITECTURE not in architectures:
            raise SettingsError(
                f"method=videonsa with a checkpoint of architecture {', '.join(architectures)}: "
                "VideoNSA mixes its branches by gates that only a checkpoint trained for it has "
                f"(architecture {VIDEONSA_ARCHITECTURE}); serve such a one, or leave the method out"
            )

    @classmethod
    def attention_modules(
        cls, text_config: Any, quant_config: Any, prefix: str
    ) -> dict[str, torch.nn.Module]:
        """The gates' two projections."""
        return gate_modules(text_config, quant_config, prefix)

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
        """See plan.build_plan."""
        return build_plan(rows, requests, device)

    def attend(self, plan: VideoNSAPlan, call: AttentionCall) -> None:
        """See attend.attend."""
        attend(plan, call)
