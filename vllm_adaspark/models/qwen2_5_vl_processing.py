"""Qwen2.5-VL's processor: the shared checks, and those of grids, positions and embeddings."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from hashlib import blake2s
from typing import Any

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import Qwen2VLMultiModalDataParser
from vllm.multimodal.parse import ImageProcessorItems, VideoProcessorItems
from vllm.multimodal.processing import PromptUpdate

from ..video.prune import kept_tokens
from .processing import OurInfo, OurProcessor
from .qwen2_5_vl_checks import Grid, check_embeddings, check_positions, check_sizes, position_limit

GRIDS = 100_000  # images and videos whose grid is remembered; vLLM's cache mostly holds fewer


class AdaSparkProcessingInfo(OurInfo, Qwen2_5_VLProcessingInfo):
    """Stock, but our request key is not passed on, and embeddings are checked."""

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


class AdaSparkProcessor(OurProcessor, Qwen2_5_VLMultiModalProcessor):
    """Refuses prompts whose time positions would run past the model's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._grids: OrderedDict[bytes, Grid] = OrderedDict()  # see _key; the latest used last

    def _get_prompt_updates(
        self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs
    ) -> Sequence[PromptUpdate]:
        """As stock, but a video has as many placeholder tokens as the language model will see."""
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        share = self._settings(hf_processor_mm_kwargs).dropped_share
        if not share:
            return updates

        def kept(stock: Callable[[int], list[int]], index: int) -> list[int]:
            patches = out_mm_kwargs["video"][index]["video_grid_thw"].data.tolist()
            return stock(index)[: kept_tokens(self._layout.merged(patches), share)]

        return [
            replace(update, replacement=partial(kept, update.replacement))
            if update.modality == "video"
            else update
            for update in updates
        ]

    def _apply_hf_processor_main(self, mm_items, hf_kwargs):
        """As stock, unless the request's sizes make too much of its images or videos."""
        vision = self.info.get_hf_config().vision_config
        merged = (vision.patch_size * vision.spatial_merge_size) ** 2
        most = self.info.ctx.model_config.max_model_len
        for kind, scope in (("image", "images_kwargs"), ("video", "videos_kwargs")):
            named = {**hf_kwargs, **(hf_kwargs.get(scope) or {})}
            check_sizes(_sizes(mm_items, kind), named, merged, most)
        return super()._apply_hf_processor_main(mm_items, hf_kwargs)

    def _check_prompt(self, processed: Any) -> None:
        kinds = processed["mm_placeholders"]
        media = [one for kind in kinds for one in self._media(processed, kind)]
        tokens = len(processed["prompt_token_ids"])
        limit = position_limit(self.info.get_hf_config().get_text_config())
        check_positions(tokens, media, self.info.ctx.model_config.max_model_len, limit)

    def _dropped(self, processed: Any) -> int:
        videos = self._media(processed, "video")
        return sum(grid.frames * grid.rows * grid.columns - length for length, grid in videos)

    def _media(self, processed: Any, modality: str) -> list[tuple[int, Grid]]:
        """(tokens in the prompt, whole grid) of each image or each video."""
        return [
            (place.length, self._grid(item, modality, mm_hash))
            for place, item, mm_hash in zip(
                processed["mm_placeholders"].get(modality, ()),
                processed["mm_kwargs"].get(modality, ()),
                processed["mm_hashes"].get(modality, ()),
                strict=True,
            )
        ]

    def _grid(self, item: Any, modality: str, mm_hash: str) -> Grid:
        key = _key(mm_hash)
        if key not in self._grids:
            if item is None:  # in vLLM's cache, and forgotten here
                raise ValueError(
                    f"this {modality} is known, but its size is not any more: send it again under "
                    "another uuid, or with another setting"
                )
            self._note_item(item, modality, mm_hash)
        self._grids.move_to_end(key)
        return self._grids[key]

    def _note_item(self, item: Any, modality: str, mm_hash: str) -> None:
        vision = self.info.get_hf_config().vision_config
        merge = vision.spatial_merge_size
        t, h, w = item[f"{modality}_grid_thw"].data.tolist()
        seconds = item.get("second_per_grid_ts") if modality == "video" else None
        apart = 1.0 if seconds is None else float(seconds.data)
        if not math.isfinite(apart) or apart < 0:
            raise ValueError(f"the frames of a video are {apart} s apart; check its frame rate")
        per_frame = apart * getattr(vision, "tokens_per_second", 1.0)
        self._grids[_key(mm_hash)] = Grid(t, h // merge, w // merge, per_frame)
        if len(self._grids) > GRIDS:
            self._grids.popitem(last=False)


def _sizes(mm_items: Any, kind: str) -> Iterator[tuple[int, int]]:
    """(frames, pixels of a frame) of each image or each video that came as pixels."""
    for items in (mm_items[kind],) if kind in mm_items else ():
        for nth in range(len(items)):
            if isinstance(items, ImageProcessorItems):
                size = items.get_image_size(nth)
                yield 2, size.width * size.height  # an image counts as a pair of frames
            elif isinstance(items, VideoProcessorItems):
                video = items.get(nth)
                frames = video[0] if isinstance(video, tuple) else video  # else with metadata
                first = frames[0]
                shape = getattr(first, "shape", None)  # channels first or last; none has a picture
                yield len(frames), math.prod(shape) // 3 if shape else math.prod(first.size)


def _key(mm_hash: str) -> bytes:
    """A short key: hashes carry settings, and clients may name their media themselves."""
    return blake2s(mm_hash.encode(errors="backslashreplace"), digest_size=16).digest()
