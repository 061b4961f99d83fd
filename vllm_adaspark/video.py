"""Reading a request's video: vLLM's loader for Qwen2-VL, with an HTTP 400 where that one breaks.

Qwen2-VL samples frames in pairs.  vLLM 0.32's rule divides by zero when there is no pair, which a
client sees as HTTP 500; a video none of whose frames decodes gets as far as Hugging Face's
processor, whose message then shows arrays.  startup.StartupCheck makes this loader the default for
our architecture alone.
"""

from __future__ import annotations

from typing import Any

from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, Qwen2VLVideoBackend

LOADER = "adaspark"  # the name for media_io_kwargs


@VIDEO_LOADER_REGISTRY.register(LOADER)
class VideoLoader(Qwen2VLVideoBackend):
    """As stock; raises a ValueError, which is HTTP 400, for a video without two readable frames."""

    @classmethod
    def load_bytes(cls, data: bytes, *args: Any, **kwargs: Any):
        if not data:
            raise ValueError("the video is empty: 0 bytes")
        frames, metadata = super().load_bytes(data, *args, **kwargs)
        if not len(frames):
            raise ValueError(
                f"none of the video's {metadata['total_num_frames']} frames could be decoded: "
                "the file is damaged, or its codec is not supported"
            )
        return frames, metadata

    @classmethod
    def compute_frames_index_to_sample(cls, source, target, **kwargs: Any) -> list[int]:
        try:
            return super().compute_frames_index_to_sample(source, target, **kwargs)
        except ZeroDivisionError:
            raise ValueError(
                f"Qwen2.5-VL takes a video's frames in pairs, and of this one's "
                f"{source.total_frames_num} no pair can be taken; send a single frame as an image"
            ) from None
