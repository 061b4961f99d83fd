"""Intervals of shares and of differences, and how many questions a claim takes.

Questions about one video are not independent of each other, so whole videos are drawn (a cluster
bootstrap).  A difference between two ways to run a model is taken question by question: both
answered the same ones, and what is hard for both cancels.

A resample only shows what was seen.  If all of 60 answers agree, every resample says that nothing
is lost, yet a loss of one answer in twenty would go unseen in one such run out of twenty.  So the
interval of a loss (:func:`loss`) never ends nearer than that to the estimate, and where videos are
few it is widened (:func:`widened`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
LEVEL = 0.95
NORMAL = 1.96  # standard deviations on either side that hold so much
SEED = 0


@dataclass(frozen=True)
class Interval:
    """An estimate, and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float


def bootstrap(videos: Iterable[tuple[Hashable, float, float]]) -> Interval:
    """A sum over a number, both of whole videos.

    Args:
        videos: of each its stratum, which is drawn from by itself (all the same: no strata), what
            is summed, and the number that it is of: right answers, and questions.

    Raises:
        ValueError: no videos.
    """
    videos = list(videos)
    if not videos:
        raise ValueError("no videos to draw from")
    rng = np.random.default_rng(SEED)
    strata = defaultdict(list)
    for number, (stratum, _, _) in enumerate(videos):
        strata[stratum].append(number)
    drawn = np.concatenate(
        [rng.choice(members, (RESAMPLES, len(members))) for members in strata.values()], axis=1
    )  # [resamples, videos]
    part, total = (np.array([video[i] for video in videos], float) for i in (1, 2))
    shares = part[drawn].sum(axis=1) / total[drawn].sum(axis=1)
    low, high = np.quantile(shares, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(part.sum() / total.sum()), float(low), float(high))


def unseen(questions: int) -> float:
    """The largest loss that so many questions can fail to show: none of them is lost, though each
    would be with this probability, in one run of twenty (the "rule of three", 3 / n).
    """
    return 1 - (1 - LEVEL) ** (1 / questions)


@dataclass(frozen=True)
class Loss:
    """What a setting loses, as a share of the questions.

    Attributes:
        value: the estimate; below 0 where the setting does better than dense.
        low, high: its interval, both ends at least ``unseen(questions)`` away, or at -1 and 1.
        questions, videos: what it rests on.
        drawn: half the width of the interval that many videos would have.
    """

    value: float
    low: float
    high: float
    questions: int
    videos: int
    drawn: float

    def needed(self, wanted: float) -> int | None:
        """Questions, of videos like these, that would show a loss of at most ``wanted``.

        None if no number would, because the estimate itself is no smaller.
        """
        room = wanted - self.value
        if room <= 0:
            return None
        by_chance = self.questions * (self.drawn / room) ** 2  # the width goes with 1 / sqrt(n)
        never_seen = math.log(1 - LEVEL) / math.log1p(-min(room, 0.999))
        return max(1, math.ceil(max(by_chance, never_seen)))


def loss(losses: Iterable[tuple[Hashable, float]]) -> Loss:
    """The loss over questions.

    Args:
        losses: of each question its video and what was lost: 1, 0, or -1 where something was won.

    Raises:
        ValueError: no questions.
    """
    by_video: dict[Hashable, list[float]] = defaultdict(list)
    for video, lost in losses:
        by_video[video].append(lost)
    whole = bootstrap(("all", sum(lost), len(lost)) for lost in by_video.values())
    value, videos = whole.value, len(by_video)
    single = np.concatenate([np.array(some, float) for some in by_video.values()])
    apart = NORMAL * float(single.std()) / math.sqrt(len(single))  # if videos did not matter
    wider, least = widened(videos), max(unseen(len(single)), apart)
    return Loss(
        value=value,
        low=max(-1.0, value - max(wider * (value - whole.low), least)),
        high=min(1.0, value + max(wider * (whole.high - value), least)),
        questions=len(single),
        videos=videos,
        drawn=max((whole.high - whole.low) / 2, apart),
    )


def widened(videos: int) -> float:
    """What the interval of a resample of so few videos is multiplied by.

    It knows from them alone how videos differ, as an interval by Student's t does: whose quantile,
    over the normal distribution's, is here in powers of 1 / (videos - 1).
    """
    if videos == 1:
        return 1.0  # which shows no difference; the questions' own interval counts
    free = videos - 1
    return math.sqrt(videos / free) * (1 + 1.2 / free + 2.4 / free**2)
