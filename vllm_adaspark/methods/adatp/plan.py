"""The plan of a step in which some layers see fewer tokens: made once, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from ...paged.depths import Depths, depths_of
from ...paged.plan import StepPlan, Told
from ...paged.state import StepRows
from .request import AdaTPRequest
from .state import PromptState


@dataclass
class AdaTPPlan(StepPlan):
    """A step with requests whose video tokens are dropped, or that ran dense for a reason.

    Attributes:
        rows: of the step.
        prompts: those that lose tokens in this step.
        scored: ``[events, rows]`` (asking token, key) pairs that were scored at each event.
        alive: ``[depths, rows]`` video tokens of the step that are left at each depth.
    """

    rows: StepRows | None = None
    prompts: Sequence[PromptState] = ()
    scored: np.ndarray | None = None
    alive: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        rows: StepRows,
        requests: Sequence[AdaTPRequest | None],
        starting: np.ndarray,
        block_size: int,
        depths: Depths | None,
        prompts: Sequence[PromptState],
    ) -> Self:
        """A plan, with what the accounts will want to know."""
        number = len(requests)
        video = np.array([_video_tokens(rows, requests, row) for row in range(number)])
        plan = cls(
            attention=None,
            ffn=None,
            summary_writes=None,
            video_tokens=video,
            cubes_seen=np.zeros(number),
            block_size=block_size,
            fallback_tokens=_dense_tokens(rows, requests, starting),
            depths=depths,
            rows=replace(rows, block_table=None),
            prompts=prompts,
        )
        if depths is not None:
            lost = rows.query_lens - np.stack([each.query_lens for each in depths.rows])
            plan.alive = video - lost
            plan.scored = np.zeros((len(depths.events), number))
            for prompt in prompts:
                for nth, layer in enumerate(depths.events):
                    plan.scored[nth, prompt.row] = prompt.scored_pairs(layer)
        return plan

    def dropping(self, row: int) -> dict[str, Any] | None:
        """See StepPlan."""
        return next((p.request.dropping() for p in self.prompts if p.row == row), None)

    def host_part(self) -> Self:
        """See StepPlan."""
        return replace(super().host_part(), prompts=())

    def tell(self, shape: Any, layers: range) -> Told | None:
        """What each layer executed: its projections, attention and FFN at the layer's lengths."""
        depths = self.depths
        if depths is None:
            return None
        of_layer = [depths.of(layer) for layer in layers]
        tokens = np.stack([depths.rows[depth].query_lens for depth in of_layer])
        context = np.stack([depths.rows[depth].seq_lens for depth in of_layer])
        pairs = tokens * (context - tokens) + tokens * (tokens + 1) / 2
        scored = np.zeros(tokens.shape)
        for nth, layer in enumerate(depths.events):
            if layer in layers:
                scored[layers.index(layer)] = self.scored[nth]
        flops = {
            "qkvo": tokens * float(shape.qkvo_flops_per_token),
            "attention": pairs * shape.attention_flops_per_pair,
            "selection": scored * shape.attention_flops_per_pair / 2,
            "ffn": tokens * float(shape.ffn_flops_per_token),
        }
        return Told(
            flops=flops,
            choices=(self.scored > 0).sum(0),
            attended=np.zeros(tokens.shape),
            sums={"alive": self.alive[of_layer]},
        )


def _dense_tokens(
    rows: StepRows, requests: Sequence[AdaTPRequest | None], starting: np.ndarray
) -> dict[str, np.ndarray]:
    """By reason, ``[rows]`` tokens of prompts that start and run dense though they should not."""
    tokens: dict[str, np.ndarray] = {}
    for row in np.flatnonzero(starting):
        reason = requests[row].progress.reason
        if reason is not None:
            of_reason = tokens.setdefault(reason, np.zeros(len(starting), np.int64))
            of_reason[row] = rows.query_lens[row]
    return tokens


def _video_tokens(rows: StepRows, requests: Sequence[AdaTPRequest | None], row: int) -> int:
    """Video tokens of one row of the step."""
    request = requests[row]
    if request is None:
        return 0
    first = int(rows.computed[row])
    return int(request.is_video[first : first + int(rows.query_lens[row])].sum())


def dropped_after(request: AdaTPRequest | None, events: Sequence[int]) -> np.ndarray:
    """``[events]`` tokens that a request's prompt has lost after each of these layers."""
    if request is None or request.progress.pruning is None:
        return np.zeros(len(events), np.int64)
    passed = np.searchsorted(request.cost.events, events, side="right")
    return request.progress.pruning.dropped[passed]


def make_depths(
    rows: StepRows,
    requests: Sequence[AdaTPRequest | None],
    starting: np.ndarray,
    block_size: int,
) -> Depths | None:
    """The depths of a step; None if no request of it has lost a token or loses one.

    Args:
        rows: the step's requests.
        requests: ``[rows]``, each with what its prompt loses or has lost.
        starting: ``[rows]`` bool, whose prompt is in this step.
        block_size: tokens in a KV block.
    """
    layers = {
        layer
        for request in requests
        if request is not None and request.progress.pruning is not None
        for layer, dropped in zip(
            request.cost.events, np.diff(request.progress.pruning.dropped), strict=True
        )
        if dropped
    }
    if not layers:
        return None
    events = sorted(layers)
    dropped = np.stack([dropped_after(request, events) for request in requests])
    here = dropped * starting[:, None]
    return depths_of(rows, events, dropped - here, here, block_size)
