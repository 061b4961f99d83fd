"""Shares of right answers with bootstrap intervals over videos.

Questions about one video are not independent, so whole videos are drawn.  Lengths and haystacks are
fixed by the grid, so each is drawn from by itself.  A difference is taken video by video: the
contenders answered the same questions, and what is hard for both cancels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from vllm_adaspark.tune.intervals import Interval, bootstrap

Row = dict[str, Any]


def accuracy(rows: Iterable[Row]) -> Interval:
    """Share of right answers.

    Raises:
        ValueError: no rows.
    """
    by_video = _by_video(rows)
    if not by_video:
        raise ValueError("no rows to average")
    return bootstrap([(stratum, *counts) for (stratum, _), counts in sorted(by_video.items())])


def difference(rows: Iterable[Row], reference: Iterable[Row]) -> Interval | None:
    """Share of right answers minus the reference's, over the videos that both answered.

    None if there are none.
    """
    mine, theirs = _by_video(rows), _by_video(reference)
    both = [
        (key[0], mine[key][0] - theirs[key][0], mine[key][1])
        for key in sorted(mine.keys() & theirs.keys())
    ]
    return bootstrap(both) if both else None


def _by_video(rows: Iterable[Row]) -> dict[tuple, tuple[int, int]]:
    """(right answers, questions) by ((tokens, haystack), video)."""
    counts: dict[tuple, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        count = counts[(row["tokens"], row["haystack"]), row["video"]]
        count[0] += row["correct"]
        count[1] += row["total"]
    return {key: (right, total) for key, (right, total) in counts.items()}
