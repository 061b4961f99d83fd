"""Text relevance: which segments the question is about, and how much more they keep.

That text picks segments, and that these keep more, is the paper's second step.  How relevance is
measured and what the boost does to the other segments' shares is this project's reading
(docs/adatp.md).
"""

from __future__ import annotations

import numpy as np


def relevant_segments(
    relevance: np.ndarray | None, segment: np.ndarray, tau_t: float
) -> np.ndarray:
    """``[segments]`` bool: those whose most relevant frame is among the most relevant ones.

    Args:
        relevance: ``[frames]`` cosine of each frame with the question; None where nobody knows,
            and then no segment is relevant.
        segment: ``[frames]`` the segment of each frame.
        tau_t: from which relevance on, where 0 is that of the least relevant segment and 1 that of
            the most relevant one.
    """
    number = int(segment[-1]) + 1
    if relevance is None or number == 1:
        return np.zeros(number, bool)
    best = segment_relevance(relevance, segment)
    spread = best.max() - best.min()
    if spread <= 0:
        return np.zeros(number, bool)
    return (best - best.min()) / spread >= tau_t


def segment_relevance(relevance: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """``[segments]`` the relevance of each segment's most relevant frame."""
    return np.maximum.reduceat(relevance, np.flatnonzero(np.diff(segment, prepend=-1)))


def segment_shares(
    shares: np.ndarray,
    sizes: np.ndarray,
    relevant: np.ndarray,
    *,
    alpha_boost: float,
    gamma_cap: float,
    keep_budget: bool,
) -> np.ndarray:
    """What each segment may keep after each event, as a share of its own tokens.

    Args:
        shares: ``[events]`` of all video tokens, cumulative, not rising.
        sizes: ``[segments]`` tokens at the start.
        relevant: ``[segments]`` bool.
        alpha_boost: relevant segments keep so many times the share.
        gamma_cap: but not more than this.
        keep_budget: whether the others keep less in return, so that the sum stays.

    Returns:
        ``[events, segments]``, not rising from event to event.
    """
    result = np.repeat(shares[:, None], len(sizes), axis=1)
    boosted, others = sizes[relevant].sum(), sizes[~relevant].sum()
    if not boosted or not others or alpha_boost == 1:
        return result
    more = np.maximum(shares, np.minimum(gamma_cap, alpha_boost * shares))
    if keep_budget:
        total = shares * (boosted + others)
        more = np.minimum(more, total / boosted)
        result[:, ~relevant] = np.maximum((total - more * boosted) / others, 0)[:, None]
    result[:, relevant] = more[:, None]
    return np.minimum.accumulate(result, axis=0)
