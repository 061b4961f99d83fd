"""From a FLOPs budget to a share: how many cubes and FFN tokens a request may keep.

A prompt's dense FLOPs split into a part that always runs (QKV and output projections, text, cubes
that a mixed block or the first layers keep dense) and a part that may be left out.  A budget says
how much both may cost together.  From it follows one *share*, the same for attention and FFN: a
query tile with ``c`` preceding cubes may keep ``max(share * c, min(min_cubes, c))`` of them, and a
cube's FFN runs that share of its tokens, at least one.  *Which* cubes and tokens that are is found
in each layer: choose.under_budget finds the p that keeps so many of them in all tiles together.

Where tokens are dropped before the language model (``prune``), the dense FLOPs are those of the
whole prompt, so a budget says what both may cost: what dropping saves need not be saved again.

The share follows from the request's own prompt, as if no token of it were cached, so it is the same
whatever the prefix cache holds.  Counted is the prompt: generated tokens, whose projections always
run, come on top.  Pure NumPy; no vLLM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ...accounts.flops import Forecast, ModelShape
from ...paged.plan import MAX_TEXT_TILES
from ...settings import SHARE_STEPS
from .request import choosing_text, joins_before
from .settings import AdaSparkConfig

# Below this share of what may be left out, choosing has no room: an FFN cube keeps one token of 64.
LEAST_SHARE = 0.02
BISECTIONS = 40  # halvings of an interval below 1: to 1e-12


@dataclass(frozen=True)
class PromptCost:
    """FLOPs of a prompt in all layers of the language model.

    The query tiles that may leave cubes out are grouped by their block: those of group ``g`` have
    ``cubes[g]`` cubes before them and keep ``at_least[g]`` whatever the budget.
    """

    whole: float  # with the tokens that were dropped, run densely: what a budget is a share of
    dense: float  # what is left of the prompt, run densely
    cubes: np.ndarray  # [groups]
    at_least: np.ndarray  # [groups]
    flops_per_cube: np.ndarray  # [groups] what all queries of a group spend on one cube
    scores: float  # what choosing cubes costs
    ffn: float  # the FFN of all tokens of cubes
    ffn_at_least: float  # the share of it that runs in any case: one token of each cube
    centroids: float  # FFN evaluations for tokens that skip

    @property
    def optional(self) -> float:
        """What attention and FFN could leave out, were there no floors."""
        return float((self.cubes * self.flops_per_cube).sum()) + self.ffn

    def spent(self, attention_share: float, ffn_share: float) -> float:
        """FLOPs where so much of the cubes and FFN tokens is kept, or as much as must be."""
        total = self.dense
        if attention_share < 1:
            kept = np.maximum(attention_share * self.cubes, self.at_least)
            total += self.scores - float(((self.cubes - kept) * self.flops_per_cube).sum())
        if ffn_share < 1:
            total += self.centroids - (1 - max(ffn_share, self.ffn_at_least)) * self.ffn
        return total

    @property
    def least(self) -> float:
        """The smallest budget that can be kept, in (0, 1]."""
        return min(1.0, self.spent(LEAST_SHARE, LEAST_SHARE) / self.whole)

    def share(self, flops: float) -> float:
        """The share that a budget of ``flops * whole`` leaves, in (0, 1], in whole thousandths.

        The share is 1 for a budget of 1, for one that dropping tokens keeps alone, and where
        nothing can be left out.  A budget that cannot be kept gets ``flops`` itself as the share:
        less would save little and cost the answer much.
        """
        if flops >= 1 or not self.optional:
            return 1.0
        if flops < self.least:
            return flops
        low, high = LEAST_SHARE, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if self.spent(middle, middle) <= flops * self.whole:
                low = middle
            else:
                high = middle
        return math.floor(low * SHARE_STEPS + 1e-6) / SHARE_STEPS


def prompt_cost(
    shape: ModelShape,
    layers: int,
    is_video: np.ndarray,
    config: AdaSparkConfig,
    dropped: int = 0,
) -> PromptCost:
    """Count a prompt as the plan will cut it (planner.py).

    Args:
        shape: sizes of a layer.
        layers: layers of the language model, over all pipeline stages.
        is_video: ``[tokens]`` bool, of the prompt.
        config: the request's settings.
        dropped: tokens of its videos that are not in the prompt.
    """
    tokens, size = len(is_video), config.cube_volume
    whole = tokens // size
    is_cube = is_video[: whole * size].reshape(whole, size).all(axis=1)
    is_cube = np.append(is_cube, np.zeros(-(-tokens // size) - whole, bool))  # [blocks]
    before = np.cumsum(is_cube) - is_cube  # [blocks] cubes before each block
    chooses = before >= max(config.dense_below, 1)

    text = choosing_text(is_video, config)
    if config.text_queries == "dense" or text.sum() > MAX_TEXT_TILES:
        text[:] = 0
    joins = joins_before(is_cube, config)
    video_blocks = np.flatnonzero(is_cube & chooses & ~joins)  # that begin a tile
    of_tile = 1 + np.append(joins, False)[video_blocks + 1]  # cubes
    text_blocks = np.flatnonzero(text)
    block = np.concatenate([video_blocks, text_blocks])  # [groups]
    text = text[text_blocks]
    queries = np.concatenate([of_tile * size, text])
    scored = np.concatenate([of_tile * min(config.cube_queries, size), text])
    scored *= config.selection != "uniform"  # which looks at no score

    number = int(is_cube.sum())
    sparse = max(0, layers - config.dense_layers)
    of_a_cube = sparse * shape.ffn_flops_per_token * (config.compensation == "centroid")
    return PromptCost(
        whole=layers * shape.layer_flops(tokens + dropped),
        dense=layers * shape.layer_flops(tokens),
        cubes=before[block],
        at_least=np.minimum(before[block], config.min_cubes),
        flops_per_cube=sparse * size * shape.attention_flops_per_pair * queries,
        scores=sparse * float((before[block] * scored).sum()) * shape.score_flops_per_pair,
        ffn=sparse * number * size * float(shape.ffn_flops_per_token),
        ffn_at_least=1 / size,
        centroids=float(number * of_a_cube),
    )


def forecast(
    config: AdaSparkConfig, shape: ModelShape, layers: int, is_video: np.ndarray, dropped: int
) -> Forecast:
    """See ``Settings.forecast``.

    What is spent depends on the video, so without a budget it is an estimate that takes a density
    of p: attention keeps ``p_attn`` of the preceding cubes, the FFN ``p_ffn`` of the tokens.  Where
    attention is concentrated, fewer cubes hold that mass.
    """
    cost = prompt_cost(shape, layers, is_video, config, dropped)
    told = Forecast(cost.whole, cost.dense, cost.least)
    if not config.enabled:
        return told
    if config.flops is not None:
        share = cost.share(config.flops)
        return replace(told, spent=cost.spent(share, share), note=told.of_budget(config.flops))
    share, note = (
        (config.p_attn, f": an estimate that takes a density of p, {config.p_attn:g} and ")
        if config.selection == "top_p"
        else (config.keep, f": cubes {config.keep:g}, an estimate for the FFN of p_ffn, ")
    )
    return replace(told, spent=cost.spent(share, config.p_ffn), note=f"{note}{config.p_ffn:g}")
