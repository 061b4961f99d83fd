"""What a model tells of itself, so that nothing outside its own files knows how it looks.

A model's *layout* answers three kinds of questions.

* **About a prompt:** which of its tokens are video, in what grid a video's tokens lie, and in which
  order and at which positions the language model gets them.  The processor, the worker, the model
  and the traces ask.
* **About pictures:** how a frame is made back from the pixels that the vision tower got, for the
  viewer.
* **Before anything runs:** which frames are taken of a video, and how many tokens they become.
  ``vllm-adaspark inspect`` and ``ask`` ask this of a checkpoint's files (:class:`FrameRules`).

Each model has one layout, in a file of its own.  Layouts need no vLLM: of its objects they
read the fields of a ``MultiModalFeatureSpec``, which is one image or video of a request.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, Protocol

import numpy as np

from ..requests import videos_of
from ..settings import Settings
from ..video.order import cube_order
from ..video.prune import VideoSpan, WholePrompt

# By ``model_type`` of a checkpoint's config.json.
LAYOUTS = {
    "qwen2_5_vl": "vllm_adaspark.models.qwen2_5_vl_layout:Qwen2_5_VLLayout",
    "llava_onevision": "vllm_adaspark.models.llava_onevision_layout:LlavaOnevisionLayout",
}


class Pictures(Protocol):
    """Makes a video's frames back from the pixels that its vision tower got."""

    def size(self, grid: tuple[int, int, int]) -> tuple[int, int]:
        """(width, height) in pixels of a frame of a video with this grid of merged tokens."""

    def frame(self, pixels: Any, grid: tuple[int, int, int], index: int) -> np.ndarray:
        """``[height, width, 3]`` uint8 RGB: what the model saw at a place in time of the grid."""


def token_order(grid: tuple[int, int, int], settings: Settings) -> np.ndarray | None:
    """In which order the language model gets the video tokens of a ``grid``.

    Returns:
        ``[T * H * W]`` int64: the raster token at each place; None where they stay in raster order.
    """
    if settings.order == "raster":
        return None
    return cube_order(grid, settings.cube, settings.order).copy()  # the cached one is read-only


