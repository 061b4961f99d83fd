"""Which frames a trace's question or answer attended most: those are worth looking at.

A cube spans several frames, and a choice of cubes cannot tell its frames apart: they come together.
NumPy only, as whoever reads a trace over HTTP has no more.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..video.order import cube_order, decode_order

GONE = -2  # the cube of a dropped token
NONE = -1  # the cube of a token that lies in no whole one


def cube_heat(rows: list[list[float | None]], layers: list[int], layer: int | None) -> np.ndarray:
    """``[cubes]`` of one layer or the mean of all; NaN for cubes after the source."""
    heat = np.array(rows, dtype=float)
    return heat.mean(0) if layer is None else heat[layers.index(layer)]


def cubes_of(trace: dict[str, Any], number: int) -> np.ndarray:
    """``[t, h, w]``: the cube of each of a video's tokens; -1: in no whole one, -2: dropped."""
    video, size = trace["videos"][number], trace["block_size"]
    if video.get("token_order") is None:
        order = cube_order(tuple(video["grid"]), tuple(video["cube"]), video["order"])
    else:
        order = decode_order(video["token_order"])
    block = (video["offset"] + np.arange(len(order))) // size
    cube_of_block = {start // size: nth for nth, start in enumerate(trace["cube_starts"])}
    cubes = np.full(np.prod(video["grid"]), GONE)
    cubes[order] = [cube_of_block.get(each, NONE) for each in block.tolist()]
    return cubes.reshape(video["grid"])


def frame_heat(heat: np.ndarray, cubes: np.ndarray) -> np.ndarray:
    """How much of each frame was attended.

    Args:
        heat: ``[cubes]`` from :func:`cube_heat`.
        cubes: ``[t, h, w]`` from :func:`cubes_of`.

    Returns:
        ``[t]``: the mean over a frame's tokens.  Dropped tokens were not attended.  Tokens in no
        whole cube always are, whatever was asked, so they do not count; NaN for a frame that has
        no others.
    """
    share = np.append(heat, [0.0, np.nan])[cubes]  # -2 and -1 take the last two
    known = ~np.isnan(share)
    number = known.sum((1, 2))
    mean = np.where(known, share, 0.0).sum((1, 2)) / np.maximum(number, 1)
    return np.where(number > 0, mean, np.nan)


def most_attended(
    trace: dict[str, Any], heat: np.ndarray, places: list[tuple[int, int]], wanted: int
) -> list[tuple[int, int]]:
    """The frames that were attended most, in order of time.

    Args:
        trace: its ``videos``, ``block_size`` and ``cube_starts``.
        heat: ``[cubes]`` of the source and layers, from :func:`cube_heat`.
        places: the frames to choose from: (video, place in time) of each.
        wanted: how many.  Of frames that were attended alike the earlier are taken.

    Returns:
        ``wanted`` of the ``places``, or all.  Where nothing was recorded they are evenly spread.
    """
    of_video = [frame_heat(heat, cubes_of(trace, number)) for number in range(len(trace["videos"]))]
    share = np.array([of_video[video][n] for video, n in places])
    if np.isnan(share).all():
        return [places[i] for i in spread(len(places), wanted)]
    ranked = np.argsort(-np.nan_to_num(share, nan=-1.0), kind="stable")
    return sorted(places[i] for i in ranked[:wanted])


def spread(number: int, wanted: int) -> list[int]:
    """``wanted`` of ``number`` things, or all of them, evenly spread: the middle of equal parts."""
    wanted = min(number, wanted)
    return [int((i + 0.5) * number / wanted) for i in range(wanted)]
