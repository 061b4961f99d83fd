"""What VideoNSA knows of a request."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...requests import Request
from .settings import VideoNSASettings


@dataclass(frozen=True)
class VideoNSARequest(Request):
    """A request with vision tokens, of videos or images: ``is_video`` has both."""

    config: VideoNSASettings

    @cached_property
    def is_cube(self) -> np.ndarray:
        """``[blocks]`` bool: which whole KV blocks of the prompt hold vision tokens."""
        return self.video_in_block > 0

    @cached_property
    def vision_end(self) -> int:
        """Tokens of the prompt up to its last vision token."""
        return int(self.is_video.nonzero()[0].max(initial=-1)) + 1

    def has_vision(self, first: int, end: int) -> bool:
        """Whether one of its tokens ``first`` to ``end`` runs VideoNSA."""
        return (
            self.config.enabled and first < self.vision_end and bool(self.is_video[first:end].any())
        )
