"""How concentrated attention is, and what the FFN does to a token: plain PyTorch, no vLLM.

A query's attention mass is looked at twice.  Over *tokens*: how many of all keys before it hold 50,
80, ... percent of its mass.  Over *cubes*: how many of the preceding cubes (KV blocks of video
tokens alone) hold that much of what falls on preceding cubes; this is what AdaS-Attn chooses from,
if it knew each cube's mass exactly.  (Paper: pre-study, its Fig. 1.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

MASSES = (0.5, 0.8, 0.9, 0.95, 0.99)
BYTES = 1 << 26  # of one piece's probabilities: bounds memory for long prompts
PERCENTILES = (10, 50, 90)


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens by kind.

    Attributes:
        is_video: ``[tokens]`` bool.
        block: tokens in a KV block.
    """

    is_video: torch.Tensor
    block: int

    @property
    def cubes(self) -> torch.Tensor:
        """``[blocks]`` bool: the whole KV blocks that hold video tokens alone."""
        whole = len(self.is_video) // self.block * self.block
        return self.is_video[:whole].view(-1, self.block).all(-1)

    def preceding_cubes(self) -> torch.Tensor:
        """``[tokens]`` int64: cubes before each token's own block."""
        before = torch.cat([torch.zeros(1, dtype=torch.long), self.cubes.long().cumsum(0)])
        own = torch.arange(len(self.is_video)) // self.block
        return before[own.clamp(max=len(before) - 1)]

    def queries(self, number: int, least_cubes: int) -> dict[str, torch.Tensor]:
        """Token indices to look at, by kind: ``video`` and ``question`` (text after the video).

        At most ``number`` of each, evenly spread over those with ``least_cubes`` before them.
        """
        last_video = int(self.is_video.nonzero()[-1]) if self.is_video.any() else len(self.is_video)
        index = torch.arange(len(self.is_video))
        enough = self.preceding_cubes() >= least_cubes
        kinds = {"video": self.is_video & enough, "question": (index > last_video) & enough}
        return {kind: _spread(which.nonzero().squeeze(1), number) for kind, which in kinds.items()}


def _spread(items: torch.Tensor, number: int) -> torch.Tensor:
    """``number`` of the items, or all, evenly spread and the last among them."""
    if len(items) <= number:
        return items
    return items[torch.linspace(0, len(items) - 1, number + 1).round().long()[1:]]


def attention_rows(
    q: torch.Tensor, k: torch.Tensor, at: torch.Tensor, scale: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Causal attention probabilities of some queries, a bounded piece at a time.

    Args:
        q: ``[queries, heads, d]`` after RoPE.
        k: ``[keys, kv_heads, d]`` after RoPE, from the first token on.
        at: ``[queries]`` token index of each query.
        scale: of the scores.

    Yields:
        (``at`` of the piece, ``[queries, heads, keys]`` float32).
    """
    keys, kv_heads = k.shape[:2]
    k = k.float()
    index = torch.arange(keys, device=k.device)
    step = max(1, BYTES // (4 * q.shape[1] * keys))
    for some, where in zip(q.split(step), at.split(step), strict=True):
        grouped = some.float().unflatten(1, (kv_heads, -1))
        scores = torch.einsum("qhgd,nhd->qhgn", grouped, k).flatten(1, 2) * scale
        later = index > where.to(k.device)[:, None]
        yield where, scores.masked_fill_(later[:, None], float("-inf")).softmax(-1)


def holders(weights: torch.Tensor, masses: tuple[float, ...] = MASSES) -> torch.Tensor:
    """The smallest number of entries that hold each share of the sum: ``[..., masses]`` int64.

    Example:
        >>> holders(torch.tensor([0.1, 0.6, 0.3]), (0.5, 0.8, 0.95)).tolist()
        [1, 2, 3]
    """
    sums = weights.sort(-1, descending=True).values.cumsum(-1)
    wanted = sums[..., -1:] * torch.tensor(masses, dtype=sums.dtype, device=sums.device)
    held = torch.searchsorted(sums.contiguous(), wanted.contiguous())
    return (held + 1).clamp(max=weights.shape[-1])


@dataclass
class AttentionMass:
    """One layer, one kind of query; rows are (query, head) pairs.

    Attributes:
        tokens: ``[rows, masses]`` share of the keys up to the query that hold each mass.
        cubes: ``[rows, masses]`` share of the preceding cubes that hold each mass on them.
        falls_on: ``[rows, 3]`` mass on preceding cubes, on the query's own block, on all else.
    """

    tokens: torch.Tensor
    cubes: torch.Tensor
    falls_on: torch.Tensor

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, at: torch.Tensor, scale: float, prompt: Prompt):
        """Measure; arguments as of :func:`attention_rows`, for a whole prompt's keys."""
        cubes = prompt.cubes.to(k.device)
        whole = len(cubes) * prompt.block
        parts = []
        for where, probs in attention_rows(q, k, at, scale):
            own = (where // prompt.block).to(k.device)
            by_block = probs[..., :whole].unflatten(-1, (-1, prompt.block)).sum(-1)
            before = torch.arange(len(cubes), device=k.device) < own[:, None]
            on_cubes = by_block * (cubes & before)[:, None]  # [queries, heads, blocks]
            index = torch.arange(probs.shape[-1], device=k.device) // prompt.block
            on_own = (probs * (index == own[:, None])[:, None]).sum(-1)
            rest = 1 - on_cubes.sum(-1) - on_own
            context = where.to(k.device)[:, None, None] + 1
            choices = (cubes & before).sum(-1)[:, None, None].clamp(min=1)
            parts.append(
                (
                    holders(probs) / context,
                    holders(on_cubes).clamp(max=choices) / choices,
                    torch.stack([on_cubes.sum(-1), on_own, rest.clamp(min=0)], -1),
                )
            )
        return cls(*(torch.cat(part).flatten(0, 1).cpu() for part in zip(*parts, strict=True)))

    def summary(self) -> dict:
        """JSON-ready."""
        return {
            "tokens": {str(m): statistics(x) for m, x in zip(MASSES, self.tokens.T, strict=True)},
            "cubes": {str(m): statistics(x) for m, x in zip(MASSES, self.cubes.T, strict=True)},
            "falls_on": dict(
                zip(("cubes", "own_block", "text"), self.falls_on.mean(0).tolist(), strict=True)
            ),
        }


def ffn_change(before: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What an FFN's output does to the stream it is added to, ``[tokens]`` each.

    Args:
        before: ``[tokens, hidden]`` residual stream before the FFN.
        branch: ``[tokens, hidden]`` the FFN's output.

    Returns:
        L2 norm after over before, and the cosine between the two.
    """
    before, after = before.float(), before.float() + branch.float()
    ratio = after.norm(dim=-1) / before.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return ratio, torch.cosine_similarity(before, after, dim=-1)


def statistics(values: torch.Tensor) -> dict[str, float]:
    """Mean, standard deviation and percentiles of ``[n]`` values."""
    values = values.double()
    levels = torch.tensor(PERCENTILES, dtype=torch.double) / 100
    found = {"mean": float(values.mean()), "std": float(values.std(unbiased=False))}
    named = zip(PERCENTILES, values.quantile(levels).tolist(), strict=True)
    return found | {f"p{level}": value for level, value in named}
