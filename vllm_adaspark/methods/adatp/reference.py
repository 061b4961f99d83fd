"""The slow twin: AdaTP's rules for one request in plain loops, which tests trust by reading.

Written apart from the fast path: it shares nothing with it but the settings and the cumulative
shares of the schedule.
"""

from __future__ import annotations

import math

import torch

from .settings import AdaTPSettings


def segments(embeddings: list[torch.Tensor], tau_s: float) -> list[int]:
    """The segment of each frame, from ``[frames, d]`` embeddings of each video."""
    result, number = [], -1
    for video in embeddings:
        for index, frame in enumerate(video):
            same = False
            if index:
                other = video[index - 1]
                same = float(frame @ other / (frame.norm() * other.norm())) >= tau_s
            if not same:
                number += 1
            result.append(number)
    return result


def relevant(
    frames: torch.Tensor, text: torch.Tensor, segment: list[int], tau_t: float
) -> list[bool]:
    """Which segments a text is about; ``frames [frames, d]``, ``text [d]``."""
    best = [-math.inf] * (segment[-1] + 1)
    for frame, s in zip(frames, segment, strict=True):
        best[s] = max(best[s], float(frame @ text / (frame.norm() * text.norm())))
    low, high = min(best), max(best)
    return [high > low and (each - low) / (high - low) >= tau_t for each in best]


def boosted(
    share: float, sizes: list[int], about: list[bool], settings: AdaTPSettings
) -> list[float]:
    """The share of each segment after an event that leaves ``share`` of all video tokens."""
    mine = sum(size for size, yes in zip(sizes, about, strict=True) if yes)
    others = sum(sizes) - mine
    if not mine or not others:
        return [share] * len(sizes)
    more, less = max(share, min(settings.gamma_cap, settings.alpha_boost * share)), share
    if settings.keep_budget:
        more = min(more, share * (mine + others) / mine)
        less = (share * (mine + others) - more * mine) / others
    return [more if yes else less for yes in about]


def quotas(targets: list[float], there: list[int] | None = None) -> list[int]:
    """Whole tokens for each segment; together as many as the targets' sum, rounded down.

    What rounding down leaves goes to segments that have more tokens ``there`` than they keep.
    """
    kept = [math.floor(target + 1e-9) for target in targets]
    left = max(1, math.floor(sum(targets) + 1e-9)) - sum(kept)
    empty = sorted((i for i, k in enumerate(kept) if not k), key=lambda i: -targets[i])
    others = sorted((i for i, k in enumerate(kept) if k), key=lambda i: kept[i] - targets[i])
    more = [i for i in [*empty, *others] if there is None or there[i] > kept[i]]
    for index in more[: max(0, left)]:
        kept[index] += 1
    return kept


def survivors(
    score: list[float],
    alive: list[int],
    segment: list[int],
    place: list[int],
    share: list[float],
    first: bool,
    settings: AdaTPSettings,
) -> list[int]:
    """The video tokens that an event leaves, rising.

    Args:
        score: of each alive token.
        alive: the alive tokens, as indices into ``segment`` and ``place``.
        segment: of each video token of the prompt.
        place: in its frame, of each video token of the prompt.
        share: of each segment's original tokens that may stay.
        first: whether this is the first event.
        settings: the request's.
    """
    number = max(segment) + 1
    by_segment = []
    for s in range(number):
        ranked = sorted(
            (index for index, token in enumerate(alive) if segment[token] == s),
            key=lambda index: (-score[index], index),
        )
        if settings.dedup == "all" or (settings.dedup == "first" and first):
            seen, best, repeats = set(), [], []
            for index in ranked:
                (repeats if place[alive[index]] in seen else best).append(index)
                seen.add(place[alive[index]])
            ranked = [*best, *repeats] if settings.refill else best
        by_segment.append([alive[index] for index in ranked])
    targets = [share[s] * segment.count(s) for s in range(number)]
    quota = quotas(targets, [len(ranked) for ranked in by_segment])
    return sorted(token for s, ranked in enumerate(by_segment) for token in ranked[: quota[s]])
