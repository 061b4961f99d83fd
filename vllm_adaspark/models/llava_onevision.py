"""LLaVA-OneVision with AdaSpark: cube order, bounded-memory video encoding, sparse layers.

Chosen by the architecture ``AdaSparkLlavaOnevisionForConditionalGeneration`` in ``--hf-overrides``;
stock weights of every size load unchanged.  As for Qwen2.5-VL the processor attaches a request's
settings to its videos, and a video's embeddings are put into cube order.  Its positions are one
number each and vLLM's runner makes them, in the order of the prompt; so at the top of ``forward``
those of video tokens in cube order are overwritten by the positions that they have in raster order
(models/base.py).
"""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .. import LANGUAGE_MODEL
from .base import SparseModel
from .llava_onevision_processing import LlavaInfo, LlavaProcessor


@MULTIMODAL_REGISTRY.register_processor(
    LlavaProcessor, info=LlavaInfo, dummy_inputs=LlavaOnevisionDummyInputsBuilder
)
class AdaSparkLlavaOnevision(SparseModel, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision whose language model is Qwen2, all sizes, with AdaSpark."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        # The stock constructor builds the language model that text_config names.
        config.text_config.architectures = [LANGUAGE_MODEL]
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._share_runtime(config)

    def _process_video_pixels(self, inputs) -> tuple[torch.Tensor, ...]:
        """Each video's embeddings ``[tokens + 1, hidden]``: in cube order, then the newline."""
        videos = inputs["pixel_values_videos"]
        side = self.layout.side
        grids = [(len(frames), side, side) for frames in videos]
        return self._in_order([self._encode_in_pieces(frames) for frames in videos], grids)

    def _encode_in_pieces(self, frames: torch.Tensor) -> torch.Tensor:
        """A video's embeddings in raster order, the newline after them.

        The vision tower runs over a few frames ``[frames, 3, height, width]`` at a time, so its
        memory is bounded; no frame sees another, so the result is the same.
        """
        vision = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        step = max(1, self.runtime.method.settings.encoder_patches // patches)
        pieces = [
            self._video_pixels_to_features(self.vision_tower, piece).flatten(0, 1)
            for piece in frames.split(step)
        ]
        return torch.cat([*pieces, self.image_newline[None]])
