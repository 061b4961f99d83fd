"""What a request cost and what it would have cost dense: densities and FLOPs, per layer and in all.

Counts come from the plan of each step and the few numbers every layer leaves on it; FLOPs follow
from counts and the model's shape.  A multiply-add is two FLOPs.  Counted are the language model's
layers: QKV and output projections, attention (QK and PV), cube scores ("selection") and FFN.  Not
counted, in either column: vision tower, norms, RoPE, LM head.  Pure NumPy; no vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .attention.plan import StepPlan
from .attention.state import StepRows

PER_LAYER = ("pairs", "scored", "cubes_attended", "ffn_skipped")  # counts kept for each layer


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one layer of the language model, over all tensor-parallel ranks."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int

    @property
    def qkvo_flops_per_token(self) -> int:
        """QKV and output projections of one layer."""
        qkv = self.hidden * (self.heads + 2 * self.kv_heads) * self.head_size
        return 2 * (qkv + self.heads * self.head_size * self.hidden)

    @property
    def attention_flops_per_pair(self) -> int:
        """QK and PV of one (query token, key token) pair in one layer, all heads."""
        return 4 * self.heads * self.head_size

    @property
    def score_flops_per_pair(self) -> int:
        """The score of one (query token, cube) pair in one layer, all heads."""
        return 2 * self.heads * self.head_size

    @property
    def ffn_flops_per_token(self) -> int:
        """Gate, up and down projections of one layer."""
        return 6 * self.hidden * self.intermediate


@dataclass
class StepCounts:
    """Counts of one step; ``[rows]`` or ``[layers, rows]``, averaged over KV heads."""

    tokens: np.ndarray
    video_tokens: np.ndarray
    dense_pairs: np.ndarray  # causal (query, key) pairs
    pairs: np.ndarray  # [layers, rows] pairs attended
    scored: np.ndarray  # [layers, rows] (query token, cube) pairs scored
    cubes_seen: np.ndarray  # [rows] (query token, preceding cube) pairs
    cubes_attended: np.ndarray  # [layers, rows]
    ffn_skipped: np.ndarray  # [layers, rows] tokens


def count_step(rows: StepRows, plan: StepPlan | None, layers: range) -> StepCounts:
    """What a step did.

    Args:
        rows: the step's requests.
        plan: its plan, after the layers have run; None for a dense step.
        layers: this rank's layers.
    """
    lens, computed = rows.query_lens, rows.computed
    number = len(lens)
    dense_pairs = _causal_pairs(lens, computed + lens)
    counts = StepCounts(
        tokens=lens,
        video_tokens=np.zeros(number, int),
        dense_pairs=dense_pairs,
        pairs=np.tile(dense_pairs.astype(float), (len(layers), 1)),
        scored=np.zeros((len(layers), number)),
        cubes_seen=np.zeros(number),
        cubes_attended=np.zeros((len(layers), number)),
        ffn_skipped=np.zeros((len(layers), number)),
    )
    if plan is None:
        return counts

    def by_row(row: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.bincount(row, values, minlength=number)

    counts.video_tokens = plan.video_tokens
    counts.cubes_seen = plan.cubes_seen
    counts.cubes_attended[:] = plan.cubes_seen
    for layer, kept in _to_host(plan.kept_blocks).items():  # [kv_heads, tiles]
        tiles = plan.attention.tiles
        kept = kept.mean(axis=0)
        nth = layer - layers.start
        context = kept * plan.block_size - tiles.tail_gap
        counts.pairs[nth] = by_row(tiles.row, _causal_pairs(tiles.length, context))
        candidates = tiles.candidates.sum(axis=1)
        left_out = tiles.block + 1 - kept
        counts.cubes_attended[nth] -= by_row(tiles.row, left_out * tiles.length)
        counts.scored[nth] = by_row(tiles.row, candidates * tiles.length)
    for layer, active in _to_host(plan.ffn_active).items():  # [cubes]
        skipped = plan.block_size - active
        counts.ffn_skipped[layer - layers.start] = by_row(plan.ffn.row, skipped)
    return counts


def _causal_pairs(queries: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Pairs of the last ``queries`` of ``context`` tokens, each seeing itself and all before."""
    return queries * (context - queries) + queries * (queries + 1) / 2


