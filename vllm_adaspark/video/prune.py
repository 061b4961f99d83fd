"""Which tokens of a video are dropped before the language model; how the others keep their place.

The rule is that of EVS (arXiv 2510.14624, Efficient Video Sampling), which vLLM has for a whole
server as ``--video-pruning-rate``: a token is worth its cosine distance from the token at the same
place one frame earlier, and of the first frame all tokens stay.  Here the share that is dropped is
a setting of a request (``prune``).

How *many* tokens stay follows from the video's grid, so the prompt is made before the video is
encoded.  *Which* ones is known only once it is: :func:`survivors`.  They are put in the order of
the video's token order (order.py), so that a KV block of them is still a compact piece of video.

A survivor keeps its position, that of its place in the whole video.  As positions are made before
anyone knows the survivors, a request's positions give all tokens of a pruned video that of its
first token, and each survivor carries how far it lies from there along with its embedding, in a
few more columns of the encoder cache's entry: digits below 256, which every dtype holds exactly.
Which token it is comes last, for traces.

A prompt with dropped tokens stands for a longer one, the *whole* prompt: :class:`WholePrompt` says
how long.  Needs PyTorch; no vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..settings import SHARE_STEPS

DIGITS = 3  # base 256
COLUMNS = 4 * DIGITS  # three positions and the raster token
FRAMES_AT_ONCE = 16  # compared in float32, which bounds the memory that takes


def kept_tokens(grid: tuple[int, int, int], prune: float) -> int:
    """How many tokens of a video stay: all of its first frame, and no more than ``1 - prune``.

    Args:
        grid: (T, H, W) merged tokens.
        prune: the share to drop, in thousandths (settings.SHARE_STEPS), 0 <= prune < 1.

    Example:
        >>> kept_tokens((10, 4, 4), 0.75), kept_tokens((2, 4, 4), 0.75)
        (40, 16)
    """
    t, h, w = grid
    kept = SHARE_STEPS - round(prune * SHARE_STEPS)
    return max(h * w, t * h * w * kept // SHARE_STEPS)


def survivors(
    video: torch.Tensor, grid: tuple[int, int, int], prune: float, token_order: np.ndarray
) -> torch.Tensor:
    """Which tokens of a video stay, in its token order.

    Distances are computed in float32 whatever the dtype, and of equal ones the earlier token stays.
    Waits for no device: how many stay is known.

    Args:
        video: ``[T * H * W, hidden]`` embeddings, in raster order.
        grid: (T, H, W) merged tokens.
        prune: the share to drop.
        token_order: ``[T * H * W]`` the raster token at each place of the order.

    Returns:
        ``[kept]`` int64 raster tokens, on the video's device.
    """
    t, h, w = grid
    frames = video.unflatten(0, (t, h * w))
    novelty = [torch.full((1, h * w), 3.0, device=video.device)]  # no distance is above 2
    for start in range(1, t, FRAMES_AT_ONCE):
        later = frames[start : start + FRAMES_AT_ONCE].float()
        earlier = frames[start - 1 : start - 1 + len(later)].float()
        novelty.append(1 - F.cosine_similarity(later, earlier, dim=-1))
    order = torch.cat(novelty).flatten().argsort(descending=True, stable=True)
    nth = np.empty(len(token_order), np.int64)
    nth[token_order] = np.arange(len(token_order))  # each raster token's place in the order
    nth, token_order = (torch.from_numpy(x.copy()).to(video.device) for x in (nth, token_order))
    return token_order[nth[order[: kept_tokens(grid, prune)]].sort().values]


def with_places(
    video: torch.Tensor,
    tokens: torch.Tensor,
    grid: tuple[int, int, int],
    positions_per_frame: float,
) -> torch.Tensor:
    """Survivors, each with its place in the whole video.

    Args:
        video: ``[T * H * W, hidden]`` the whole video's embeddings, in raster order.
        tokens: ``[kept]`` the survivors.
        grid: (T, H, W) merged tokens.
        positions_per_frame: M-RoPE time positions from one frame to the next.

    Returns:
        ``[kept, hidden + COLUMNS]`` embeddings, then the digits of M-RoPE's (time, row, column),
        counted from the video's first token, and of the raster token.
    """
    t, h, w = grid
    times = (np.arange(t) * positions_per_frame).astype(np.int64)  # as vLLM rounds them
    times = torch.from_numpy(times).to(tokens.device)
    places = [times[tokens // (h * w)], tokens // w % h, tokens % w, tokens]
    shifts = 8 * torch.arange(DIGITS, device=tokens.device)
    digits = torch.stack(places, dim=1)[:, :, None] >> shifts & 255  # [kept, 4, digits]
    return torch.cat([video[tokens], digits.flatten(1).to(video.dtype)], dim=1)


def split_places(tokens: torch.Tensor, hidden: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Undo :func:`with_places`.

    Args:
        tokens: ``[n, hidden + COLUMNS]``, or ``[n, hidden]`` of an image or a whole video.
        hidden: width of the language model's embeddings.

    Returns:
        The embeddings ``[n, hidden]``, and (time, row, column, raster token) ``[4, n]`` int64;
        None for the second where the tokens carry no places.
    """
    if tokens.shape[1] == hidden:
        return tokens, None
    digits = tokens[:, hidden:].long().unflatten(1, (4, DIGITS))
    shifts = 8 * torch.arange(DIGITS, device=tokens.device)
    return tokens[:, :hidden], (digits << shifts).sum(-1).T


@dataclass(frozen=True)
class VideoSpan:
    """A video's place in the prompt.

    Attributes:
        start: its first token.
        tokens: those in the prompt.
        whole: those that it had before some were dropped.
    """

    start: int
    tokens: int
    whole: int


class WholePrompt:
    """The prompt that a prompt with dropped tokens stands for.

    Dropped tokens count as lying evenly between a video's survivors, so that every part of a
    prefill stands for its part of the whole one.

    Args:
        tokens: of the prompt.
        videos: its videos, in the order of the prompt.

    Attributes:
        dropped: tokens that the whole prompt has more.
    """

    def __init__(self, tokens: int, videos: Iterable[VideoSpan]) -> None:
        here, there = [0], [0]  # edges of videos, in this prompt and in the whole one
        for video in videos:
            start = there[-1] + video.start - here[-1]
            here += [video.start, video.start + video.tokens]
            there += [start, start + video.whole]
        self.dropped = there[-1] - here[-1]
        self.tokens = tokens + self.dropped
        # Behind the last video both go on alike, through the answer.
        self._here, self._there = np.array(here), np.array(there)

    def up_to(self, count: np.ndarray | int) -> np.ndarray:
        """How many tokens of the whole prompt and answer the first ``count`` stand for, int64."""
        count = np.asarray(count, np.int64)
        at = np.searchsorted(self._here, count, side="right") - 1  # the last edge before it
        last = at == len(self._here) - 1
        following = np.minimum(at + 1, len(self._here) - 1)
        length = np.maximum(self._here[following] - self._here[at], 1)
        stretched = (count - self._here[at]) * (self._there[following] - self._there[at]) // length
        return self._there[at] + np.where(last, count - self._here[at], stretched)
