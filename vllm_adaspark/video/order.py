"""Geometry: in which order a video's tokens enter the prompt, so that a KV block is a compact cube.

A video is a grid of T x H x W merged tokens; stock Qwen2.5-VL feeds it frame by frame ("raster"),
so 64 consecutive tokens are a thin strip of one frame.  Here it is fed cube by cube:

* the video is cut into slabs of near-equal length, ``t`` frames each if they divide it;
* a slab is cut into strips of near-equal height, ``h`` rows each if they divide it;
* a strip is fed column by column, all (row, frame) pairs of a column together; alternate strips
  run the other way and alternate slabs are reversed, so neighbours in the sequence are neighbours
  in the video.

vLLM cuts this order into KV blocks every B tokens wherever the video happens to start.  With an
aligned start and a grid that divides, a block is an exact t x h x w box; otherwise it is still
compact.  An ideal 4x4x4 box has a mean squared spread of 3.75.  Grids of 4 or more frames, rows and
columns mostly have 4.2 to 5.3 (half of them below 4.5, one in ten above 5.05, none of 3,000 above
6.7) where raster order has 11 to 86.  A thin grid has no room for compact blocks: with 2 rows or
columns 6 to 24, with a single one 10 to 89.

RoPE knows tokens by their position ids, which are permuted alike, so the order changes nothing in
dense bidirectional terms; it does change which tokens are "earlier" under the causal mask.
"""

from __future__ import annotations

import base64
from functools import lru_cache
from itertools import pairwise

import numpy as np


@lru_cache(maxsize=32)  # of a megabyte each for a long video; clients choose grids and cubes
def cube_order(
    grid: tuple[int, int, int], cube: tuple[int, int, int], order: str = "cube"
) -> np.ndarray:
    """In which order a video's tokens enter the prompt.

    Args:
        grid: (T, H, W) merged tokens.
        cube: (t, h, w) wanted shape of a cube.
        order: ``"cube"``, or ``"raster"`` for stock order.

    Returns:
        ``[T * H * W]`` int64, read-only: the i-th token is raster token ``result[i]``.

    Example:
        >>> cube_order((1, 2, 4), (1, 2, 2)).tolist()
        [0, 4, 1, 5, 2, 6, 3, 7]
    """
    T, H, W = grid
    if order == "raster":
        token_order = np.arange(T * H * W)
    elif order == "cube":
        raster = np.arange(T * H * W).reshape(T, H, W)
        strips_per_slab = max(1, round(H / cube[1]))
        slabs = []
        for index, frames in enumerate(_near_equal(T, _slabs(T, cube))):
            strips = []
            for strip, rows in enumerate(_near_equal(H, strips_per_slab)):
                columns = raster[frames, rows].transpose(2, 1, 0)  # [w, h, t]
                strips.append((columns[::-1] if strip % 2 else columns).reshape(-1))
            slab = np.concatenate(strips)
            slabs.append(slab[::-1] if index % 2 else slab)
        token_order = np.concatenate(slabs)
    else:
        raise ValueError(f"order={order!r}: expected 'cube' or 'raster'")
    token_order = token_order.astype(np.int64)
    token_order.flags.writeable = False
    return token_order


def block_spread(
    grid: tuple[int, int, int],
    cube: tuple[int, int, int],
    block: int,
    *,
    phase: int = 0,
    order: str = "cube",
) -> float:
    """Mean squared distance of a KV block's tokens from their centre, in merged tokens squared.

    ``phase`` is the number of video tokens before the first block edge.  An ideal 4x4x4 box: 3.75.
    """
    token_order = cube_order(grid, cube, order)[phase:]
    whole = token_order[: len(token_order) // block * block]
    at = np.stack(np.unravel_index(whole, grid), axis=-1).reshape(-1, block, 3).astype(float)
    return float(((at - at.mean(1, keepdims=True)) ** 2).sum(-1).mean())


def spread_tokens(volume: int, count: int) -> np.ndarray:
    """Some tokens of a cube that stand for all of it: one or more of every frame, row and column.

    They lie on a diagonal of the cube: every n-th token alone would all be of one frame.

    Args:
        volume: tokens of a cube, a power of two.
        count: how many, a power of two; all of them where that is more.

    Returns:
        ``[min(count, volume)]`` int64 offsets in the cube, rising.

    Example:
        >>> spread_tokens(64, 16).tolist()
        [0, 5, 10, 15, 17, 22, 27, 28, 34, 39, 40, 45, 51, 52, 57, 62]
    """
    step = max(1, volume // count)
    nth = np.arange(volume // step)
    return nth * step + (nth + nth // step) % step


def encode_order(order: np.ndarray | None) -> str | None:
    """A token order, or a part of one, as text: base64 of little-endian int32; None for None."""
    return None if order is None else base64.b64encode(order.astype("<i4").tobytes()).decode()


def decode_order(text: str) -> np.ndarray:
    """Undo :func:`encode_order`."""
    return np.frombuffer(base64.b64decode(text), "<i4")


def _slabs(frames: int, cube: tuple[int, int, int]) -> int:
    """How many slabs to cut a video into: ``frames / t``, rounded to where blocks are compacter.

    A KV block holds as many tokens whatever the slab, so in longer slabs it is narrower; the spread
    of a box is (t^2 + h^2 + w^2 - 3) / 12.  Plain rounding does as well for (4, 4, 4), but would
    make one slab of 11 frames for (8, 4, 4).
    """
    t, _, w = cube

    def spread(slabs: int) -> float:
        length = frames / slabs
        return length**2 + (t * w / length) ** 2

    return min(max(1, frames // t), -(-frames // t), key=spread)


def _near_equal(length: int, parts: int) -> list[slice]:
    """Cut ``length`` into ``parts`` that differ by one at most."""
    edges = np.linspace(0, length, parts + 1).round().astype(int).tolist()
    return [slice(start, end) for start, end in pairwise(edges)]
