"""The layout of Qwen2.5-VL: frames of any size, taken in pairs and cut into patches.

A video's tokens lie frame pair by frame pair and row by row.  A patch is 14 x 14 pixels of two
frames; 2 x 2 patches are merged into a token.  Positions are M-RoPE's, which the model gives itself
(models/qwen2_5_vl.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import ARCHITECTURES
from ..video.sampling import (
    FPS,
    MIN_FRAMES,
    PAIR,
    QWEN_FRAMES,
    Options,
    at_constant_rate,
    number_of_frames,
)
from .layout import Layout, LayoutError, Sampling, Video, denormalised


class Qwen2_5_VLLayout(Layout):
    """Qwen2.5-VL, all sizes."""

    model_type = "qwen2_5_vl"
    architecture = ARCHITECTURES[model_type]
    loader = "adaspark"
    takes_prune = True

    def refused(self, processor: Mapping[str, Any]) -> str | None:
        """Server-wide options that contradict the vision tower: every request would fail."""
        scopes = [processor, *(processor.get(name) for name in ("images_kwargs", "videos_kwargs"))]
        wrong = {
            key: value
            for scope in scopes
            if isinstance(scope, Mapping)
            for key, value in scope.items()
            if key in ("merge_size", "patch_size", "temporal_patch_size")
        }
        if not wrong:
            return None
        return (
            f"--mm-processor-kwargs {json.dumps(wrong)}: the model's weights fix these; leave them "
            "out"
        )

    def grid(self, feature: Any) -> tuple[int, int, int]:
        return self.merged(feature.data["video_grid_thw"].data.tolist())

    def merged(self, patches: Sequence[int]) -> tuple[int, int, int]:
        """The tokens of a grid of patches (t, h, w)."""
        merge = self.config.vision_config.spatial_merge_size
        t, h, w = patches
        return t, h // merge, w // merge

    def seconds(self, feature: Any) -> float | None:
        seconds = feature.data.get("second_per_grid_ts")
        return float(seconds.data) if seconds is not None and seconds.data is not None else None

    def pixels(self, feature: Any) -> Any | None:
        """Patches ``[t * h * w, 3 * frames * patch * patch]``."""
        pixels = feature.data.get("pixel_values_videos")
        return None if pixels is None else pixels.data

    def pictures(self, processor: Mapping[str, Any]) -> PatchShape:
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

        vision = self.config.vision_config
        return PatchShape(
            patch=vision.patch_size,
            frames=vision.temporal_patch_size,
            merge=vision.spatial_merge_size,
            mean=processor.get("image_mean", OPENAI_CLIP_MEAN),
            std=processor.get("image_std", OPENAI_CLIP_STD),
        )

    @classmethod
    def rules(cls, config: Mapping[str, Any], processor: Mapping[str, Any]) -> QwenFrames:
        vision, size = config["vision_config"], processor.get("size") or {}
        # What a file leaves out is the default of Hugging Face's class, not of Qwen's files.
        return QwenFrames(
            patch=vision.get("patch_size", 14),
            merge=vision.get("spatial_merge_size", 2),
            min_pixels=processor.get("min_pixels") or size.get("shortest_edge") or 128 * 28 * 28,
            max_pixels=processor.get("max_pixels") or size.get("longest_edge") or 768 * 28 * 28,
            cap_pixels_per_frame=bool(processor.get("cap_pixels_per_frame")),
            max_video_tokens=processor.get("max_video_tokens", QwenFrames.max_video_tokens),
        )


@dataclass(frozen=True)
class PatchShape:
    """How the processor cut and normalised frames."""

    patch: int  # side in pixels
    frames: int  # frames in a patch
    merge: int  # patches along a merged token's side
    mean: Sequence[float]
    std: Sequence[float]

    def size(self, grid: tuple[int, int, int]) -> tuple[int, int]:
        """(width, height) in pixels of a frame of a video with this grid of merged tokens."""
        side = self.patch * self.merge
        return grid[2] * side, grid[1] * side

    def frame(self, pixels: Any, grid: tuple[int, int, int], index: int) -> np.ndarray:
        """``[height, width, 3]`` uint8 RGB: the first frame of a pair."""
        _, h, w = grid
        patches = h * w * self.merge**2  # of a pair
        piece = pixels[index * patches : (index + 1) * patches]
        return unpatchify(piece, (1, h, w), self)[0]


def unpatchify(patches: Any, grid: tuple[int, int, int], shape: PatchShape) -> np.ndarray:
    """The first frame of each patch in time.

    NumPy throughout: a thread's first torch operation would start a team of threads of its own.

    Args:
        patches: torch tensor ``[t * h * w, 3 * frames * patch * patch]``: normalised floats, or
            uint8 where the vision tower normalises by itself.
        grid: (t, h, w) merged tokens.
        shape: how they were made.

    Returns:
        ``[t, height, width, 3]`` uint8, RGB.
    """
    t, h, w = grid
    merge, side = shape.merge, shape.patch
    patches = patches.cpu()
    values = (patches.float() if patches.is_floating_point() else patches).numpy()
    cut = values.reshape(t, h, w, merge, merge, 3, shape.frames, side, side)
    # [t, h, merge, patch, w, merge, patch, 3]
    first = cut[..., 0, :, :].transpose(0, 1, 3, 6, 2, 4, 7, 5)
    image = first.reshape(t, h * merge * side, w * merge * side, 3)
    return image if image.dtype == np.uint8 else denormalised(image, shape.mean, shape.std)


@dataclass(frozen=True)
class QwenFrames:
    """The rules of Hugging Face's Qwen2VLVideoProcessor; the defaults are Qwen's own files'.

    They are restated here so that no model, no vLLM and no GPU is needed to ask.
    """

    patch: int = 14  # pixels
    merge: int = 2  # patches along a merged token's side
    min_pixels: int = 4 * 28 * 28  # of a resized frame
    max_pixels: int = 16384 * 28 * 28
    cap_pixels_per_frame: bool = False  # bound the whole video too, as qwen-vl-utils does
    max_video_tokens: int = 128_000  # only for that bound

    least_frames = PAIR
    least_pixels = 4 * 28 * 28
    text_before = 15
    after_video = 0

    @property
    def side(self) -> int:
        """Pixels along a merged token's side."""
        return self.patch * self.merge

    def loader_options(self, sampling: Sampling) -> dict[str, Any]:
        most = QWEN_FRAMES if sampling.max_frames is None else sampling.max_frames
        fps = FPS if sampling.fps is None else sampling.fps
        return {"fps": fps, "max_frames": most, "min_frames": min(MIN_FRAMES, most)}

    def flags(self, sampling: Sampling) -> list[str]:
        defaults = self.loader_options(Sampling())
        options = self.loader_options(sampling)
        video = {name: value for name, value in options.items() if value != defaults[name]}
        flags = [f"--media-io-kwargs '{json.dumps({'video': video})}'"] if video else []
        if sampling.max_pixels is not None:
            pixels = json.dumps({"max_pixels": sampling.max_pixels})
            flags.append(f"--mm-processor-kwargs '{pixels}'")
        return flags

    def sampled(self, video: Video, sampling: Sampling) -> int:
        options = Options(**self.loader_options(sampling))
        number = number_of_frames(video.frames, video.fps, video.most_frames, options)
        if number < PAIR:
            raise LayoutError(
                f"the video has {video.frames} frame(s), and Qwen2.5-VL takes them in pairs; "
                "send a single frame as an image"
            )
        return number if video.most_frames else len(at_constant_rate(video.frames, number))

    def resized(self, video: Video, frames: int, sampling: Sampling) -> tuple[int, int]:
        """(height, width) of a frame after Hugging Face's ``smart_resize``."""
        height, width, side = video.height, video.width, self.side
        if max(height, width) > 200 * min(height, width):
            raise LayoutError(
                f"frames of {width}x{height} are too narrow: at most 200:1 can be used"
            )
        most = sampling.max_pixels or self.max_pixels
        if self.cap_pixels_per_frame:
            total = int(self.max_video_tokens * side**2 * 0.9)
            most = max(min(most, total * PAIR // frames), int(self.min_pixels * 1.05))
        high, wide = round(height / side) * side, round(width / side) * side
        if high * wide > most:
            shrink = math.sqrt(height * width / most)
            high = max(side, math.floor(height / shrink / side) * side)
            wide = max(side, math.floor(width / shrink / side) * side)
        elif high * wide < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            high = math.ceil(height * grow / side) * side
            wide = math.ceil(width * grow / side) * side
        return high, wide

    def grid(self, frames: int, size: tuple[int, int]) -> tuple[int, int, int]:
        return -(-frames // PAIR), size[0] // self.side, size[1] // self.side

    def pixel_bytes(self, frames: int, size: tuple[int, int]) -> int:
        return -(-frames // PAIR) * PAIR * size[0] * size[1] * 3 * 4  # float32

    def fitting(self, tokens: int, grid: tuple[int, int, int]) -> tuple[int | None, int | None]:
        frames, pixels = tokens // (grid[1] * grid[2]) * PAIR, tokens // grid[0] * self.side**2
        return (
            frames if frames >= self.least_frames else None,
            pixels if pixels >= self.least_pixels else None,
        )
