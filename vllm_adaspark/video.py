"""Reading a request's video: vLLM's loader for Qwen2-VL, with OpenCV or decord, and clear errors.

Two loaders, which choose the same frames:

* ``adaspark`` decodes with OpenCV; startup.StartupCheck makes it our architecture's default.
* ``adaspark_decord`` decodes with decord, where that is installed; chosen with
  ``--media-io-kwargs '{"video": {"video_backend": "adaspark_decord"}}'``, or by a request.

How many frames is set by ``fps``, ``max_frames`` and ``min_frames`` in ``media_io_kwargs.video``,
of the server or of a request.  vLLM 0.32 computes with them unchecked, and ignores what it does not
know; here a bad one is a ValueError, which is HTTP 400.  So is a video without a readable pair of
frames, at which vLLM divides by zero and Hugging Face's processor prints arrays.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar

import numpy as np
from vllm.logger import init_logger
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, Qwen2VLVideoBackend
from vllm.multimodal.video_decoders import (
    VideoSourceMetadata,
    VideoTargetMetadata,
    resolve_video_backend_kwargs,
)
from vllm.multimodal.video_decoders.opencv import decode_opencv

logger = init_logger("vllm.adaspark")

LOADER = "adaspark"  # names for media_io_kwargs.video.video_backend
DECORD_LOADER = "adaspark_decord"

PAIR = 2  # frames that Qwen2.5-VL merges into one
QWEN_FRAMES = 768  # unless max_frames says otherwise, as Qwen and vLLM have it
# vLLM hands a loader this num_frames if nobody sets one; -1 is its word for "all".
UNSET_NUM_FRAMES = (inspect.signature(VideoMediaIO.__init__).parameters["num_frames"].default, -1)


@VIDEO_LOADER_REGISTRY.register(LOADER)
class VideoLoader(Qwen2VLVideoBackend):
    """vLLM's, with checks; ``max_frames`` may also exceed Qwen's 768."""

    _MAX_FRAMES: ClassVar[int] = 32768  # nine hours at one frame a second

    @classmethod
    def load_bytes(cls, data: bytes, *args: Any, **kwargs: Any):
        """(frames ``[n, h, w, 3]`` RGB uint8, metadata as Hugging Face's processor takes it).

        Raises:
            ValueError: an option or the video cannot be used; says which, and why.
        """
        if not data:
            raise ValueError("the video is empty: 0 bytes")
        frames, metadata = cls._decode(data, *args, **kwargs)
        if not len(frames):
            raise ValueError(
                f"none of the video's {metadata['total_num_frames']} frames could be decoded: "
                "the file is damaged, or its codec is not supported"
            )
        return frames, metadata

    @classmethod
    def _decode(cls, data: bytes, *args: Any, **kwargs: Any):
        return super().load_bytes(data, *args, **kwargs)

    @classmethod
    def compute_frames_index_to_sample(
        cls, source: VideoSourceMetadata, target: VideoTargetMetadata, **options: Any
    ) -> list[int]:
        """Indices of the frames to read, ascending, in pairs."""
        _check_options(target, options, cls._MAX_FPS, cls._MAX_FRAMES)
        try:
            return super().compute_frames_index_to_sample(
                source, target, **{"max_frames": QWEN_FRAMES, **options}
            )
        except ZeroDivisionError:
            raise ValueError(
                f"Qwen2.5-VL takes a video's frames in pairs, and of this one's "
                f"{source.total_frames_num} no pair can be taken; send a single frame as an image"
            ) from None


@VIDEO_LOADER_REGISTRY.register(DECORD_LOADER)
class DecordVideoLoader(VideoLoader):
    """Decodes with decord; frame numbers, sampling and metadata are OpenCV's.

    A file that decord cannot read, or numbers otherwise, is read with OpenCV after all.
    """

    @classmethod
    def _decode(
        cls,
        data: bytes,
        num_frames: int = -1,
        fps: float = 2,
        max_duration: float = 300,
        frame_recovery: bool = False,
        *,
        backend: str = "decord",
        **options: Any,
    ):
        if backend != "decord" or frame_recovery:
            wrong = f"backend={backend!r}" if backend != "decord" else "frame_recovery=true"
            raise ValueError(
                f"media_io_kwargs.video.{wrong} does not go with video_backend={DECORD_LOADER!r}; "
                f"leave it out, or use video_backend={LOADER!r}"
            )
        # Refuses the options of other decoders; OpenCV has none, and neither has decord.
        options, _ = resolve_video_backend_kwargs("opencv", options)
        target = VideoTargetMetadata(num_frames, fps, max_duration)
        frames, source, _, valid = decode_opencv(_DecordReader(cls, data), data, target, options)
        return frames, cls.create_hf_metadata(source, valid, "decord")


@dataclass(frozen=True)
class _DecordReader:
    """What vLLM's OpenCV decoder asks a loader for, with decord reading the frames.

    OpenCV still opens the file, which takes a millisecond: asking both for the frame rate and the
    number of frames would now and then give two answers, and so two choices of frames.
    """

    loader: type[VideoLoader]
    data: bytes

    def _prepare_source(self, source: VideoSourceMetadata) -> VideoSourceMetadata:
        return self.loader._prepare_source(source)

    def compute_frames_index_to_sample(self, *args: Any, **kwargs: Any) -> list[int]:
        return self.loader.compute_frames_index_to_sample(*args, **kwargs)

    def read_frames(
        self, cap: Any, frame_idx: list[int], total_frames_num: int, *, frame_recovery: bool = False
    ) -> tuple[np.ndarray, list[int]]:
        decord = require_decord()
        wanted = sorted(set(frame_idx))
        try:
            reader = decord.VideoReader(BytesIO(self.data))
            if len(reader) == total_frames_num:
                return reader.get_batch(wanted).asnumpy(), wanted
            # An edit list hides frames, or the end is damaged: decord's frame i may be another one.
            reason = f"it counts {len(reader)} frames, OpenCV {total_frames_num}"
        except (decord.DECORDError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
        logger.warning("AdaSpark: read a video with OpenCV instead of decord: %s", reason)
        return self.loader.read_frames(cap, frame_idx, total_frames_num)


def _check_options(
    target: VideoTargetMetadata, options: dict[str, Any], max_fps: float, max_frames: int
) -> None:
    """Raise a ValueError that names the option, its value and what is allowed."""

    def refuse(name: str, value: Any, why: str) -> None:
        raise ValueError(f"media_io_kwargs.video.{name}={value!r}: {why}")

    fps = target.fps
    if not _is_number(fps) or not 0 < fps <= max_fps:
        refuse("fps", fps, f"expected frames per second, above 0 and at most {max_fps}")
    if target.num_frames not in UNSET_NUM_FRAMES:
        refuse("num_frames", target.num_frames, "frames are sampled by time; use fps or max_frames")
    for name, value in options.items():
        if name not in ("max_frames", "min_frames"):
            refuse(name, value, "unknown; allowed: fps, max_frames, min_frames, video_backend")
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not PAIR <= value <= max_frames:
            refuse(name, value, f"expected a whole number from {PAIR} to {max_frames}")
    least, most = options.get("min_frames", 0), options.get("max_frames", QWEN_FRAMES)
    if least > most:
        refuse("min_frames", least, f"more than max_frames={most}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def require_decord():
    """The module ``decord``, or a ValueError that says how to get it."""
    try:
        import decord
    except ImportError:
        raise ValueError(
            f"video_backend={DECORD_LOADER!r} needs decord, which is not installed on the server: "
            f"pip install 'vllm-adaspark[video]', or use video_backend={LOADER!r}"
        ) from None
    return decord
