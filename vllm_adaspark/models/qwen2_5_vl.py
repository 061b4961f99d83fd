"""Qwen2.5-VL with AdaSpark: cube order, bounded-memory video encoding, sparse layers.

Chosen by ``--hf-overrides '{"architectures": ["AdaSparkQwen2_5_VLForConditionalGeneration"]}'``;
stock weights of every size load unchanged.  Three things happen to a video on its way:

* the processor validates the request's settings and attaches them to each video;
* after the vision tower the video's embeddings are put into cube order;
* its M-RoPE positions, which are the stock model's, are put into the same order.

At the top of ``forward`` the step is planned, from what the worker knows of its requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
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
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from .. import LANGUAGE_MODEL
from ..methods import base as methods
from ..paged.depth_metadata import give_depths
from ..requests import FIELD, settings_of, unpack_settings, videos_of
from ..settings import Settings
from ..step import Runtime
from ..video.order import cube_order
from .processing import AdaSparkProcessingInfo, AdaSparkProcessor


@MULTIMODAL_REGISTRY.register_processor(
    AdaSparkProcessor,
    info=AdaSparkProcessingInfo,
    dummy_inputs=Qwen2_5_VLDummyInputsBuilder,
)
class AdaSparkQwen2_5_VL(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL, all sizes, with AdaSpark."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        # As the stock constructor, which names its language model's architecture itself.
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        multimodal_config = vllm_config.model_config.get_multimodal_config()
        self.use_data_parallel = multimodal_config.mm_encoder_tp_mode == "data"
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

        self.runtime = Runtime(methods.of_model(config, current_platform.device_type))
        self._settings_class = self.runtime.method.settings_class
        self.language_model.share(self.runtime)

    # -- from video to embeddings ---------------------------------------------------------------

    def _parse_and_validate_video_input(self, **kwargs: object):
        parsed = super()._parse_and_validate_video_input(**kwargs)
        # Rides along with the parsed input: the schema takes no field of ours.
        self._video_settings = kwargs.get(FIELD)
        return parsed

    def _process_video_input(self, video_input) -> tuple[torch.Tensor, ...]:
        """Each video's embeddings ``[tokens, hidden]``, in cube order."""
        if video_input["type"] == "video_embeds":
            videos = super()._process_video_input(video_input)
        else:
            videos = self._encode_in_pieces(
                video_input["pixel_values_videos"], video_input["video_grid_thw"].tolist()
            )
        merge = self.visual.spatial_merge_size
        ordered = []
        for video, grid, packed in zip(
            videos, video_input["video_grid_thw"].tolist(), self._video_settings, strict=True
        ):
            walk = _walk(grid, unpack_settings(packed, self._settings_class), merge)
            ordered.append(video if walk is None else video[walk.to(video.device)])
        return tuple(ordered)

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

    # -- weights ----------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As stock, but a method's own weights must be in the checkpoint."""
        loaded = super().load_weights(weights)
        missing = [
            f"{attention}.{name}"
            for attention, module in self.language_model.method_modules()
            for name, _ in module.named_parameters()
            if f"language_model.{attention}.{name}" not in loaded
        ]
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} weights of the method, among them "
                f"{', '.join(missing[:4])}: it was not trained for it; serve one that was"
            )
        return loaded

    # -- positions and the step's plan -----------------------------------------------------------

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """Stock positions ``[3, tokens]``, those of each video in the order of its tokens."""
        positions, delta = super().get_mrope_input_positions(input_tokens, mm_features)
        merge = self.config.vision_config.spatial_merge_size
        for video in videos_of(mm_features):
            settings = settings_of(video, self._settings_class)
            walk = _walk(video.data["video_grid_thw"].data.tolist(), settings, merge)
            if walk is not None:
                start = video.mm_position.offset
                tokens = slice(start, start + video.mm_position.length)
                positions[:, tokens] = positions[:, tokens][:, walk]
        return positions, delta

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        """As stock, once the step is planned."""
        self._begin_step(positions)
        hidden = super().forward(
            input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
        )
        return self.runtime.restore(hidden, positions.shape[-1])

    def _begin_step(self, positions: torch.Tensor) -> None:
        context = get_forward_context()
        metadata = context.attn_metadata
        rows = next(iter(metadata.values())).adaspark_rows if metadata else None  # None: profiling
        self.runtime.begin_step(rows, positions.device)
        plan = self.runtime.plan
        if plan is not None and plan.depths is not None:
            plan.depths.begin(positions)
            give_depths(context, plan.depths)

    @classmethod
    def get_model_state_cls(cls) -> type:
        """Model runner V2 asks for this; runner V1 does not."""
        from .model_state import AdaSparkModelState

        return AdaSparkModelState


def _walk(grid: list[int], config: Settings, merge: int) -> torch.Tensor | None:
    """Cube order of a video with patch grid ``[t, h, w]``; None for raster order."""
    if config.order == "raster":
        return None
    t, h, w = grid
    walk = cube_order((t, h // merge, w // merge), config.cube, config.order)
    return torch.from_numpy(walk.copy())
