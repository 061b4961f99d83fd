"""One prompt while its layers run: which video tokens are alive, their scores, the next survivors.

Everything that says *how many* is on the host; what says *which* is on the device and stays there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from .prune import choose
from .request import AdaTPRequest, Pruning
from .score import text_scores


class PromptState:
    """A row of the step whose prompt loses video tokens in this step.

    ``alive``: ``[alive]`` int64, which of its video tokens are left.

    Args:
        row: in the step.
        request: whose prompt it is.
        pruning: how many tokens go on at each event.
        device: where the layers run.
    """

    def __init__(
        self, row: int, request: AdaTPRequest, pruning: Pruning, device: torch.device
    ) -> None:
        self.row, self.request, self.pruning = row, request, pruning
        # Where it loses tokens; at the others it has nothing to score.
        lost = np.diff(pruning.dropped)
        self._events = {layer: nth for nth, layer in enumerate(request.cost.events) if lost[nth]}
        of_frame = np.repeat(pruning.segment, request.frame_places)
        video = np.flatnonzero(request.is_video)

        def to(array: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(array.astype(np.int64)).to(device)

        self._segment, self._place = to(of_frame), to(request.token_place)  # [alive video tokens]
        self.alive = torch.arange(len(video), device=device)  # which video tokens are left
        self._text_before = to(video - np.arange(len(video)))  # [alive] text tokens before each
        self._counts = to(np.vstack([pruning.sizes, pruning.kept]))  # [events + 1, segments]
        self._score: torch.Tensor | None = None

    @property
    def video_at(self) -> torch.Tensor:
        """``[alive]`` number of each video token in its request, at the depth reached so far."""
        return self._text_before + torch.arange(len(self._segment), device=self._segment.device)

    def asks(self, layer: int) -> slice:
        """The asking tokens of the row in a layer that an event of this request follows."""
        gone = int(self.pruning.dropped[self._events[layer]])
        return slice(self.request.asks.start - gone, self.request.asks.stop - gone)

    def scored_pairs(self, layer: int) -> int:
        """(asking token, key) pairs that an event after this layer needs."""
        if layer not in self._events:
            return 0
        asks = self.asks(layer)
        return (asks.stop - asks.start) * asks.stop

    def observe(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        scale: float,
        agree: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Score the alive video tokens, if an event of this request follows the layer.

        Args:
            layer: counted from 0.
            query: ``[n, heads, d]`` of this row, after RoPE.
            key: ``[n, kv_heads, d]`` likewise.
            scale: of the logits.
            agree: makes the mean over this rank's heads one over all heads of the model.
        """
        if layer not in self._events:
            return
        score = text_scores(query, key, self.asks(layer), self.video_at, scale)
        self._score = agree(score)

    def survivors(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Let an event happen; the layer has been observed.

        Returns:
            ``[alive]`` int64 numbers of the video tokens in their request before the event, and
            ``[survivors]`` int64 those of them that go on.
        """
        before = self.video_at
        if layer not in self._events:
            return before, before
        event = self._events[layer]
        chosen = choose(
            self._score,
            self._segment,
            self._place if self.pruning.dedups[event] else None,
            self._counts[event],
            self._counts[event + 1],
            int(self.pruning.kept[event].sum()),
        )
        self._segment, self._place = self._segment[chosen], self._place[chosen]
        self._text_before, self.alive = self._text_before[chosen], self.alive[chosen]
        self._score = None
        return before, before[chosen]
