"""What the Triton kernels of VideoNSA compute, in plain PyTorch and fp32 or more: their twins.

Neither Triton nor vLLM is needed here.  The kernels take the same arguments and give the same
results: ``videonsa_compress.compress`` and ``.best``, ``videonsa_select.select``.
"""

from __future__ import annotations

import torch


def compress(
    query: torch.Tensor,
    tokens: torch.Tensor,
    mean_keys: torch.Tensor,
    mean_values: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    longest: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to mean keys and values, and what each of them weighs (paper, section 2.2).

    The means of all requests of a step lie behind each other; a token sees a range of them.

    Args:
        query: ``[step tokens, heads, d]`` contiguous.
        tokens: ``[n]`` int64, those of the step that attend here.
        mean_keys: ``[kv_heads, width, d]`` fp32 contiguous.
        mean_values: the same in the queries' dtype.
        begin, end: ``[n]`` int32, the means that a token sees; it may see none.
        longest: at least every ``end - begin``.
        scale: of the logits.

    Returns:
        ``[n, heads, d]`` fp32, 0 where nothing is seen.  And the importances ``[n, kv_heads,
        longest]`` fp32: the probabilities summed over the GQA group, of mean ``begin + i`` in
        column ``i``; columns past a token's range are undefined (0 here).
    """
    n, kv_heads = len(tokens), len(mean_keys)
    q = query[tokens].unflatten(1, (kv_heads, -1)).float()  # [n, kv_heads, group, d]
    out = torch.zeros_like(q)
    importance = q.new_zeros(n, kv_heads, longest)
    for nth, (first, last) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        keys, values = mean_keys[:, first:last], mean_values[:, first:last].float()
        if first < last:
            probs = (q[nth] @ keys.transpose(1, 2) * scale).softmax(-1)  # [kv_heads, group, seen]
            out[nth] = probs @ values
            importance[nth, :, : last - first] = probs.sum(1)
    return out.flatten(1, 2), importance


def best(importance: torch.Tensor, count: torch.Tensor, places: int) -> torch.Tensor:
    """The most important columns of each row.

    Args:
        importance: ``[n, kv_heads, longest]`` fp32, not negative.
        count: ``[n]`` int32, how many columns a token has; the others are not read.
        places: chosen at the most.

    Returns:
        ``[n, kv_heads, places]`` int32 columns, rising, then -1.  Of equal ones the earlier win.
    """
    n, kv_heads, longest = importance.shape
    there = torch.arange(longest, device=importance.device) < count[:, None, None]
    ranked = torch.where(there, importance, -1.0).sort(dim=-1, descending=True, stable=True).indices
    ranked = ranked[..., :places]
    # Columns that are not there rank last; they go behind the others as -1.
    rising = torch.where(ranked < count[:, None, None], ranked, longest).sort(-1).values
    chosen = importance.new_full((n, kv_heads, places), -1, dtype=torch.int32)
    chosen[..., : ranked.shape[-1]] = torch.where(rising < longest, rising, -1)
    return chosen


def select(
    query: torch.Tensor,
    tokens: torch.Tensor,
    cache: torch.Tensor,
    pages: torch.Tensor,
    own: torch.Tensor,
    offset: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Every token's attention to KV blocks of its own choice, and causally to its own block.

    Args:
        query: ``[step tokens, heads, d]`` contiguous.
        tokens: ``[n]`` int64, those of the step that attend here.
        cache: ``[blocks, kv_heads, block_size, 2 d]``, each token's key before its value.
        pages: ``[n, kv_heads, places]`` int32 physical blocks that were chosen, -1 for none; all
            their tokens are seen.
        own: ``[n]`` int32 physical block of the token itself.
        offset: ``[n]`` int32 its place in that block, the last that it sees.
        scale: of the logits.

    Returns:
        ``[n, heads, d]`` in the queries' dtype.
    """
    kv_heads, block_size, d = cache.shape[1], cache.shape[2], query.shape[2]
    out = torch.empty(len(tokens), kv_heads, query.shape[1] // kv_heads, d, device=query.device)
    for nth, token in enumerate(tokens.tolist()):
        for head in range(kv_heads):
            mine = pages[nth, head]
            blocks = torch.cat([mine[mine >= 0], own[nth : nth + 1]]).long()
            seen = cache[blocks, head].flatten(0, 1).float()
            seen = seen[: (len(blocks) - 1) * block_size + int(offset[nth]) + 1]
            q = query[token].unflatten(0, (kv_heads, -1))[head].float()
            out[nth, head] = (q @ seen[:, :d].T * scale).softmax(-1) @ seen[:, d:]
    return out.flatten(1, 2).to(query.dtype)
