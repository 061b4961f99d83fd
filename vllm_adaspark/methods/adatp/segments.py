"""Segments: runs of frames that look alike, found by comparing each frame with the next.

The paper cuts a video where two adjacent frames' global visual tokens are less similar than
``tau_s`` (its first step).  Which vector stands for a frame is the caller's: a SigLIP checkpoint's
pooled output, or without one the mean of the frame's merged tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def frame_means(tokens: torch.Tensor, frames: int) -> torch.Tensor:
    """The mean of each frame's tokens: ``[frames * places, hidden]`` to ``[frames, hidden]``."""
    return tokens.float().unflatten(0, (frames, -1)).mean(1)


def adjacent_similarity(embeddings: torch.Tensor) -> torch.Tensor:
    """Cosine of each frame with the next: ``[frames, d]`` to ``[frames - 1]``."""
    unit = torch.nn.functional.normalize(embeddings.float(), dim=-1)
    return (unit[:-1] * unit[1:]).sum(-1)


def text_similarity(embeddings: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Cosine of each frame with a text: ``[frames, d]`` and ``[d]`` to ``[frames]``."""
    return torch.nn.functional.cosine_similarity(embeddings.float(), text[None].float())


def segment_frames(similarities: Sequence[np.ndarray], tau_s: float) -> np.ndarray:
    """Number the segments of a request's videos.

    Args:
        similarities: of each video in order, ``[frames - 1]`` cosines of adjacent frames.
        tau_s: two frames less similar than this are in different segments.

    Returns:
        ``[frames of all videos]`` the segment of each frame, from 0 on and never falling; a video
        always starts a new one.
    """
    cuts = [cut for of_video in similarities for cut in (True, *(of_video < tau_s).tolist())]
    return np.cumsum(cuts) - 1
