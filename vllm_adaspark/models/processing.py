"""A request's ``adaspark`` settings: validated and attached to its videos, before the model runs.

This runs where vLLM preprocesses requests: in the API server's process, or offline in the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import BatchFeature
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalFieldConfig
from vllm.platforms import current_platform

from ..accounting import ModelShape
from ..budget import PromptCost, prompt_cost
from ..config import COMPENSATIONS, ORDERS, SHARE_STEPS, AdaSparkConfig, AdaSparkConfigError
from ..kernels import score_products
from ..tags import MAX_POSITION, tag_word, unpack

REQUEST_KEY = "adaspark"  # in mm_processor_kwargs
FIELD = "adaspark_video"  # per video, to the model: the seven integers of VideoSettings


class VideoSettings(NamedTuple):
    """What the model and the worker must know about a video."""

    word: int  # see tags.py
    t: int  # the cube's shape
    h: int
    w: int
    order: int  # index into config.ORDERS
    trace: int  # 1: record what is chosen
    flops: int  # budget in thousandths of the dense FLOPs, 0 for none

    @classmethod
    def of(cls, config: AdaSparkConfig) -> VideoSettings:
        budget = round((config.flops or 0) * SHARE_STEPS) if config.enabled else 0
        order = ORDERS.index(config.order)
        return cls(tag_word(config), *config.cube, order, int(config.trace), budget)

    @classmethod
    def from_feature(cls, feature: MultiModalFeatureSpec) -> VideoSettings:
        """Those the processor attached to a video."""
        return cls(*feature.data[FIELD].data.tolist())


def resolved_config(hf_config: Any) -> AdaSparkConfig:
    """Server and checkpoint settings, as startup.StartupCheck left them on the model's config."""
    return AdaSparkConfig().override(getattr(hf_config, "adaspark_resolved", None))


def language_model_shape(text_config: Any) -> ModelShape:
    """Sizes of a layer, from a checkpoint's text config, on this platform."""
    heads = text_config.num_attention_heads
    head_size = text_config.hidden_size // heads
    return ModelShape(
        hidden=text_config.hidden_size,
        heads=heads,
        kv_heads=text_config.num_key_value_heads,
        head_size=head_size,
        intermediate=text_config.intermediate_size,
        score_products=score_products(current_platform.device_type, head_size),
    )


def budget_cost(
    hf_config: Any,
    config: AdaSparkConfig,
    word: int,
    tokens: int,
    places: list[tuple[int, int]],
) -> PromptCost:
    """What a prompt of so many tokens costs, its videos at ``places`` (offset, length)."""
    text = hf_config.get_text_config()
    settings = unpack(torch.tensor(word))
    return prompt_cost(
        language_model_shape(text),
        text.num_hidden_layers,
        tokens,
        places,
        block_size=config.cube_volume,
        dense_below=config.dense_below,
        dense_layers=int(settings.dense_layers),
        sparse_text=bool(settings.sparse_text),
        compensation=COMPENSATIONS[settings.compensation],
        cube_queries=config.cube_queries,
    )


class AdaSparkProcessingInfo(Qwen2_5_VLProcessingInfo):
    """Stock, but our request key is not passed on to Hugging Face's processor."""

    def get_hf_processor(self, **kwargs: object):
        return super().get_hf_processor(**_without_ours(kwargs))

    def get_image_processor(self, **kwargs: object):
        return super().get_image_processor(**_without_ours(kwargs))


class AdaSparkProcessor(Qwen2_5_VLMultiModalProcessor):
    """Validates a request's ``adaspark`` settings and attaches them to its videos.

    The settings stay part of ``mm_processor_kwargs``, which enter the multimodal hash: requests
    with different settings never share cached video blocks.
    """

    def apply(self, inputs, timing_ctx):
        # Errors raised here are HTTP 400.
        config = self._settings(inputs.hf_processor_mm_kwargs)
        processed = super().apply(inputs, timing_ctx)
        named = inputs.hf_processor_mm_kwargs.get(REQUEST_KEY)
        if config.enabled and isinstance(named, Mapping) and named.get("flops") is not None:
            self._check_budget(config, processed)
        return processed

    def _check_budget(self, config: AdaSparkConfig, processed: Any) -> None:
        """Refuse a budget that the request itself asks for and that cannot be met."""
        places = [(at.offset, at.length) for at in processed["mm_placeholders"].get("video", [])]
        if not places:
            return
        tokens = len(processed["prompt_token_ids"])
        hf_config = self.info.get_hf_config()
        cost = budget_cost(hf_config, config, tag_word(config), tokens, places)
        if config.flops < cost.least:
            raise AdaSparkConfigError(
                f"mm_processor_kwargs.{REQUEST_KEY}: flops={config.flops} cannot be met: of this "
                f"request's {tokens} tokens, what always runs (projections, text) takes more; "
                f"the smallest budget that can is {math.ceil(cost.least * 100) / 100}"
            )

    def _settings(self, mm_kwargs: Mapping[str, object]) -> AdaSparkConfig:
        server = resolved_config(self.info.get_hf_config())
        return server.override(
            mm_kwargs.get(REQUEST_KEY), source=f"mm_processor_kwargs.{REQUEST_KEY}", request=True
        )

    def _call_hf_processor(self, hf_data, hf_kwargs) -> BatchFeature:
        return super()._call_hf_processor(hf_data, _without_ours(hf_kwargs))

    def _postprocess_hf_mm_data(self, mm_inputs, hf_processor_mm_kwargs, processed_data):
        data = super()._postprocess_hf_mm_data(mm_inputs, hf_processor_mm_kwargs, processed_data)
        grids = data.get("video_grid_thw")
        if grids is not None and len(grids):
            self._check_duration(grids, data.get("second_per_grid_ts"))
            packed = VideoSettings.of(self._settings(hf_processor_mm_kwargs))
            data[FIELD] = torch.tensor([packed] * len(grids), dtype=torch.int64)
        return data

    def _check_duration(self, grids: torch.Tensor, seconds: Any) -> None:
        """Refuse a video whose time positions would not fit beside the tags."""
        per_second = getattr(self.info.get_hf_config().vision_config, "tokens_per_second", 1.0)
        for index, (frames, *_) in enumerate(torch.as_tensor(grids).tolist()):
            step = float(seconds[index]) if seconds is not None else 1.0
            if frames * step * per_second > MAX_POSITION // 2:
                raise ValueError(
                    f"video {index} spans {frames * step:.0f} s, more than the "
                    f"{MAX_POSITION // 2 / per_second:.0f} s whose time positions fit; "
                    "check its frame rate, or send a shorter part of it"
                )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        fields[FIELD] = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
        return fields


def _without_ours(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in kwargs.items() if key != REQUEST_KEY}
