"""How many tokens of each segment survive an event, and which.

How many is known on the host before the layers run: it follows from the segments and the shares.
Which ones depends on the layer's attention scores, so it is found on the device, and nothing there
waits for it.  Inside a segment one token stands for each place in the frame (the paper's third
step): the one with the best score.  Ranks are compared inside a segment only.
"""

from __future__ import annotations

import numpy as np
import torch

from .settings import AdaTPSettings


def apportion(targets: np.ndarray, most: np.ndarray | float = np.inf) -> np.ndarray:
    """Round ``targets [segments]`` to whole tokens whose sum is theirs, rounded down, at least 1.

    What rounding down leaves goes to segments that have ``most [segments]`` more than they keep:
    first to those that would keep nothing, then to those that lost most by it; of equals to the
    earlier.
    """
    kept = np.floor(targets + 1e-9).astype(np.int64)
    left = max(1, int(targets.sum() + 1e-9)) - int(kept.sum())
    first = np.lexsort((-(targets - kept), kept > 0))
    first = first[(kept < most)[first]]
    kept[first[: max(0, left)]] += 1
    return np.minimum(kept, most).astype(np.int64)


def kept_per_segment(
    shares: np.ndarray, sizes: np.ndarray, places: np.ndarray, settings: AdaTPSettings
) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens of each segment are left after each event.

    Args:
        shares: ``[events, segments]`` of the segment's tokens at the start.
        sizes: ``[segments]`` tokens at the start.
        places: ``[segments]`` places in a frame.
        settings: of the request.

    Returns:
        ``[events, segments]`` tokens; ``[events]`` bool, whether the event deduplicates.
    """
    kept, dedups = [], []
    alive, distinct = sizes, np.minimum(sizes, places)
    for event, of_event in enumerate(shares):
        dedup = settings.dedup == "all" or (settings.dedup == "first" and event == 0)
        most = distinct if dedup and not settings.refill else alive
        alive = apportion(of_event * sizes, most)
        distinct = np.minimum(distinct, alive)
        kept.append(alive)
        dedups.append(dedup)
    return np.stack(kept), np.array(dedups)


def choose(
    score: torch.Tensor,
    segment: torch.Tensor,
    place: torch.Tensor | None,
    alive: torch.Tensor,
    keep: torch.Tensor,
    total: int,
) -> torch.Tensor:
    """The survivors of an event, rising; of equal scores the earlier token.

    Args:
        score: ``[n]`` of the video tokens that are alive.
        segment: ``[n]`` int64, never falling.
        place: ``[n]`` int64 place in the frame; None if the event does not deduplicate.
        alive: ``[segments]`` int64 how many of the n are in each segment.
        keep: ``[segments]`` int64 how many of them survive.
        total: the sum of ``keep``.

    Returns:
        ``[total]`` int64 indices into the n.
    """
    order = torch.argsort(score, descending=True, stable=True)
    if place is not None:
        # The best token of each place in its segment goes before all others of the segment.
        group = segment * (place.max() + 1) + place
        by_group = order[torch.argsort(group[order], stable=True)]
        repeats = torch.zeros_like(by_group, dtype=torch.bool)
        repeats[1:] = group[by_group[1:]] == group[by_group[:-1]]
        is_repeat = torch.empty_like(repeats)
        is_repeat[by_group] = repeats
        order = order[torch.argsort(is_repeat[order].to(torch.uint8), stable=True)]
    order = order[torch.argsort(segment[order], stable=True)]
    in_order = segment[order]
    rank = torch.arange(len(order), device=order.device) - (alive.cumsum(0) - alive)[in_order]
    dropped = torch.empty_like(order, dtype=torch.uint8)
    dropped[order] = (rank >= keep[in_order]).to(torch.uint8)
    return torch.argsort(dropped, stable=True)[:total]
