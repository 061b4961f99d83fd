"""From a FLOPs budget to shares: how many cubes and FFN tokens a request may keep.

A request's dense FLOPs split into a part that always runs (QKV and output projections, text, cubes
that a mixed block or the first layers keep dense) and a part that may be left out.  The budget
minus the first, over the second, is the share to keep, the same for attention and FFN.  Which cubes
and tokens that is, is found in each layer: selection.under_budget finds the p that keeps so many.

Counted is the prompt; a generated token's FLOPs fall to about the same share of its attention.  Not
foreseen are cubes that a chunk edge cuts, which run dense: one per chunk.  Pure NumPy; no vLLM.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .accounting import ModelShape
from .config import SHARE_STEPS

# Below this share of what may be left out, choosing has no room: an FFN cube keeps one token of 64.
LEAST_SHARE = 0.02


@dataclass(frozen=True)
class PromptCost:
    """FLOPs of a prompt in all layers of the language model."""

    dense: float  # all of it, run densely
    optional: float  # what selection may leave out
    selection: float  # scoring cubes, if anything is left out
    compensation: float  # FFN evaluations for skipped tokens, if any skips

    @property
    def least(self) -> float:
        """The smallest budget that can be met, in (0, 1]."""
        return min(1.0, (self._always + LEAST_SHARE * self.optional) / self.dense)

    def share(self, flops: float) -> float:
        """Share of the optional part that a budget of ``flops * dense`` keeps, in (0, 1].

        In thousandths, rounded down, as tags carry it.  A budget that cannot be met keeps
        ``flops`` of the optional part: less would save little and cost the answer much.
        """
        if not self.optional or flops >= 1:
            return 1.0
        if flops < self.least:
            return flops
        room = flops * self.dense - self._always
        return min(math.floor(room / self.optional * SHARE_STEPS), SHARE_STEPS) / SHARE_STEPS

    @property
    def _always(self) -> float:
        return self.dense - self.optional + self.selection + self.compensation


def prompt_cost(
    shape: ModelShape,
    layers: int,
    tokens: int,
    videos: list[tuple[int, int]],
    *,
    block_size: int,
    dense_below: int,
    dense_layers: int,
    sparse_text: bool,
    compensation: str,
    cube_queries: int,
) -> PromptCost:
    """Count a prompt as the plan will cut it (attention/planner.py).

    Args:
        shape: sizes of a layer.
        layers: layers of the language model, over all pipeline stages.
        tokens: of the prompt.
        videos: (offset, tokens) of each video in it.
        block_size: tokens in a KV block.
        dense_below, dense_layers, sparse_text, compensation, cube_queries: as in AdaSparkConfig.
    """
    is_video = np.zeros(tokens, bool)
    for offset, length in videos:
        is_video[offset : offset + length] = True
    whole = tokens // block_size
    is_cube = is_video[: whole * block_size].reshape(whole, block_size).all(axis=1)
    blocks = -(-tokens // block_size)
    is_cube = np.append(is_cube, np.zeros(blocks - whole, bool))
    before = np.cumsum(is_cube) - is_cube  # [blocks] cubes before each block
    block = np.arange(tokens) // block_size
    chooses = is_cube[block] | (~is_video & sparse_text)
    chooses &= before[block] >= max(dense_below, 1)
    seen = before[block] * chooses  # [tokens] cubes that a token may leave out
    asked = np.where(is_video, min(cube_queries, block_size) / block_size, 1.0)

    pairs = tokens * (tokens + 1) / 2
    dense = (
        tokens * (shape.qkvo_flops_per_token + shape.ffn_flops_per_token)
        + pairs * shape.attention_flops_per_pair
    )
    optional = (
        float(seen.sum()) * block_size * shape.attention_flops_per_pair
        + float(is_cube.sum()) * block_size * shape.ffn_flops_per_token
    )
    centroids = float(is_cube.sum()) if compensation == "centroid" else 0.0
    sparse_layers = max(0, layers - dense_layers)
    return PromptCost(
        dense=layers * dense,
        optional=sparse_layers * optional,
        selection=sparse_layers * float((seen * asked).sum()) * shape.score_flops_per_pair,
        compensation=sparse_layers * centroids * shape.ffn_flops_per_token,
    )
