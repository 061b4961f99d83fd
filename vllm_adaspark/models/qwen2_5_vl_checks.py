"""Qwen2.5-VL's own limits: embeddings must fit their grid, and M-RoPE's positions their table.

A breach would end the engine, so it is refused in the API server's process (see checks.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from ..settings import shown


def check_embeddings(data: Mapping[str, Any], modality: str, merge: int, hidden: int) -> None:
    """Refuse ``image_embeds`` or ``video_embeds`` that do not fit their grid.

    Args:
        data: ``{modality}_embeds`` ``[rows, hidden]`` of all items one after the other, and
            ``{modality}_grid_thw`` ``[items, 3]`` in patches.
        modality: ``"image"`` or ``"video"``.
        merge: patches along a merged token's side.
        hidden: width of the language model's embeddings.

    Raises:
        ValueError: names the field, what it holds and what was expected.
    """
    embeds_name, grid_name = f"{modality}_embeds", f"{modality}_grid_thw"
    missing = [name for name in (embeds_name, grid_name) if data.get(name) is None]
    if missing:
        raise ValueError(f"{embeds_name}: {' and '.join(missing)} missing; send both")
    embeds, grids = (torch.as_tensor(data[name]) for name in (embeds_name, grid_name))
    if grids.ndim != 2 or grids.shape[1] != 3 or grids.is_floating_point():
        raise ValueError(
            f"{grid_name}: expected whole numbers [items, 3] (frames, rows, columns of patches), "
            f"got {list(grids.shape)} of {grids.dtype}"
        )
    for t, h, w in grids.tolist():
        if min(t, h, w) < 1 or h % merge or w % merge or (modality == "image" and t != 1):
            frames = "one frame" if modality == "image" else "at least one frame"
            raise ValueError(
                f"{grid_name}={[t, h, w]}: expected {frames}, and rows and columns that are "
                f"positive multiples of {merge}"
            )
    # Not by the tensors' own product, which would overflow to what the client likes.
    rows = sum(t * h * w // merge**2 for t, h, w in grids.tolist())
    if list(embeds.shape) != [rows, hidden] or not embeds.is_floating_point():
        raise ValueError(
            f"{embeds_name}: {grid_name}={shown(grids.tolist())} asks for [{rows}, {hidden}] "
            f"floating-point numbers, got {list(embeds.shape)} of {embeds.dtype}"
        )


def check_sizes(
    media: Iterable[tuple[int, int]], kwargs: Mapping[str, Any], merged: int, most: int
) -> None:
    """Refuse images or videos of which a request's own sizes would make too many tokens.

    The processor would make them all before anybody counts them.

    Args:
        media: (frames, pixels of a frame) of each image and each video.
        kwargs: what the request says of their sizes: ``min_pixels``, ``max_pixels``, ``size``.
        merged: pixels of a merged token.
        most: tokens that the server may hold of a request; up to twice as many are let through,
            to be counted by vLLM.

    Raises:
        ValueError: says how many there would be and what to change.
    """
    size = kwargs.get("size") or {}
    least = kwargs.get("min_pixels") or size.get("shortest_edge")
    limit = kwargs.get("max_pixels") or size.get("longest_edge")
    if least is None and limit is None:
        return
    tokens = 0
    for frames, pixels in media:
        pixels = min(pixels, limit) if limit and pixels > limit else max(pixels, least or 0)
        tokens += frames * pixels // (2 * merged)
    if tokens > 2 * most:
        raise ValueError(
            f"mm_processor_kwargs: with min_pixels={least} and max_pixels={limit} these images or "
            f"videos are about {tokens} tokens, and this server takes {most} of a request: lower "
            "them, or send fewer frames"
        )


class Grid(NamedTuple):
    """Size of an image or video in merged tokens, and how far apart its frames are in time."""

    frames: int
    rows: int
    columns: int
    positions_per_frame: float  # M-RoPE time positions from one pair of frames to the next

    @property
    def extent(self) -> int:
        """M-RoPE positions that it takes up."""
        last = int((self.frames - 1) * self.positions_per_frame)
        return max(last, self.rows - 1, self.columns - 1) + 1


def position_limit(text_config: Any) -> int:
    """M-RoPE positions there are: rows of the cos/sin table that vLLM builds.

    vLLM makes it four times as long as the model's positions, because time positions of videos run
    faster than tokens; under YaRN, so often the original positions times the factor.
    """
    rope = getattr(text_config, "rope_parameters", None) or {}
    positions = text_config.max_position_embeddings
    if rope.get("rope_type", rope.get("type")) == "yarn":
        positions = rope["original_max_position_embeddings"] * rope["factor"]
    return int(4 * positions)


def check_positions(
    tokens: int, media: Iterable[tuple[int, Grid]], max_model_len: int, limit: int
) -> None:
    """Refuse a prompt whose positions, or those of its answer, run past the rotary table.

    Args:
        tokens: of the prompt.
        media: (tokens, grid) of each image and video in it.
        max_model_len: the longest a prompt with its answer may get, in tokens.
        limit: positions there are.

    Raises:
        ValueError: says how many positions the prompt takes and what to change.
    """
    media = list(media)
    used = sum(grid.extent for _, grid in media)
    text = tokens - sum(number for number, _ in media)
    for_answer = max(0, max_model_len - tokens)
    if used + text + for_answer <= limit:
        return
    longest = max((grid for _, grid in media), key=lambda grid: grid.extent, default=None)
    told = f" (the longest video or image takes {longest.extent})" if longest else ""
    raise ValueError(
        f"this prompt's images and videos take {used} positions in time{told}, its text {text} and "
        f"its answer up to {for_answer}, but this model has {limit}: send fewer or shorter videos, "
        "or check their duration"
    )