def denormalised(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 of the normalised floats ``[..., 3]`` that a processor makes of RGB."""
    image = image * np.array(std, np.float32) + np.array(mean, np.float32)
    return (image * 255).round().clip(0, 255).astype(np.uint8)


class Layout(ABC):
    """How a model's videos look.

    Attributes:
        model_type: of its checkpoints' config.json.
        architecture: our name for the model.
        loader: name of the video loader that takes its frames, see video/load.py.
        after_video: how many tokens at the end of a video's place in the prompt are no video.
        takes_prune: whether tokens of its videos can be dropped (models/pruned.py).

    Args:
        hf_config: Hugging Face's configuration of the checkpoint.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    loader: ClassVar[str]
    after_video: ClassVar[int] = 0
    takes_prune: ClassVar[bool] = False

    def __init__(self, hf_config: Any) -> None:
        self.config = hf_config

    def refused(self, processor: Mapping[str, Any]) -> str | None:
        """Why the checkpoint or ``--mm-processor-kwargs`` cannot be served; None if they can."""
        return None

    # -- about a prompt ---------------------------------------------------------------------------

    @abstractmethod
    def grid(self, feature: Any) -> tuple[int, int, int]:
        """A video's tokens in time, height and width.

        Args:
            feature: vLLM's ``MultiModalFeatureSpec`` of the video.
        """

    def seconds(self, feature: Any) -> float | None:
        """Between two places in time of a video's grid; None where the model is not told."""
        return None

    def span(self, place: Any, grid: tuple[int, int, int]) -> VideoSpan:
        """Where a video lies, from vLLM's ``PlaceholderRange`` and its grid."""
        return VideoSpan(place.offset, place.length - self.after_video, math.prod(grid))

    def whole_prompt(self, tokens: int, features: Iterable[Any]) -> WholePrompt:
        """The prompt that a prompt stands for of whose videos tokens may have been dropped.

        Args:
            tokens: of the prompt.
            features: vLLM's ``MultiModalFeatureSpec`` of its images and videos.
        """
        videos = sorted(videos_of(features), key=lambda video: video.mm_position.offset)
        return WholePrompt(tokens, [self.span(v.mm_position, self.grid(v)) for v in videos])

    def positions(
        self, tokens: int, videos: Iterable[Any], settings: Settings
    ) -> np.ndarray | None:
        """``[tokens]`` int64 positions of a prompt whose videos are put into another order.

        None where they are the stock model's, or where the model says so itself, as one with M-RoPE
        does.

        Args:
            tokens: of the prompt.
            videos: vLLM's ``MultiModalFeatureSpec`` of each video.
            settings: of the request.
        """
        return None

    # -- about pictures ---------------------------------------------------------------------------

    @abstractmethod
    def pixels(self, feature: Any) -> Any | None:
        """What the vision tower gets of a video; None if it came as embeddings or from a cache."""

    @abstractmethod
    def pictures(self, processor: Mapping[str, Any]) -> Pictures:
        """Makes frames back; ``processor`` is the image processor's configuration."""

    # -- before anything runs ---------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def rules(cls, config: Mapping[str, Any], processor: Mapping[str, Any]) -> FrameRules:
        """How frames become tokens, from a checkpoint's config.json and its processor's file."""


class LayoutError(ValueError):
    """A model or video that cannot be used; says what is wrong and what to do."""


@cache
def layout_class(model_type: str) -> type[Layout]:
    """The layout of a ``model_type``.

    Raises:
        LayoutError: there is none.
    """
    path = LAYOUTS.get(model_type)
    if path is None:
        raise LayoutError(
            f"model_type {model_type!r}: not a model of ours; supported: {', '.join(LAYOUTS)}"
        )
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def layout_of(hf_config: Any) -> Layout:
    """The layout of a checkpoint, from Hugging Face's configuration.

    Raises:
        LayoutError: it is none of ours.
    """
    return layout_class(hf_config.model_type)(hf_config)


# -- before anything runs -------------------------------------------------------------------------


@dataclass(frozen=True)
class Video:
    """A video before anything is done to it."""

    frames: int
    fps: float
    width: int
    height: int
    # Where its rate varies, frames it would have if all came as fast as its fastest part.
    most_frames: int | None = None
    remarks: tuple[str, ...] = ()  # what its owner should be told of the file

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


@dataclass(frozen=True)
class Sampling:
    """Which frames are taken and how large they may be; None is the model's own default."""

    fps: float | None = None
    max_frames: int | None = None
    max_pixels: int | None = None  # of a frame, after resizing


class FrameRules(Protocol):
    """How a checkpoint's loader and processor turn a video into tokens.

    Attributes:
        least_frames: the fewest that can be asked for.
        least_pixels: the smallest ``max_pixels`` that can be asked for; None where all frames get
            the same size.
        text_before: tokens of the chat template before a video.
        after_video: as in :class:`Layout`.
    """

    least_frames: int
    least_pixels: int | None
    text_before: int
    after_video: int

    def loader_options(self, sampling: Sampling) -> dict[str, Any]:
        """``media_io_kwargs.video`` that makes a server's loader take these frames."""

    def flags(self, sampling: Sampling) -> list[str]:
        """Options of ``vllm serve`` that say what of ``sampling`` is not the model's default."""

    def sampled(self, video: Video, sampling: Sampling) -> int:
        """Frames that the loader takes.

        Raises:
            LayoutError: none can be taken.
        """

    def resized(self, video: Video, frames: int, sampling: Sampling) -> tuple[int, int]:
        """(height, width) in pixels of a frame as the vision tower gets it.

        Raises:
            LayoutError: it cannot be resized.
        """

    def grid(self, frames: int, size: tuple[int, int]) -> tuple[int, int, int]:
        """Video tokens in time, height and width."""

    def pixel_bytes(self, frames: int, size: tuple[int, int]) -> int:
        """Bytes of what the processor makes of the frames."""

    def fitting(self, tokens: int, grid: tuple[int, int, int]) -> tuple[int | None, int | None]:
        """(``max_frames``, ``max_pixels``) with which such a video has at most ``tokens`` tokens.

        None where there is no such value.
        """
