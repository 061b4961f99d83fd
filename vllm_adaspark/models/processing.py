"""A request's settings and media: validated and attached to its videos, before the model runs.

This runs where vLLM preprocesses requests: in the API server's process, or offline in the caller's.
Errors raised here are HTTP 400.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from transformers import BatchFeature
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import Qwen2VLMultiModalDataParser
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.platforms import current_platform

from ..methods import base as methods
from ..requests import FIELDS, Prompt, pack_settings
from ..settings import SERVER_KEY, Settings
from .checks import Grid, check_embeddings, check_positions, check_processor_kwargs, position_limit
from .sent_items import sent_items

REQUEST_KEY = SERVER_KEY  # in mm_processor_kwargs
LONGEST_CAUSE = 300  # characters of a message of Hugging Face's
GRIDS = 100_000  # images and videos whose grid is remembered; vLLM's cache holds fewer


class AdaSparkProcessingInfo(Qwen2_5_VLProcessingInfo):
    """Stock, but our request key is not passed on to Hugging Face's processor."""

    def get_hf_processor(self, **kwargs: object):
        return super().get_hf_processor(**_without_ours(kwargs))

    def get_image_processor(self, **kwargs: object):
        return super().get_image_processor(**_without_ours(kwargs))

    def get_data_parser(self):
        config = self.get_hf_config()
        return CheckingDataParser(
            config.vision_config.spatial_merge_size,
            config.get_text_config().hidden_size,
            video_needs_metadata=True,
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )


class CheckingDataParser(Qwen2VLMultiModalDataParser):
    """Stock, but embeddings sent in place of images or videos must fit their grid."""

    def __init__(self, spatial_merge_size: int, hidden: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(spatial_merge_size, *args, **kwargs)
        self._hidden = hidden

    def _parse_image_data(self, data: Any):
        self._check(data, "image")
        return super()._parse_image_data(data)

    def _parse_video_data(self, data: Any):
        self._check(data, "video")
        return super()._parse_video_data(data)

    def _check(self, data: Any, modality: str) -> None:
        if isinstance(data, dict):
            check_embeddings(data, modality, self._spatial_merge_size, self._hidden)
        elif data is not None and self.is_embeddings(data):
            check_embeddings({f"{modality}_embeds": data}, modality, self._spatial_merge_size, 0)


class AdaSparkProcessor(Qwen2_5_VLMultiModalProcessor):
    """Validates a request's ``adaspark`` settings and attaches them to its videos (and images).

    The settings stay part of ``mm_processor_kwargs``, which enter the multimodal hash: requests
    with different settings never share cached video blocks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._method = methods.of_model(self.info.get_hf_config(), current_platform.device_type)
        self._grids: OrderedDict[str, Grid] = OrderedDict()  # by hash: cached items have no data

    def apply(self, inputs, timing_ctx):
        kwargs = inputs.hf_processor_mm_kwargs
        check_processor_kwargs(kwargs, REQUEST_KEY)
        config = self._settings(kwargs)
        with sent_items.preparing() as prepared:
            processed = super().apply(inputs, timing_ctx)
            self._check_prompt(processed)
            tokens = len(processed["prompt_token_ids"])
            prompt = Prompt(tokens, processed["mm_placeholders"])
            self._method.refuse(config, kwargs.get(REQUEST_KEY), prompt)
            prepared.ok = not self._will_be_refused(processed)
        return processed

    def _settings(self, mm_kwargs: Mapping[str, object]) -> Settings:
        return self._method.settings.override(
            mm_kwargs.get(REQUEST_KEY), source=f"mm_processor_kwargs.{REQUEST_KEY}", request=True
        )

    # -- checks of the whole prompt -----------------------------------------------------------

    def _will_be_refused(self, processed: Any) -> bool:
        """Whether vLLM will find the prompt too long, which it looks at later."""
        return len(processed["prompt_token_ids"]) >= self.info.ctx.model_config.max_model_len

    def _check_prompt(self, processed: Any) -> None:
        """Refuse a prompt whose time positions would run past the model's."""
        media = [
            (place.length, self._grid(item, modality, mm_hash))
            for modality, places in processed["mm_placeholders"].items()
            for place, item, mm_hash in zip(
                places,
                processed["mm_kwargs"][modality],
                processed["mm_hashes"][modality],
                strict=True,
            )
        ]
        tokens = len(processed["prompt_token_ids"])
        limit = position_limit(self.info.get_hf_config().get_text_config())
        check_positions(tokens, media, self.info.ctx.model_config.max_model_len, limit)

    # -- grids: what the checks need to know of an image or video ---------------------------------

    def _grid(self, item: Any, modality: str, mm_hash: str) -> Grid:
        grid = self._grids.get(mm_hash)
        return self._note_grid(item, modality, mm_hash) if grid is None else grid

    def _note_grid(self, item: Any, modality: str, mm_hash: str) -> Grid:
        vision = self.info.get_hf_config().vision_config
        merge = vision.spatial_merge_size
        t, h, w = item[f"{modality}_grid_thw"].data.tolist()
        seconds = item.get("second_per_grid_ts") if modality == "video" else None
        apart = 1.0 if seconds is None else float(seconds.data)
        if not math.isfinite(apart) or apart < 0:
            raise ValueError(f"the frames of a video are {apart} s apart; check its frame rate")
        per_frame = apart * getattr(vision, "tokens_per_second", 1.0)
        grid = self._grids[mm_hash] = Grid(t, h // merge, w // merge, per_frame)
        if len(self._grids) > GRIDS:
            self._grids.popitem(last=False)
        return grid

    # -- from processed media to what the engine gets ---------------------------------------------

    def _merge_mm_kwargs(
        self, cache, mm_hashes, mm_is_cached, mm_missing_kwargs, mm_missing_prompt_updates
    ):
        """As stock: puts new items into the cache, and from here on may leave out their data."""
        for modality, hashes in mm_hashes.items():
            new = iter(mm_missing_kwargs.get(modality, []))
            for mm_hash, is_cached in zip(hashes, mm_is_cached[modality], strict=True):
                if not is_cached:
                    self._note_grid(next(new), modality, mm_hash)
                    sent_items.add(cache, mm_hash)
        return super()._merge_mm_kwargs(
            cache, mm_hashes, mm_is_cached, mm_missing_kwargs, mm_missing_prompt_updates
        )

    def _call_hf_processor(self, hf_data, hf_kwargs) -> BatchFeature:
        try:
            return super()._call_hf_processor(hf_data, _without_ours(hf_kwargs))
        except ValueError as error:  # vLLM's, with all pixels of the request in its message
            cause = str(error.__cause__ or error)[:LONGEST_CAUSE]
            raise ValueError(f"these images or videos cannot be processed: {cause}") from error

    def _postprocess_hf_mm_data(self, mm_inputs, hf_processor_mm_kwargs, processed_data):
        data = super()._postprocess_hf_mm_data(mm_inputs, hf_processor_mm_kwargs, processed_data)
        packed = pack_settings(self._settings(hf_processor_mm_kwargs))
        for kind in self._method.media:
            grids = data.get(f"{kind}_grid_thw")
            if grids is not None and len(grids):
                data[FIELDS[kind]] = packed.expand(len(grids), -1)
        return data

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        for kind in self._method.media:
            fields[FIELDS[kind]] = MultiModalFieldConfig.batched(kind, keep_on_cpu=True)
        return fields


def _without_ours(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in kwargs.items() if key != REQUEST_KEY}
