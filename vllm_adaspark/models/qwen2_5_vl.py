"""Qwen2.5-VL with AdaSpark: cube order, bounded-memory video encoding, sparse layers.

Chosen by ``--hf-overrides '{"architectures": ["AdaSparkQwen2_5_VLForConditionalGeneration"]}'``;
stock weights of every size load unchanged.  Three things happen to a video on its way:

* the processor validates the request's settings and attaches them to each video;
* after the vision tower the video's embeddings are put into cube order;
* its M-RoPE positions, which are the stock model's, are put into the same order.

Where a request asks to drop tokens (``prune``), pruned.py does the last two.

At the top of ``forward`` the step is planned, from what the worker knows of its requests.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fusion.mm_input_norm import build_mm_input_norm
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VisionTransformer,
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
)
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.model_executor.models.vision import run_dp_sharded_mrope_vision_model
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

from .. import LANGUAGE_MODEL
from ..requests import settings_of, videos_of
from .base import SparseModel
from .layout import token_order
from .pruned import PrunedVideos, in_whole_prompt
from .qwen2_5_vl_processing import AdaSparkProcessingInfo, AdaSparkProcessor


@MULTIMODAL_REGISTRY.register_processor(
    AdaSparkProcessor,
    info=AdaSparkProcessingInfo,
    dummy_inputs=Qwen2_5_VLDummyInputsBuilder,
)
class AdaSparkQwen2_5_VL(PrunedVideos, SparseModel, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL, all sizes, with AdaSpark."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        # As the stock constructor, which names its language model's architecture itself.
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        multimodal_config = vllm_config.model_config.get_multimodal_config()
        self.use_data_parallel = multimodal_config.mm_encoder_tp_mode == "data"
        # vLLM's drafters look there in models that they do not know by name (EAGLE).
        config.image_token_index = config.image_token_id
        self.config = config
        self.model_config = vllm_config.model_config
        self.vllm_config = vllm_config
        self.multimodal_config = multimodal_config
        self.video_pruning_rate = None  # refused at start
        self.is_multimodal_pruning_enabled = False
        with self._mark_tower_model(vllm_config, {"image", "video"}):
            self.visual = Qwen2_5_VisionTransformer(
                vision_config=config.vision_config,
                norm_eps=getattr(config, "rms_norm_eps", 1e-6),
                quant_config=self.quant_config,
                input_norm=build_mm_input_norm(self.model_config),
                prefix=maybe_prefix(prefix, "visual"),
            )
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=[LANGUAGE_MODEL],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        self._share_runtime(config)

    # -- from video to embeddings ---------------------------------------------------------------

    def _process_video_input(self, video_input) -> tuple[torch.Tensor, ...]:
        """Each video's embeddings ``[tokens, hidden]``, in cube order; if pruned, with places."""
        grids = video_input["video_grid_thw"].tolist()
        if video_input["type"] == "video_embeds":
            videos = super()._process_video_input(video_input)
        else:
            videos = self._encode_in_pieces(video_input["pixel_values_videos"], grids)
        seconds = video_input.get("second_per_grid_ts")
        seconds = [1.0] * len(grids) if seconds is None else torch.as_tensor(seconds).tolist()
        per_second = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        merged = [self.layout.merged(grid) for grid in grids]
        return self._in_order(videos, merged, [apart * per_second for apart in seconds])

    def _encode_in_pieces(
        self, pixels: torch.Tensor, grids: list[list[int]]
    ) -> tuple[torch.Tensor, ...]:
        """Run the vision tower over a few temporal patches at a time, so its memory is bounded.

        Qwen2.5-VL's vision attention never crosses a temporal patch, so the result is the same.
        """
        limit = self.runtime.method.settings.encoder_patches
        videos, start = [], 0
        for t, h, w in grids:
            step = max(1, limit // (h * w))
            pieces = []
            for first in range(0, t, step):
                frames = min(step, t - first)
                piece = pixels[start : start + frames * h * w]
                start += frames * h * w
                pieces.append(self._encode(piece, [frames, h, w]))
            videos.append(torch.cat(pieces) if len(pieces) > 1 else pieces[0])
        return tuple(videos)

    def _encode(self, pixels: torch.Tensor, grid: list[int]) -> torch.Tensor:
        if not self.use_data_parallel:
            return self.visual(pixels, grid_thw=[grid])
        # One item per temporal patch, so that all data-parallel ranks have some.
        t, h, w = grid
        sharded = run_dp_sharded_mrope_vision_model(
            self.visual, pixels, [[1, h, w]] * t, rope_type="rope_3d"
        )
        return torch.cat(sharded)

    def get_encoder_cudagraph_config(self):
        # The encoder's CUDA-graph path bypasses _process_video_input, and with it the order.
        config = super().get_encoder_cudagraph_config()
        return replace(config, modalities=[m for m in config.modalities if m != "video"])

    # -- positions --------------------------------------------------------------------------------

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """Stock positions ``[3, tokens]``, those of each video in the order of its tokens.

        All tokens of a pruned video get that of its first one; what follows the video starts behind
        the whole of it, so the answer's positions are known before the video is encoded.
        """
        whole = self.layout.whole_prompt(len(input_tokens), mm_features)
        positions, delta = super().get_mrope_input_positions(
            [0] * whole.tokens, in_whole_prompt(mm_features, whole)
        )
        token = whole.up_to(np.arange(len(input_tokens)))  # of the whole prompt, for each of ours
        for video in videos_of(mm_features):
            settings = settings_of(video, self._settings_class)
            order = token_order(self.layout.grid(video), settings)
            start = video.mm_position.offset
            tokens = slice(start, start + video.mm_position.length)
            if settings.dropped_share:
                token[tokens] = token[start]
            elif order is not None:
                token[tokens] = token[tokens][order]
        return positions[:, torch.from_numpy(token)], delta + whole.dropped
