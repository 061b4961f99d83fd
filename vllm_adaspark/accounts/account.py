"""What a request cost and what it would have cost dense: densities and FLOPs, per layer and in all.

Counts come from the plan of each step and the few numbers every layer leaves on it; FLOPs follow
from counts and the model's shape (flops.py, which says what is counted).  Pure NumPy; no vLLM.

A method whose attention is not made of tiles tells its FLOPs itself (``StepPlan.tell``); they are
added to those that are counted here for the steps without a plan.

Dense is what the *whole* prompt would cost: where tokens of a video were dropped before the
language model (video/prune.py), they count there as if they had run.

An account holds what one rank saw: its KV heads and its layers.  ``to_counts`` and ``from_counts``
carry it between processes; accounts/reports.py makes one account of all ranks'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..paged.plan import FALLBACKS, StepPlan
from ..paged.state import StepRows
from ..paged.tiles import DENSE
from ..video.prune import WholePrompt
from .flops import ModelShape

PER_LAYER = ("pairs", "scored", "cubes_attended", "ffn_skipped")  # counts kept for each layer
BY_NAME = ("told_flops", "sums")  # told by a method's plan, by name, for each layer
OF_STEP = (  # counted once
    "tokens",
    "told_tokens",
    "video_tokens",
    "summed_tokens",
    "dropped_tokens",
    "choices",
    "dense_pairs",
    "dropped_pairs",
    "cubes_seen",
)
OF_REQUEST = (*OF_STEP, "cached_tokens")
SECONDS = ("selection_seconds", "planning_seconds")


@dataclass
class StepCounts:
    """Counts of one step; ``[rows]`` or ``[layers, rows]``, averaged over KV heads."""

    tokens: np.ndarray
    video_tokens: np.ndarray
    summed_tokens: np.ndarray  # of them, those that ``sums`` are over
    dropped_tokens: np.ndarray  # that the step would have computed more, had none been dropped
    dense_pairs: np.ndarray  # causal (query, key) pairs of the whole prompt
    dropped_pairs: np.ndarray  # of them, those that went with the dropped tokens
    pairs: np.ndarray  # [layers, rows] pairs attended
    scored: np.ndarray  # [layers, rows] (query token, cube) pairs scored
    cubes_seen: np.ndarray  # [rows] (query token, preceding cube) pairs
    cubes_attended: np.ndarray  # [layers, rows]
    ffn_skipped: np.ndarray  # [layers, rows] FFN evaluations saved
    choices: np.ndarray  # [rows] tiles and FFN cubes that could leave something out
    told_tokens: np.ndarray  # [rows] tokens of steps whose plan told their FLOPs itself
    told_flops: dict[str, np.ndarray]  # by part: [layers, rows], see plan.Told
    sums: dict[str, np.ndarray]  # by name: [layers, rows], see plan.Told
    fallback_tokens: dict[str, np.ndarray]  # by reason: [rows], see plan.FALLBACKS
    selection_seconds: np.ndarray  # [rows] the step's, by each row's part in the work
    planning_seconds: np.ndarray  # [rows]

    @cached_property
    def plain(self) -> dict[str, list[int | float]]:
        """What is counted once for each row, by name: ``[rows]`` numbers of Python's, once the
        step is counted."""
        return {name: getattr(self, name).tolist() for name in (*OF_STEP, *SECONDS)}


def count_step(
    rows: StepRows,
    plan: StepPlan | None,
    layers: range,
    shape: ModelShape | None = None,
    whole: Sequence[WholePrompt | None] | None = None,
    video: np.ndarray | None = None,
) -> StepCounts:
    """What a step did.

    Args:
        rows: the step's requests.
        plan: its plan, after the layers have run; None for a dense step.
        layers: this rank's layers.
        shape: sizes of a layer, for a plan that tells its FLOPs itself.
        whole: the whole prompt of each row; None for one of which nothing was dropped.
        video: ``[rows]`` video tokens, those of requests that the plan does not know of included.
    """
    lens, computed = rows.query_lens, rows.computed
    number = len(lens)
    pairs = _causal_pairs(lens, computed + lens)
    before, upto = _in_whole_prompts(computed, computed + lens, whole)
    dense_pairs = _causal_pairs(upto - before, upto)
    counts = StepCounts(
        tokens=lens,
        video_tokens=np.zeros(number, int) if video is None else video,
        summed_tokens=np.zeros(number, int),
        dropped_tokens=upto - before - lens,
        dense_pairs=dense_pairs,
        dropped_pairs=dense_pairs - pairs,
        pairs=np.tile(pairs.astype(float), (len(layers), 1)),
        scored=np.zeros((len(layers), number)),
        cubes_seen=np.zeros(number),
        cubes_attended=np.zeros((len(layers), number)),
        ffn_skipped=np.zeros((len(layers), number)),
        choices=np.zeros(number, int),
        told_tokens=np.zeros(number, int),
        told_flops={},
        sums={},
        fallback_tokens={},
        selection_seconds=np.zeros(number),
        planning_seconds=np.zeros(number),
    )
    if plan is None:
        return counts

    def by_row(row: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(row, values, minlength=number)

    counts.video_tokens = np.maximum(plan.video_tokens, counts.video_tokens)
    counts.cubes_seen = plan.cubes_seen
    counts.cubes_attended[:] = plan.cubes_seen
    counts.fallback_tokens = plan.fallback_tokens
    counts.planning_seconds = _split(plan.planning_seconds, lens)
    told = plan.tell(shape, layers)
    if told is not None:
        counts.pairs[:] = 0
        counts.told_tokens, counts.told_flops, counts.sums = lens, told.flops, told.sums
        counts.summed_tokens = plan.video_tokens
        counts.choices, counts.cubes_attended = told.choices, told.attended
        counts.selection_seconds = _split(plan.selection.seconds(), plan.video_tokens)
        return counts
    # (query token, candidate cube) pairs, the same in every sparse layer
    scored = choosing = np.zeros(number)
    if plan.attention is not None:
        tiles = plan.attention.tiles
        candidates = tiles.candidates.sum(axis=1)
        scored = by_row(tiles.row, candidates * tiles.scored)
        choosing = by_row(tiles.row, candidates * np.maximum(tiles.scored, 1))
        counts.choices += by_row(tiles.row[tiles.kind != DENSE])
    if plan.ffn is not None:
        counts.choices += by_row(plan.ffn.row)
    counts.selection_seconds = _split(plan.selection.seconds(), choosing)
    if plan.kept_blocks:
        nth, kept = _to_host(plan.kept_blocks, layers)  # [layers, kv_heads, tiles]
        kept = kept.mean(axis=1)
        context = kept * plan.block_size - tiles.tail_gap
        left_out = (tiles.block + 1 - kept) * tiles.length
        counts.pairs[nth] = _sum_by_row(_causal_pairs(tiles.length, context), tiles.row, number)
        counts.cubes_attended[nth] -= _sum_by_row(left_out, tiles.row, number)
        counts.scored[nth] = scored
    if plan.ffn_active:
        nth, active = _to_host(plan.ffn_active, layers)  # [layers, cubes]
        # A cube whose tokens all ran has nobody to make a centroid for.
        ran = active + plan.ffn.extra * (active < plan.block_size)
        counts.ffn_skipped[nth] = _sum_by_row(plan.block_size - ran, plan.ffn.row, number)
    return counts


def _in_whole_prompts(
    before: np.ndarray, upto: np.ndarray, whole: Sequence[WholePrompt | None] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Where a step's tokens begin and end, ``[rows]`` each, in the whole prompts."""
    before, upto = before.astype(np.int64), upto.astype(np.int64)
    for row, prompt in enumerate(whole or ()):
        if prompt is not None:
            before[row], upto[row] = prompt.up_to(before[row]), prompt.up_to(upto[row])
    return before, upto


