"""What AdaTP knows of a request: where its frames lie, what it may cost, what it has dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ...requests import Request, Video
from .flops import PromptCost
from .prune import kept_per_segment
from .relevance import relevant_segments, segment_relevance, segment_shares
from .segments import segment_frames
from .settings import AdaTPSettings


@dataclass(frozen=True)
class Look:
    """What a request's frames have to do with each other, and with its question.

    Attributes:
        similarities: of each video, ``[frames - 1]`` cosines of adjacent frames.
        relevance: ``[frames of all videos]`` cosine with the question; None if unknown.
    """

    similarities: list[np.ndarray]
    relevance: np.ndarray | None = None


@dataclass(frozen=True)
class Pruning:
    """How many of a request's video tokens go on at each of its events.

    Attributes:
        segment: ``[frames]`` the segment of each frame.
        relevant: ``[segments]`` bool.
        relevance: ``[segments]`` cosine with the question; None if unknown.
        sizes: ``[segments]`` tokens before the first event.
        kept: ``[events, segments]`` tokens after each event.
        dedups: ``[events]`` bool, whether the event deduplicates.
    """

    segment: np.ndarray
    relevant: np.ndarray
    relevance: np.ndarray | None
    sizes: np.ndarray
    kept: np.ndarray
    dedups: np.ndarray

    @cached_property
    def dropped(self) -> np.ndarray:
        """``[events + 1]`` video tokens that are gone before the first and after each event."""
        return self.sizes.sum() - np.array([self.sizes.sum(), *self.kept.sum(1)])


@dataclass
class Progress:
    """What has become of a request so far.

    Attributes:
        pruning: what its prompt lost; None if nothing.
        reason: why its prompt ran dense though its settings drop tokens; None if it did not.
    """

    pruning: Pruning | None = None
    reason: str | None = None


@dataclass(frozen=True)
class AdaTPRequest(Request):
    """One request with video.

    Attributes:
        config: its settings.
        videos: in order; together they are the prompt's video tokens.
        text_from: the first token behind its videos; what follows asks.
        cost: what its prompt costs; None if it is off.
        wants_all: whether the answer needs the last layer's output of every token.
        question: what is asked about the videos; empty if that is not known, or if nothing stands
            for it beside the frames.
        progress: changes as it runs.
    """

    config: AdaTPSettings
    videos: tuple[Video, ...] = ()
    text_from: int = 0
    cost: PromptCost | None = None
    wants_all: bool = False
    question: str = ""
    progress: Progress = field(default_factory=Progress, compare=False)

    @cached_property
    def asks(self) -> slice:
        """The text tokens of the prompt whose attention is the score: those after its videos."""
        tokens = len(self.is_video)
        last_alone = self.config.queries == "last"
        return slice(max(self.text_from, tokens - 1) if last_alone else self.text_from, tokens)

    @property
    def runs_dense(self) -> str | None:
        """Why its prompt runs dense though its settings drop tokens; None if it does not."""
        if self.asks.start == self.asks.stop:
            return "no_text"
        return "prompt_logprobs" if self.wants_all else None

    @cached_property
    def frame_places(self) -> np.ndarray:
        """``[frames]`` how many tokens each frame has."""
        frames, rows, columns = np.array([video.grid for video in self.videos]).T
        return np.repeat(rows * columns, frames)

    @cached_property
    def token_place(self) -> np.ndarray:
        """``[video tokens]`` the place of each in its frame."""
        return np.concatenate([np.arange(places) for places in self.frame_places])

    def start(self, tokens: int, look: Callable[[AdaTPRequest], Look]) -> None:
        """The prompt runs, for the first time or again: settle what it loses, or why nothing.

        Args:
            tokens: of the request that the step holds.
            look: compares the request's frames.
        """
        self.progress.pruning = None
        self.progress.reason = "one_step" if tokens < len(self.is_video) else self.runs_dense
        if self.progress.reason is None:
            self.progress.pruning = self.prune(look(self))

    def prune(self, seen: Look) -> Pruning:
        """How many tokens are dropped, before the layers run."""
        config = self.config
        segment = segment_frames(seen.similarities, config.tau_s)
        relevant = relevant_segments(seen.relevance, segment, config.tau_t)
        sizes = np.bincount(segment, self.frame_places).astype(np.int64)
        shares = segment_shares(
            self.cost.shares(config),
            sizes,
            relevant,
            alpha_boost=config.alpha_boost,
            gamma_cap=config.gamma_cap,
            keep_budget=config.keep_budget,
        )
        places = self.frame_places[np.flatnonzero(np.diff(segment, prepend=-1))]
        kept, dedups = kept_per_segment(shares, sizes, places, config)
        relevance = None
        if seen.relevance is not None:
            relevance = segment_relevance(seen.relevance, segment)
        return Pruning(segment, relevant, relevance, sizes, kept, dedups)

    def dropping(self) -> dict[str, Any] | None:
        """What its prompt loses, for its trace (``StepPlan.dropping``)."""
        pruning = self.progress.pruning
        if pruning is None:
            return None
        first = np.cumsum([0] + [video.grid[0] for video in self.videos])  # frame of each video
        starts = np.flatnonzero(np.diff(pruning.segment, prepend=-1))
        ends = [*starts[1:], len(pruning.segment)]
        segments = []
        for nth, (start, end) in enumerate(zip(starts, ends, strict=True)):
            video = int(np.searchsorted(first, start, side="right")) - 1
            relevance = None if pruning.relevance is None else float(pruning.relevance[nth])
            segments.append(
                {
                    "video": video,
                    "frames": [int(start - first[video]), int(end - first[video])],
                    "tokens": int(pruning.sizes[nth]),
                    "kept": pruning.kept[:, nth].tolist(),
                    "relevant": bool(pruning.relevant[nth]),
                    "relevance": relevance,
                }
            )
        return {"layers": list(self.cost.events), "segments": segments}
