"""The twin's choices, by Python's ``sorted``: Top-p, Top-k, uniform, and p under a budget.

They share no line with choose.py, which must agree with them.  Every choice comes with its
*margin*: how much a probability or a cumulated mass would have to change before something else is
chosen; about 1e-6 or less is a tie that float32 rounding may break either way.
"""

from __future__ import annotations

import math

import torch

from .settings import AdaSparkConfig


def choose(probs: torch.Tensor, config: AdaSparkConfig) -> tuple[torch.Tensor, float]:
    """``config``'s rule on ``probs [cubes]``: ``[cubes]`` bool and the choice's margin."""
    n = len(probs)
    if config.selection == "top_p":
        return top_p(probs, config.p_attn, config.min_cubes)
    # The ceiling is taken in whole thousandths: 0.1 * 30 is 3, not 3.0000000000000004.
    count = -(-n * round(config.keep * 1000) // 1000)
    count = min(max(count, config.min_cubes), n)
    if config.selection == "top_k":
        ranked = falling(probs)
        return _mask(n, ranked[:count]), _gap(probs, ranked, count)
    evenly = [-(-m * n // count) - 1 for m in range(1, count + 1)]  # the last cube is always one
    return _mask(n, evenly), math.inf


def top_p(probs: torch.Tensor, p: float, min_keep: int) -> tuple[torch.Tensor, float]:
    """The smallest prefix of the falling ``probs [n]`` whose mass reaches ``p``, and its margin."""
    if p >= 1:
        return torch.ones(len(probs), dtype=torch.bool), math.inf
    ranked = falling(probs)
    mass, count, nearest = 0.0, 0, math.inf
    while count < len(ranked) and (mass < p or count < min_keep):
        mass += float(probs[ranked[count]])
        nearest = min(nearest, abs(mass - p))
        count += 1
    return _mask(len(probs), ranked[:count]), min(nearest, _gap(probs, ranked, count))


def choose_under_budget(
    rows: list[torch.Tensor],
    share: float,
    min_keep: int,
    owed: float = 0.0,
    weights: list[int] | None = None,
) -> tuple[list[torch.Tensor], float]:
    """Top-p with the one p for all ``rows`` that keeps as many entries as they may have together.

    A row may have ``share`` of its entries, and never less than ``min_keep`` of them.

    Args:
        rows: probabilities ``[entries]`` of each row; they need not be equally many.
        share: below 1.
        min_keep: entries kept in each row at the least.
        owed: entries that others had above their share, and that these rows save, as far as
            ``min_keep`` lets them.
        weights: how many entries each entry of a row counts as; None for one.

    Returns:
        ``[entries]`` bool for each row, and the margin.
    """
    weights = weights or [1] * len(rows)
    before = []  # (mass ranked before an entry, row, entry)
    for row, probs in enumerate(rows):
        mass = 0.0
        for rank, entry in enumerate(falling(probs)):
            before.append((mass if rank >= min_keep else -1.0, row, entry))
            mass += float(probs[entry])
    before.sort()
    floors = [min(min_keep, len(row)) for row in rows]
    least = sum(w * floor for w, floor in zip(weights, floors, strict=True))
    sizes = zip(weights, rows, floors, strict=True)
    keep = sum(w * max(share * len(row), floor) for w, row, floor in sizes) - owed
    count = int(max(keep, least) + 1e-6)
    p, spent = math.inf, 0
    for mass, row, _ in before:
        spent += weights[row]
        if spent > count:
            p = mass
            break
    kept = [torch.zeros(len(probs), dtype=torch.bool) for probs in rows]
    for mass, row, entry in before:
        if mass < p or mass < 0:
            kept[row][entry] = True
    others = [mass for mass, _, _ in before if mass >= 0]
    below = [mass for mass in others if mass < p]
    margin = p - max(below) if below and p >= 0 else math.inf
    if len(set(weights)) > 1:  # then the order of the two above matters, too
        margin = min([margin, *(mass - p for mass in others if mass > p)])
    if sum(mass == p for mass in others) > 1:
        margin = 0.0  # a tie at p: rounding may put any of them below it
    gaps = [_gap(probs, falling(probs), int(k.sum())) for probs, k in zip(rows, kept, strict=True)]
    return kept, min([margin, *gaps])


def falling(probs: torch.Tensor) -> list[int]:
    """Indices by falling probability; ties go to the earlier one."""
    values = probs.tolist()
    return sorted(range(len(values)), key=lambda j: -values[j])


def _gap(probs: torch.Tensor, ranked: list[int], count: int) -> float:
    """How far the last entry kept lies above the first one left out."""
    if count == len(ranked):
        return math.inf
    return float(probs[ranked[count - 1]] - probs[ranked[count]])


def _mask(n: int, indices: list[int]) -> torch.Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    mask[indices] = True
    return mask
