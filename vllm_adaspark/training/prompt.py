"""Where the videos of a batch are, in which order they are served, and at which positions.

Stock transformers puts a video's tokens into a prompt frame by frame and, after a video, goes on
with the text at ``start + max(height, width)``; vLLM goes on at the largest position + 1.  Served
is what counts here: cube order, vLLM's positions.  Integers only, on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..settings import Settings
from ..video.order import cube_order


@dataclass(frozen=True)
class Prompt:
    """One sequence of a batch, without its padding.

    Attributes:
        columns: ``[n]`` its tokens' columns in the batch, in served order.
        positions: ``[3, n]`` M-RoPE positions, in served order.
        is_video: ``[n]`` bool, in served order.
        is_vision: ``[n]`` bool, of videos or images.
        videos: (offset, tokens) of each video.
    """

    columns: np.ndarray
    positions: np.ndarray
    is_video: np.ndarray
    is_vision: np.ndarray
    videos: list[tuple[int, int]]


def read_prompts(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    image_grids: torch.Tensor | None,
    video_grids: torch.Tensor | None,
    seconds_per_grid: torch.Tensor | list[float] | None,
    model_config,
    config: Settings,
) -> list[Prompt]:
    """The sequences of a batch.

    Args:
        input_ids: ``[batch, n]``.
        attention_mask: ``[batch, n]``, 0 for padding, on either side; None if there is none.
        position_ids: ``[3, batch, n]`` positions to use, in the order of ``input_ids``; None for
            those vLLM gives the prompt.
        image_grids, video_grids: ``[images, 3]`` and ``[videos, 3]`` patches (t, h, w).
        seconds_per_grid: ``[videos]`` seconds a temporal patch lasts; None for one.
        model_config: of the Qwen2.5-VL model.
        config: the method's settings, for the order of a video's tokens.

    Raises:
        ValueError: placeholders and grids do not fit together, or a mask that is no padding.
    """
    ids = input_ids.cpu().numpy()
    real = np.ones(ids.shape, bool)
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask of shape {list(attention_mask.shape)}: sparse training takes a "
                f"padding mask of input_ids' shape, {list(input_ids.shape)}"
            )
        real = attention_mask.cpu().numpy() != 0
    given = None if position_ids is None else _given_positions(position_ids, input_ids)
    videos = zip(_rows(video_grids), _seconds(seconds_per_grid, video_grids), strict=True)
    images = ((grid, 0.0) for grid in _rows(image_grids))
    prompts = []
    for row in range(len(ids)):
        columns = np.flatnonzero(real[row])
        if not len(columns):
            raise ValueError(f"attention_mask: sequence {row} is all padding")
        media = list(_media(ids[row, columns], images, videos, model_config))
        positions = _served_positions(len(columns), media)
        if given is not None:
            positions = given[:, row, columns]
        order = np.arange(len(columns))
        is_video, is_vision = np.zeros((2, len(columns)), bool)
        places = []
        for medium in media:
            is_vision[medium.start : medium.end] = True
            if medium.is_video:
                token_order = cube_order(medium.grid, config.cube, config.order)
                order[medium.start : medium.end] = medium.start + token_order
                is_video[medium.start : medium.end] = True
                places.append((medium.start, medium.end - medium.start))
        prompts.append(Prompt(columns[order], positions[:, order], is_video, is_vision, places))
    for kind, rest in (("video", videos), ("image", images)):
        if next(rest, None) is not None:
            raise ValueError(f"{kind}_grid_thw: more grids than {kind}s in input_ids")
    return prompts


@dataclass(frozen=True)
class _Medium:
    """An image or a video in a prompt."""

    start: int
    grid: tuple[int, int, int]  # merged tokens
    pace: float  # positions a temporal patch
    is_video: bool

    @property
    def end(self) -> int:
        t, h, w = self.grid
        return self.start + t * h * w


def _media(ids: np.ndarray, images: Iterator, videos: Iterator, model_config) -> Iterator[_Medium]:
    """The images and videos of ``ids [n]``, taking their grids from the two iterators."""
    merge = model_config.vision_config.spatial_merge_size
    per_second = getattr(model_config.vision_config, "tokens_per_second", 1.0)
    at = 0
    vision = np.isin(ids, (model_config.image_token_id, model_config.video_token_id))
    while vision[at:].any():
        at += int(vision[at:].argmax())
        is_video = ids[at] == model_config.video_token_id
        kind = "video" if is_video else "image"
        (t, h, w), seconds = next(videos if is_video else images, ((0, 0, 0), 0.0))
        if not t:
            raise ValueError(f"{kind}_grid_thw: fewer grids than {kind}s in input_ids")
        medium = _Medium(at, (t, h // merge, w // merge), seconds * per_second, bool(is_video))
        if medium.end > len(ids) or (ids[at : medium.end] != ids[at]).any():
            raise ValueError(
                f"{kind}_grid_thw=[{t}, {h}, {w}]: stands for {medium.end - at} tokens, but "
                f"input_ids have fewer {kind} tokens in a row from token {at} on"
            )
        yield medium
        at = medium.end


def _served_positions(length: int, media: list[_Medium]) -> np.ndarray:
    """vLLM's M-RoPE positions ``[3, length]``, videos in raster order."""
    parts, start, at = [np.zeros((3, 0), np.int64)], 0, 0
    for medium in media:
        text = medium.start - start
        parts.append(np.broadcast_to(np.arange(text), (3, text)) + at)
        places = np.indices(medium.grid)
        places[0] = (places[0] * medium.pace).astype(np.int64)
        parts.append(places.reshape(3, -1) + at + text)
        start, at = medium.end, int(parts[-1].max()) + 1
    text = length - start
    parts.append(np.broadcast_to(np.arange(text), (3, text)) + at)
    return np.concatenate(parts, axis=1)


def _given_positions(position_ids: torch.Tensor, input_ids: torch.Tensor) -> np.ndarray:
    if position_ids.shape != (3, *input_ids.shape):
        raise ValueError(
            f"position_ids of shape {list(position_ids.shape)}: expected "
            f"{[3, *input_ids.shape]} M-RoPE positions, or none for those vLLM serves with"
        )
    return position_ids.cpu().numpy()


def _rows(grids: torch.Tensor | None) -> Iterator[tuple[int, int, int]]:
    return iter([] if grids is None else [tuple(grid) for grid in grids.tolist()])


def _seconds(seconds: torch.Tensor | list[float] | None, grids: torch.Tensor | None) -> list[float]:
    count = 0 if grids is None else len(grids)
    if seconds is None:
        return [1.0] * count
    listed = torch.as_tensor(seconds).flatten().tolist()
    if len(listed) != count:
        raise ValueError(f"second_per_grid_ts has {len(listed)} entries for {count} videos")
    return listed
