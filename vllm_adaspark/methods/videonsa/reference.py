"""The slow twin of one layer's attention in paper mode: token by token, to be trusted by reading.

A *cube* is a block of 64 positions of the request with vision tokens among them; its mean key and
mean value are those of its vision tokens.  Text tokens attend densely and causally.  A vision token
at position t, in block b = t // 64, has three branches:

* cmp: a softmax over the mean keys of the cubes before b, times their mean values; 0 without any;
* slc: a softmax over the tokens up to t of the selected cubes and of b, whatever they hold.
  Selected are the ``block_counts - 1`` cubes before b with the most cmp probability, summed over
  the query heads of a KV head's group; of equal ones the earlier;
* swa: a softmax over the last ``window_size`` positions, t among them.

Its output is the sum of gate times branch, head by head.  Sources: the paper's section 2.2 and
appendix; which points the paper leaves open, and how they are settled here, is in docs/videonsa.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from .settings import BLOCK


@dataclass
class Selection:
    """What one vision token selected for one KV head.

    ``margin`` is how much more important the least important cube that it selected is than the
    most important one that it left out; inf where it left none.
    """

    cubes: list[int]
    margin: float


@dataclass
class Result:
    """``output [tokens, heads, head_size]`` and by (token, KV head) what was selected."""

    output: torch.Tensor
    selected: dict[tuple[int, int], Selection] = field(default_factory=dict)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    is_vision: torch.Tensor,
    *,
    block_counts: int,
    window_size: int,
    scale: float,
    tokens: Iterable[int] | None = None,
) -> Result:
    """The attention of one request, in float64.

    Args:
        query: ``[tokens, heads, head_size]``.
        key, value: ``[tokens, kv_heads, head_size]``.
        gates: ``[tokens, heads, 3]`` of cmp, slc and swa.
        is_vision: ``[tokens]`` bool.
        block_counts: blocks that a vision token selects, its own among them.
        window_size: tokens of its window, itself among them.
        scale: of the logits.
        tokens: which to compute; None for all.  The others' outputs are 0.
    """
    query, key, value, gates = (x.double() for x in (query, key, value, gates))
    kv_heads = key.shape[1]
    group = query.shape[1] // kv_heads
    result = Result(torch.zeros_like(query))
    cubes = cubes_of(is_vision)
    means = {cube: [_mean(x, is_vision, cube) for x in (key, value)] for cube in cubes}
    for t in range(len(query)) if tokens is None else tokens:
        for kv_head in range(kv_heads):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            q, k, v = query[t, heads], key[:, kv_head], value[:, kv_head]
            if not is_vision[t]:
                result.output[t, heads] = _attend(q, k[: t + 1], v[: t + 1], scale)[0]
                continue
            before = {cube: mean for cube, mean in means.items() if cube < t // BLOCK}
            compressed, selection = _compress(q, before, kv_head, block_counts - 1, scale)
            result.selected[t, kv_head] = selection
            seen = _tokens_of(selection.cubes, t)
            window = slice(max(0, t + 1 - window_size), t + 1)
            branches = (
                compressed,
                _attend(q, k[seen], v[seen], scale)[0],
                _attend(q, k[window], v[window], scale)[0],
            )
            of_branch = gates[t, heads].unbind(-1)
            result.output[t, heads] = sum(
                gate[:, None] * branch for gate, branch in zip(of_branch, branches, strict=True)
            )
    return result


def cubes_of(is_vision: torch.Tensor) -> list[int]:
    """The blocks that are whole and hold vision tokens."""
    blocks = range(len(is_vision) // BLOCK)
    return [b for b in blocks if bool(is_vision[b * BLOCK : (b + 1) * BLOCK].any())]


def _mean(states: torch.Tensor, is_vision: torch.Tensor, cube: int) -> torch.Tensor:
    """``[kv_heads, d]``: of keys or values ``[tokens, kv_heads, d]``, a cube's mean over vision."""
    block = slice(cube * BLOCK, (cube + 1) * BLOCK)
    return states[block][is_vision[block]].mean(0)


def _compress(
    q: torch.Tensor, before: dict[int, list[torch.Tensor]], kv_head: int, number: int, scale: float
) -> tuple[torch.Tensor, Selection]:
    """The compressed branch and the selection, of the cubes ``before`` and their means."""
    if not before:
        return torch.zeros_like(q), Selection([], float("inf"))
    keys, values = (torch.stack(means)[:, kv_head] for means in zip(*before.values(), strict=True))
    output, probs = _attend(q, keys, values, scale)
    importance, cubes = probs.sum(0).tolist(), list(before)
    ranked = sorted(range(len(cubes)), key=lambda i: (-importance[i], i))
    kept, left = ranked[:number], ranked[number:]
    margin = float("inf")
    if kept and left:
        margin = importance[kept[-1]] - importance[left[0]]
    return output, Selection(sorted(cubes[i] for i in kept), margin)


def _tokens_of(selected: list[int], t: int) -> torch.Tensor:
    """Positions up to ``t`` in the selected cubes and in the block of ``t``."""
    own = t // BLOCK
    return torch.cat(
        [torch.arange(b * BLOCK, min((b + 1) * BLOCK, t + 1)) for b in (*selected, own)]
    )


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[heads, d]`` and probabilities ``[heads, keys]`` of ``q [heads, d]``."""
    probs = torch.softmax(q @ k.T * scale, -1)
    return probs @ v, probs
