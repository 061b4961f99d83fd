"""LLaVA-OneVision's processor: the shared checks; its frames all get one size."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal.parse import MultiModalDataParser

from .processing import OurInfo, OurProcessor


class LlavaInfo(OurInfo, LlavaOnevisionProcessingInfo):
    """Stock, but our request key is not passed on, and videos come as frames."""

    def get_data_parser(self):
        return FramesOnlyParser(
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )


class FramesOnlyParser(MultiModalDataParser):
    """Stock, but embeddings in place of a video, which the model does not take, are refused.

    vLLM's model would fail an assertion on them, which ends the engine.
    """

    def _parse_video_data(self, data: Any):
        if isinstance(data, dict) or (data is not None and self.is_embeddings(data)):
            raise ValueError("video_embeds: LLaVA-OneVision takes videos as frames only")
        return super()._parse_video_data(data)


class LlavaProcessor(OurProcessor, LlavaOnevisionMultiModalProcessor):
    """The shared checks are all that it needs: positions are those of the prompt's tokens."""

    any_size = False
