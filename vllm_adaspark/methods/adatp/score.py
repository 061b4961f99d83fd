"""The score of a video token: how much the text after the video attends to it in a layer.

The attention kernel does not give its probabilities away, so those of the few text queries are
computed once more, from the same rotated queries and keys, over all keys of the request and in
fp32: they are the probabilities of the model itself.
"""

from __future__ import annotations

import torch

SLAB = 1 << 24  # probabilities at a time: 64 MiB


def text_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    asks: slice,
    columns: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Mean attention probability over heads and asking tokens.

    Args:
        query: ``[n, heads, d]`` of one request's prompt, after RoPE; this rank's heads.
        key: ``[n, kv_heads, d]`` likewise.
        asks: the text tokens that ask, among the n.
        columns: ``[m]`` int64 the tokens that are scored, among the n, before the asking ones.
        scale: of the logits.

    Returns:
        ``[m]`` fp32.
    """
    keys = key[: asks.stop].float().permute(1, 2, 0)  # [kv_heads, d, keys]
    at = torch.arange(asks.stop, device=key.device)
    heads = query.shape[1]
    step = max(1, SLAB // (heads * asks.stop))
    total = torch.zeros(len(columns), device=key.device)
    for first in range(asks.start, asks.stop, step):
        last = min(first + step, asks.stop)
        q = query[first:last].float().unflatten(1, (len(keys), -1))  # [q, kv_heads, group, d]
        logits = q.permute(1, 2, 0, 3).flatten(1, 2) @ keys * scale  # [kv_heads, group * q, keys]
        logits = logits.unflatten(1, (-1, last - first))
        logits.masked_fill_(at > at[first:last, None], float("-inf"))
        total += logits.softmax(-1)[..., columns].sum((0, 1, 2))
    return total / (heads * (asks.stop - asks.start))