def _to_host(by_layer: dict[int, torch.Tensor]) -> dict[int, np.ndarray]:
    """One copy for all layers."""
    if not by_layer:
        return {}
    stacked = torch.stack(list(by_layer.values())).cpu().numpy()
    return dict(zip(by_layer, stacked, strict=True))


@dataclass
class Account:
    """Counts of one request, or of all of them."""

    shape: ModelShape
    layers: range
    tokens: int = 0
    video_tokens: int = 0
    cached_tokens: int = 0
    dense_pairs: float = 0.0
    cubes_seen: float = 0.0
    pairs: np.ndarray = field(init=False)
    scored: np.ndarray = field(init=False)
    cubes_attended: np.ndarray = field(init=False)
    ffn_skipped: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        for name in PER_LAYER:
            setattr(self, name, np.zeros(len(self.layers)))

    def add(self, counts: StepCounts, row: int) -> None:
        """Add one row of a step."""
        self.tokens += int(counts.tokens[row])
        self.video_tokens += int(counts.video_tokens[row])
        self.dense_pairs += float(counts.dense_pairs[row])
        self.cubes_seen += float(counts.cubes_seen[row])
        for name in PER_LAYER:
            getattr(self, name)[:] += getattr(counts, name)[:, row]

    def merge(self, other: Account) -> None:
        """Add another account's counts to these."""
        for name in ("tokens", "video_tokens", "cached_tokens", "dense_pairs", "cubes_seen"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in PER_LAYER:
            getattr(self, name)[:] += getattr(other, name)

    def report(self) -> dict[str, Any]:
        """Densities and FLOPs, JSON-ready.

        ``attention_density``: share of the preceding cubes attended, weighted by query tokens.
        ``ffn_density``: share of the video tokens that ran the FFN.  1.0 where there was nothing
        to leave out.  ``flops_ratio``: executed over dense.
        """
        shape, number = self.shape, len(self.layers)
        qkvo = float(self.tokens * number * shape.qkvo_flops_per_token)
        dense = {
            "qkvo": qkvo,
            "attention": self.dense_pairs * number * shape.attention_flops_per_pair,
            "ffn": float(self.tokens * number * shape.ffn_flops_per_token),
        }
        executed = {
            "qkvo": qkvo,
            "attention": float(self.pairs.sum()) * shape.attention_flops_per_pair,
            "selection": float(self.scored.sum()) * shape.score_flops_per_pair,
            "ffn": dense["ffn"] - float(self.ffn_skipped.sum()) * shape.ffn_flops_per_token,
        }
        dense["total"], executed["total"] = sum(dense.values()), sum(executed.values())
        layers = [
            {
                "layer": layer,
                "cubes_seen": round(self.cubes_seen),
                "cubes_attended": round(float(self.cubes_attended[i])),
                "attention_density": _share(self.cubes_attended[i], self.cubes_seen),
                "ffn_tokens": self.video_tokens,
                "ffn_active": self.video_tokens - round(float(self.ffn_skipped[i])),
                "ffn_density": 1 - _share(self.ffn_skipped[i], self.video_tokens, empty=0.0),
            }
            for i, layer in enumerate(self.layers)
        ]
        return {
            "tokens": self.tokens,
            "video_tokens": self.video_tokens,
            "cached_tokens": self.cached_tokens,
            "attention_density": float(np.mean([x["attention_density"] for x in layers])),
            "ffn_density": float(np.mean([x["ffn_density"] for x in layers])),
            "flops_ratio": _share(executed["total"], dense["total"]),
            "flops": {"dense": dense, "executed": executed},
            "layers": layers,
        }


def _share(part: float, whole: float, empty: float = 1.0) -> float:
    return float(part / whole) if whole else empty
