"""The layout of LLaVA-OneVision: frames of one size, each by itself, and one token after the last.

Every frame is resized to the vision tower's square (384 pixels, 27 x 27 patches) and pooled to
14 x 14 tokens.  A video's tokens lie frame by frame and row by row; after them comes one *newline*
token, a learned embedding that belongs to no frame.  It is no video here: it is attended and
computed like text.  Positions are those of the tokens in the prompt, one number each; in cube order
a token keeps the position that it has in raster order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import ARCHITECTURES
from ..settings import Settings
from ..video.sampling import EVEN_FRAMES, Evenly
from .layout import Layout, LayoutError, Sampling, Video, denormalised, token_order

POOL = 2  # patches along a token's side, the last one cut off if their number is odd


def tokens_along(image_size: int, patch: int) -> int:
    """Tokens along a frame's side."""
    return math.ceil(image_size // patch / POOL)


class LlavaOnevisionLayout(Layout):
    """LLaVA-OneVision whose language model is Qwen2."""

    model_type = "llava_onevision"
    architecture = ARCHITECTURES[model_type]
    loader = "adaspark_uniform"
    after_video = 1  # the newline

    def refused(self, processor: Mapping[str, Any]) -> str | None:
        text = self.config.get_text_config().model_type
        if text != "qwen2":
            return f"text_config.model_type {text!r} in the model's config; it must be 'qwen2'"
        if processor:
            return (
                f"--mm-processor-kwargs {json.dumps(dict(processor))}: the model's weights fix how "
                "frames are made; leave it out"
            )
        return None

    @property
    def side(self) -> int:
        """Tokens along a frame's side."""
        vision = self.config.vision_config
        return tokens_along(vision.image_size, vision.patch_size)

    def grid(self, feature: Any) -> tuple[int, int, int]:
        tokens = feature.mm_position.length - self.after_video
        return tokens // self.side**2, self.side, self.side

    def positions(
        self, tokens: int, videos: Iterable[Any], settings: Settings
    ) -> np.ndarray | None:
        positions, moved = np.arange(tokens), False
        for video in videos:
            order = token_order(self.grid(video), settings)
            if order is not None:
                start = video.mm_position.offset
                positions[start : start + len(order)] = start + order
                moved = True
        return positions if moved else None

    def pixels(self, feature: Any) -> Any | None:
        """Normalised frames ``[frames, 3, height, width]``."""
        if feature.data is None:  # the prefix cache holds the whole video
            return None
        pixels = feature.data.get("pixel_values_videos")
        return None if pixels is None else pixels.data

    def pictures(self, processor: Mapping[str, Any]) -> WholeFrames:
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        return WholeFrames(
            side=self.config.vision_config.image_size,
            mean=processor.get("image_mean", OPENAI_CLIP_MEAN),
            std=processor.get("image_std", OPENAI_CLIP_STD),
        )

    @classmethod
    def rules(cls, config: Mapping[str, Any], processor: Mapping[str, Any]) -> LlavaFrames:
        vision = config["vision_config"]
        return LlavaFrames(
            image_size=vision.get("image_size", LlavaFrames.image_size),
            patch=vision.get("patch_size", LlavaFrames.patch),
        )


@dataclass(frozen=True)
class WholeFrames:
    """How the processor resized and normalised frames."""

    side: int  # of a frame, in pixels
    mean: Sequence[float]
    std: Sequence[float]

    def size(self, grid: tuple[int, int, int]) -> tuple[int, int]:
        """(width, height) in pixels of a frame."""
        return self.side, self.side

    def frame(self, pixels: Any, grid: tuple[int, int, int], index: int) -> np.ndarray:
        """``[height, width, 3]`` uint8 RGB."""
        image = pixels[index].cpu().float().numpy().transpose(1, 2, 0)
        return denormalised(image, self.mean, self.std)


@dataclass(frozen=True)
class LlavaFrames:
    """What vLLM's loader and Hugging Face's LlavaOnevisionVideoProcessor make of a video."""

    image_size: int = 384  # pixels
    patch: int = 14

    least_frames = 1
    least_pixels = None
    text_before = 6
    after_video = LlavaOnevisionLayout.after_video

    def loader_options(self, sampling: Sampling) -> dict[str, Any]:
        most = EVEN_FRAMES if sampling.max_frames is None else sampling.max_frames
        return {"num_frames": most} | ({} if sampling.fps is None else {"fps": sampling.fps})

    def flags(self, sampling: Sampling) -> list[str]:
        named = self.loader_options(sampling)
        if named["num_frames"] == EVEN_FRAMES:
            del named["num_frames"]
        return [f"--media-io-kwargs '{json.dumps({'video': named})}'"] if named else []

    def sampled(self, video: Video, sampling: Sampling) -> int:
        if video.frames < 1:
            raise LayoutError("the video has no frame")
        return Evenly(**self.loader_options(sampling)).number(video.frames, video.seconds)

    def resized(self, video: Video, frames: int, sampling: Sampling) -> tuple[int, int]:
        return self.image_size, self.image_size

    def grid(self, frames: int, size: tuple[int, int]) -> tuple[int, int, int]:
        side = tokens_along(self.image_size, self.patch)
        return frames, side, side

    def pixel_bytes(self, frames: int, size: tuple[int, int]) -> int:
        return frames * size[0] * size[1] * 3 * 4  # float32

    def fitting(self, tokens: int, grid: tuple[int, int, int]) -> tuple[int | None, int | None]:
        frames = tokens // (grid[1] * grid[2])
        return (frames if frames >= self.least_frames else None), None
