"""Which cubes a query keeps and which tokens run the FFN: pure functions over probabilities.

Everything here is vectorised over any leading dimensions and never waits for the GPU.  ``share``
and ``min_keep`` may differ from row to row, because a batch may mix requests with other settings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...kernels import use_triton
from ...settings import SHARE_STEPS
from .settings import SELECTIONS

NOT_THERE = -1.0  # in place of a probability: sorts behind all entries there are
TOP_P, TOP_K, UNIFORM = range(len(SELECTIONS))
BUDGET = len(SELECTIONS)  # the rule of a request with a FLOPs budget, see under_budget


def top_p(
    probs: torch.Tensor, valid: torch.Tensor, share: torch.Tensor, min_keep: torch.Tensor
) -> torch.Tensor:
    """The smallest set, in order of falling probability, whose mass reaches ``share``.

    Args:
        probs: ``[..., n]`` non-negative; the valid entries of a row sum to about 1.
        valid: ``[..., n]`` bool, the entries there are.
        share: ``[...]`` or broadcastable, in (0, 1].  At 1 every valid entry is kept.
        min_keep: ``[...]`` or broadcastable, entries kept at the least.

    Returns:
        ``[..., n]`` bool.  Ties go to the earlier entry.  (Paper: AdaS-Attn and AdaS-FFN.)
    """
    if use_triton(probs):
        from ...kernels import nucleus

        if nucleus.takes(probs):
            return nucleus.top_p(probs, valid, share, min_keep)
    there = torch.where(valid, probs, NOT_THERE)
    falling = _falling(there)
    mass = falling.clamp(min=0).cumsum(-1)
    # Rounding may let the cumulated mass reach 1 early; a share of 1 means all.
    reached = share.masked_fill(share >= 1, torch.inf).to(mass.dtype).expand(probs.shape[:-1])
    # As many as lie below the share, and the one that reaches it.
    count = torch.searchsorted(mass, reached.unsqueeze(-1).contiguous()).squeeze(-1) + 1
    return _largest(there, falling, torch.maximum(count, min_keep))


def top_k(
    probs: torch.Tensor, valid: torch.Tensor, share: torch.Tensor, min_keep: torch.Tensor
) -> torch.Tensor:
    """The ``ceil(share * n_valid)`` most probable entries of each row.  Shapes as in ``top_p``."""
    there = torch.where(valid, probs, NOT_THERE)
    return _largest(there, _falling(there), _count(valid, share, min_keep))


def uniform(valid: torch.Tensor, share: torch.Tensor, min_keep: torch.Tensor) -> torch.Tensor:
    """``ceil(share * n_valid)`` entries, evenly spread over the valid ones; the last is one."""
    count = _count(valid, share, min_keep).unsqueeze(-1)
    number = valid.sum(-1, keepdim=True).clamp(min=1)
    nth = valid.cumsum(-1)  # 1-based among the valid
    return valid & (nth * count // number > (nth - 1) * count // number)


# A sum of shares that stands for a whole number must not be rounded down to the one before it.
ROUNDING = 1e-6


@dataclass(frozen=True)
class BudgetGroups:
    """Rows that share one p each group, and how much a group may keep.

    What a row keeps counts as often as the row stands in its group.
    """

    rows: torch.Tensor  # [groups, rows] int64
    keep: np.ndarray  # [groups] entries that may be kept, per inner row (KV head); host, fraction
    keep_there: torch.Tensor  # the same on the device of ``rows``

    @classmethod
    def of(cls, rows: np.ndarray, keep: np.ndarray, device: torch.device) -> BudgetGroups:
        """From host arrays."""
        there = torch.as_tensor(keep).to(device, torch.float64)
        return cls(torch.as_tensor(rows).to(device), keep, there)


def under_budget(
    probs: torch.Tensor,
    valid: torch.Tensor,
    min_keep: torch.Tensor,
    groups: tuple[BudgetGroups, ...],
) -> torch.Tensor:
    """Top-p with, for each group of rows, the p that keeps as many entries as its budget allows.

    An entry is kept by top-p if the mass ranked before it is below p.  So p is a quantile of that
    mass over all entries of a group: rows with a flat distribution keep more than peaked ones.

    Args:
        probs: ``[rows, ..., n]``; the inner dimensions (KV heads) of a row are one group with it.
        valid: the same shape, bool, the entries there are.
        min_keep: ``[rows, ...]`` or broadcastable, entries kept at the least; they count.
        groups: disjoint rows; a group keeps less than all of its valid entries.

    Returns:
        ``[rows, ..., n]`` bool; nothing is kept in rows of no group.
    """
    falling, index = torch.where(valid, probs, -1.0).sort(dim=-1, descending=True, stable=True)
    before = falling.cumsum(-1) - falling
    rank = torch.arange(probs.shape[-1], device=probs.device)
    before = torch.where(rank < min_keep.unsqueeze(-1), -1.0, before)
    before = torch.empty_like(before).scatter_(-1, index, before)
    before = torch.where(valid, before, torch.inf)
    inner = probs[0, ..., 0].numel()
    kept = torch.zeros_like(valid)
    for group in groups:
        mass = before[group.rows]  # [groups, rows, ..., n]
        if len(group.keep) == 1:
            count = int(group.keep[0] * inner + ROUNDING)
            p = mass.flatten().kthvalue(count + 1).values[None]
        else:
            count = (group.keep_there * inner + ROUNDING).long()
            p = mass.flatten(1).sort(dim=1).values.gather(1, count[:, None]).squeeze(1)
        kept[group.rows] = (mass < p.view(-1, *[1] * (mass.ndim - 1))) | (mass < 0)
    return kept


def select(
    probs: torch.Tensor,
    valid: torch.Tensor,
    rule: torch.Tensor,
    share: torch.Tensor,
    min_keep: torch.Tensor,
    rules: tuple[int, ...] = (TOP_P, TOP_K, UNIFORM),
    groups: tuple[BudgetGroups, ...] = (),
) -> torch.Tensor:
    """Rows of different rules at once.

    Args:
        probs: ``[..., n]``, zero where not ``valid``.
        valid: ``[..., n]`` bool, the entries there are.
        rule: ``[...]`` index into ``settings.SELECTIONS``, or BUDGET.
        share, min_keep: ``[...]``, see :func:`top_p`.
        rules: the rules that occur, so that the others cost nothing.
        groups: of the rows whose rule is BUDGET, see :func:`under_budget`.

    Returns:
        ``[..., n]`` bool; at least one valid entry is kept in every row that has one.
    """
    by_rule = {
        TOP_P: lambda: top_p(probs, valid, share, min_keep),
        TOP_K: lambda: top_k(probs, valid, share, min_keep),
        UNIFORM: lambda: uniform(valid, share, min_keep),
        BUDGET: lambda: under_budget(probs, valid, min_keep, groups),
    }
    kept = by_rule[rules[0]]()
    for other in rules[1:]:
        kept = torch.where((rule == other).unsqueeze(-1), by_rule[other](), kept)
    return kept


def _falling(there: torch.Tensor) -> torch.Tensor:
    """Each row of ``there [..., n]`` sorted from the largest to the smallest, and a last entry,
    smaller than any, that stands for what comes behind all of them."""
    there = torch.nn.functional.pad(there.detach(), (0, 1), value=2 * NOT_THERE)
    if there.device.type != "cpu":
        return there.sort(dim=-1, descending=True).values
    # NumPy sorts numbers alone with vector instructions; torch takes their places along, which
    # takes ten times as long.
    there.neg_().numpy().sort(axis=-1)
    return there.neg_()


def _largest(there: torch.Tensor, falling: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The ``count [...]`` largest entries of each row, or all there are; ties go to the earlier.

    Args:
        there: ``[..., n]``, NOT_THERE where there is no entry.
        falling: ``[..., n + 1]``, see :func:`_falling`.
        count: ``[...]``.

    Returns:
        ``[..., n]`` bool.
    """
    count = count.clamp(1, there.shape[-1]).unsqueeze(-1)
    least = falling.gather(-1, count - 1).clamp_(min=0)
    kept = there >= least
    tied = falling.gather(-1, count) == least
    if there.device.type == "cpu" and not tied.any():  # reading it costs nothing there
        return kept
    above = there > least
    room = count - above.sum(-1, keepdim=True)
    ties = kept & ~above
    return torch.where(tied, above | (ties & (ties.cumsum(-1) <= room)), kept)


def _count(valid: torch.Tensor, share: torch.Tensor, min_keep: torch.Tensor) -> torch.Tensor:
    """Entries to keep per row: ``ceil(share * n)``, at least ``min_keep``, at most all."""
    number = valid.sum(-1)
    # Shares are exact thousandths: rounding first keeps 0.1 * 30 from becoming 4.
    steps = number * (share * SHARE_STEPS).round().long()
    wanted = torch.div(steps + SHARE_STEPS - 1, SHARE_STEPS, rounding_mode="floor")
    return torch.minimum(torch.maximum(wanted, min_keep.expand_as(wanted)), number)