def _causal_pairs(queries: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Pairs of the last ``queries`` of ``context`` tokens, each seeing itself and all before."""
    return queries * (context - queries) + queries * (queries + 1) / 2


def _split(seconds: float, work: np.ndarray) -> np.ndarray:
    """A step's time, given to its rows by their part in the work."""
    return seconds * work / max(work.sum(), 1)


def _to_host(by_layer: dict[int, torch.Tensor], layers: range) -> tuple[list[int], np.ndarray]:
    """Places in ``layers``, and what those layers left, ``[layers, ...]``: one copy for all."""
    return [layers.index(layer) for layer in by_layer], torch.stack(
        [*by_layer.values()]
    ).cpu().numpy()


def _sum_by_row(values: np.ndarray, row: np.ndarray, number: int) -> np.ndarray:
    """``[layers, n]`` to ``[layers, rows]``; ``row [n]`` does not fall."""
    total = np.zeros((len(values), number))
    first = np.flatnonzero(np.diff(row, prepend=-1))
    total[:, row[first]] = np.add.reduceat(values, first, axis=1)
    return total


@dataclass
class Account:
    """Counts of one request, or of all of them.

    Attributes:
        settings: what the request ran under (Method.told); None for a request without
            video, and for an account of many.
    """

    shape: ModelShape
    layers: range
    settings: dict[str, Any] | None = None
    tokens: int = 0
    told_tokens: int = 0
    video_tokens: int = 0
    summed_tokens: int = 0
    dropped_tokens: int = 0
    choices: int = 0
    cached_tokens: int = 0
    dense_pairs: float = 0.0
    dropped_pairs: float = 0.0
    cubes_seen: float = 0.0
    selection_seconds: float = 0.0
    planning_seconds: float = 0.0
    fallback_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FALLBACKS, 0))
    told_flops: dict[str, np.ndarray] = field(default_factory=dict)
    sums: dict[str, np.ndarray] = field(default_factory=dict)
    pairs: np.ndarray = field(init=False)
    scored: np.ndarray = field(init=False)
    cubes_attended: np.ndarray = field(init=False)
    ffn_skipped: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        for name in PER_LAYER:
            setattr(self, name, np.zeros(len(self.layers)))

    def add(self, counts: StepCounts, row: int | None = None) -> None:
        """Add one row of a step, or all of it."""
        for name, values in counts.plain.items():
            added = sum(values) if row is None else values[row]
            setattr(self, name, getattr(self, name) + added)
        for reason, tokens in counts.fallback_tokens.items():
            self._add_fallback(reason, int(tokens.sum() if row is None else tokens[row]))
        for name in PER_LAYER:
            values = getattr(counts, name)
            getattr(self, name)[:] += values.sum(axis=1) if row is None else values[:, row]
        for name in BY_NAME:
            for part, values in getattr(counts, name).items():
                self._add_named(name, part, values.sum(axis=1) if row is None else values[:, row])

    def _add_fallback(self, reason: str, tokens: int) -> None:
        if tokens or reason in self.fallback_tokens:  # another method's reasons, once they happen
            self.fallback_tokens[reason] = self.fallback_tokens.get(reason, 0) + tokens

    def _add_named(self, name: str, part: str, values: np.ndarray) -> None:
        mine = getattr(self, name)
        mine[part] = mine.get(part, 0) + values

    def merge(self, other: Account) -> None:
        """Add another account's counts to these."""
        for name in (*OF_REQUEST, *SECONDS):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, tokens in other.fallback_tokens.items():
            self._add_fallback(reason, tokens)
        for name in PER_LAYER:
            getattr(self, name)[:] += getattr(other, name)
        for name in BY_NAME:
            for part, values in getattr(other, name).items():
                self._add_named(name, part, values)

    def to_counts(self) -> dict[str, Any]:
        """The bare counts, msgpack-ready."""
        counts = {name: getattr(self, name) for name in (*OF_REQUEST, *SECONDS)}
        return counts | {
            **{name: getattr(self, name).tolist() for name in PER_LAYER},
            **{n: {part: v.tolist() for part, v in getattr(self, n).items()} for n in BY_NAME},
            "fallback_tokens": dict(self.fallback_tokens),
            "settings": self.settings,
            "shape": dict(vars(self.shape)),
            "layers": [self.layers.start, self.layers.stop],
        }

    @classmethod
    def from_counts(cls, counts: dict[str, Any]) -> Account:
        """The account that :meth:`to_counts` was called on."""
        shape, layers = ModelShape(**counts["shape"]), range(*counts["layers"])
        account = cls(shape, layers, counts["settings"])
        for name in (*OF_REQUEST, *SECONDS):
            setattr(account, name, counts[name])
        account.fallback_tokens |= counts["fallback_tokens"]
        for name in PER_LAYER:
            getattr(account, name)[:] = counts[name]
        for name in BY_NAME:
            setattr(account, name, {p: np.array(v, float) for p, v in counts[name].items()})
        return account

    def means(self) -> dict[str, np.ndarray]:
        """What a method told of each video token (``sums``), as a mean for each layer."""
        return {name: sums / max(self.summed_tokens, 1) for name, sums in self.sums.items()}

    def report(self) -> dict[str, Any]:
        """Densities and FLOPs, JSON-ready.

        ``attention_density``: share of the preceding cubes attended, weighted by query tokens.
        ``ffn_density``: FFN evaluations per video token; a cube's centroid is one.  1.0 where there
        was nothing to leave out.  ``flops_ratio``: executed over dense.  ``flops.dropped``: what of
        the dense FLOPs went with the tokens that the language model never saw.  ``means``: what a
        method told of each video token.
        """
        shape, number = self.shape, len(self.layers)

        def densely(tokens: int, pairs: float) -> dict[str, float]:
            return {
                "qkvo": float(tokens * number * shape.qkvo_flops_per_token),
                "attention": pairs * number * shape.attention_flops_per_pair,
                "ffn": float(tokens * number * shape.ffn_flops_per_token),
            }

        dense = densely(self.tokens + self.dropped_tokens, self.dense_pairs)
        dropped = densely(self.dropped_tokens, self.dropped_pairs)
        counted = self.tokens - self.told_tokens  # tokens of steps that are counted here
        executed = {
            "qkvo": float(counted * number * shape.qkvo_flops_per_token),
            "attention": float(self.pairs.sum()) * shape.attention_flops_per_pair,
            "selection": float(self.scored.sum()) * shape.score_flops_per_pair,
            "ffn": float(counted * number * shape.ffn_flops_per_token)
            - float(self.ffn_skipped.sum()) * shape.ffn_flops_per_token,
        }
        for part, flops in self.told_flops.items():
            executed[part] = executed.get(part, 0.0) + float(flops.sum())
        for parts in (dense, executed, dropped):
            parts["total"] = sum(parts.values())
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
        means = self.means()
        for i, layer in enumerate(layers):
            if means:
                layer["means"] = {name: float(mean[i]) for name, mean in means.items()}
        of_all = {"means": {n: float(m.mean()) for n, m in means.items()}} if means else {}
        return {
            "tokens": self.tokens,
            "video_tokens": self.video_tokens,
            "dropped_tokens": self.dropped_tokens,
            "cached_tokens": self.cached_tokens,
            "fallback_tokens": dict(self.fallback_tokens),
            "selection_seconds": self.selection_seconds,
            "planning_seconds": self.planning_seconds,
            "attention_density": float(np.mean([x["attention_density"] for x in layers])),
            "ffn_density": float(np.mean([x["ffn_density"] for x in layers])),
            "flops_ratio": _share(executed["total"], dense["total"]),
            "flops": {"dense": dense, "executed": executed, "dropped": dropped},
            **of_all,
            "layers": layers,
        }


def _share(part: float, whole: float, empty: float = 1.0) -> float:
    return float(part / whole) if whole else empty
