"""What VideoNSA's released code computes in one layer, step by step: the twin of ``faithful``.

The released code differs from the paper in six ways, and its weights were presumably trained with
them.  Each is a function here, with a test of its own:

1. :func:`dense_pass`: a vision token also gets the mean of all values up to its own, because the
   dense pass runs with its query zeroed and is added, not masked.
2. :func:`gates_of`: a text token also gets the three branches with a zero query, each with the gate
   .5, because its gate logits are zeroed *before* the sigmoid.
3. :func:`null_text`: in the three branches text keys and values are zero but stay in the sequence,
   where they take part in every softmax and in the means.
4. :func:`rows_of_groups`: query heads are repeated to fill groups of a multiple of 16 rows per KV
   head, which gives heads to other KV heads than their own.
5. :func:`compress`: the mask of the compressed branch shows a query its own block and all *later*
   ones, and none before.
6. :func:`misread`: the log-sum-exp of that branch reaches the choice of blocks in another layout,
   so a row is normalised by that of another token and head.

Written for reading, not for speed: one request, one whole prompt, all of it in fp64.  What is
established and what is inferred about the released code stands in docs/videonsa.md.  Two things are
decreed here, because the released code leaves them to how its kernels happen to run: of blocks with
equal scores the earlier is preferred (a text token's zero query ties on all of them), and a token's
own block is always selected, also where many others score higher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .gates import TEMPERATURE
from .settings import BLOCK, places_of

GROUP_ROWS = 16  # its kernels take a multiple of so many query rows per KV head
NO_HEAD = -1  # a row that is padding: its query is zero


@dataclass(frozen=True)
class Answer:
    """What a layer's attention gives, and what it chose.

    Attributes:
        output: ``[T, H, d]``.
        nsa: ``[T, H, d]``, the part of it that comes from the three branches.
        selected: by token and KV head, the selected blocks in rising order, own block included.
        margins: ``[T, kv_heads]``, by what share the lowest score that was kept lies above the
            highest that was not; infinite where nothing before the own block was left out.
    """

    output: torch.Tensor
    nsa: torch.Tensor
    selected: list[list[list[int]]]
    margins: torch.Tensor


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    vision: torch.Tensor,
    z: torch.Tensor,
    *,
    scale: float,
    block_counts: int = 32,
    window: int = 256,
    misread_lse: bool = True,
) -> Answer:
    """Attention of one layer over one whole prompt of ``T`` tokens.

    Args:
        q: ``[T, H, d]`` queries after RoPE.
        k, v: ``[T, kv_heads, d]`` keys after RoPE, and values.
        vision: ``[T]`` bool, tokens of images and videos.
        z: ``[T, H, 3]`` gate logits as ``g_proj_2`` gives them: compression, selection, window.
        scale: of the attention logits.
        block_counts, window: the checkpoint's.
        misread_lse: the log-sum-exp in the layout in which the released code reads it; False is the
            sane substitute, a row's own.
    """
    q, k, v, z = (x.double() for x in (q, k, v, z))
    heads, kv_heads = q.shape[1], k.shape[1]
    groups = rows_of_groups(heads, kv_heads)
    rows = torch.stack([group_queries(q, vision, group) for group in groups], 1)  # [T, G, rows, d]
    k0, v0 = null_text(k, v, vision)
    mean_keys, mean_values = block_means(k0), block_means(v0)
    places = places_of(block_counts)

    compressed, lse = compress(rows, mean_keys, mean_values, scale)
    if misread_lse:
        lse = misread(lse)
    selected, margins = select_blocks(rows, mean_keys, lse, places, scale)
    chosen = attend_blocks(rows, k0, v0, selected, scale)
    near = attend_window(rows, k0, v0, window, scale)

    gates = gates_of(z, vision)
    nsa = torch.zeros_like(q)
    copies = torch.zeros(heads)
    for g, group in enumerate(groups):
        for r, head in enumerate(group):
            if head == NO_HEAD:
                continue
            gate = gates[:, head]  # [T, 3]
            nsa[:, head] += gate[:, 0:1] * compressed[:, g, r]
            nsa[:, head] += gate[:, 1:2] * chosen[:, g, r] + gate[:, 2:3] * near[:, g, r]
            copies[head] += 1
    nsa /= copies[:, None]
    return Answer(nsa + dense_pass(q, k, v, vision, scale), nsa, selected, margins)


def dense_pass(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, vision: torch.Tensor, scale: float
) -> torch.Tensor:
    """Dense causal attention of every token, vision queries zeroed (spec 5.1): ``[T, H, d]``."""
    by_group = torch.where(vision[:, None, None], 0.0, q).unflatten(1, (k.shape[1], -1))
    out = torch.zeros_like(by_group)
    for t, g in _tokens_and_heads(by_group):
        keys, values = k[: t + 1, g], v[: t + 1, g]
        out[t, g] = (by_group[t, g] @ keys.T * scale).softmax(-1) @ values
    return out.flatten(1, 2)


def gates_of(z: torch.Tensor, vision: torch.Tensor) -> torch.Tensor:
    """Gates ``[T, H, 3]``; a text token's logits are zeroed before the sigmoid (spec 5.2)."""
    return (torch.where(vision[:, None, None], z, 0.0) / TEMPERATURE).sigmoid()


def null_text(
    k: torch.Tensor, v: torch.Tensor, vision: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in which text tokens are zero (spec 5.3)."""
    there = vision[:, None, None]
    return torch.where(there, k, 0.0), torch.where(there, v, 0.0)


def rows_of_groups(heads: int, kv_heads: int) -> list[list[int]]:
    """The query head of each row of each KV head's group, ``NO_HEAD`` for padding (spec 5.4).

    The released code pads 28 heads over 4 KV heads to 64 rows: the heads once, the heads once more,
    and zeros.  For other counts this is the same rule: as many rows as the next multiple of 16 per
    KV head, filled with whole copies of the heads as often as they fit, then zeros.
    """
    step = GROUP_ROWS * kv_heads
    rows = -(-heads // step) * step
    copies = rows // heads
    filled = list(range(heads)) * copies
    filled += [NO_HEAD] * (rows - len(filled))
    group = rows // kv_heads
    return [filled[g * group : (g + 1) * group] for g in range(kv_heads)]


def group_queries(q: torch.Tensor, vision: torch.Tensor, group: list[int]) -> torch.Tensor:
    """Query rows ``[T, rows, d]`` of a KV head; those of text tokens and of padding are zero."""
    rows = [torch.zeros_like(q[:, 0]) if head == NO_HEAD else q[:, head] for head in group]
    return torch.where(vision[:, None, None], torch.stack(rows, 1), 0.0)


def block_means(x: torch.Tensor) -> torch.Tensor:
    """Means ``[blocks, kv_heads, d]`` of blocks of 64 tokens, the last over its real length."""
    return torch.stack([block.mean(0) for block in x.split(BLOCK)])


def compress(
    rows: torch.Tensor, mean_keys: torch.Tensor, mean_values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The compressed branch with its inverted mask (spec 5.5).

    A token sees its own block and all later ones.

    Args:
        rows: ``[T, kv_heads, rows, d]``.
        mean_keys, mean_values: ``[blocks, kv_heads, d]``.

    Returns:
        ``[T, kv_heads, rows, d]``, and the log-sum-exp ``[kv_heads * rows, T]`` as the released
        kernel stores it.
    """
    out = torch.zeros_like(rows)
    lse = torch.zeros(rows.shape[1], rows.shape[2], len(rows), dtype=rows.dtype)
    for t, g in _tokens_and_heads(rows):
        own = t // BLOCK
        logits = rows[t, g] @ mean_keys[own:, g].T * scale
        out[t, g] = logits.softmax(-1) @ mean_values[own:, g]
        lse[g, :, t] = logits.logsumexp(-1)
    return out, lse.flatten(0, 1)


def misread(lse: torch.Tensor) -> torch.Tensor:
    """``[rows, T]``, whose memory is read as ``[T, rows]``, and back (spec 5.6)."""
    rows, tokens = lse.shape
    return lse.contiguous().view(tokens, rows).T


def select_blocks(
    rows: torch.Tensor, mean_keys: torch.Tensor, lse: torch.Tensor, places: int, scale: float
) -> tuple[list[list[list[int]]], torch.Tensor]:
    """The blocks that each token reads in the selected branch, and by what margin (spec 5.7).

    A block before the token's own scores the sum over the group's rows of ``exp(logit - lse)``, the
    own block 1 per row.  ``lse [kv_heads * rows, T]``.
    """
    tokens, kv_heads, group, _ = rows.shape
    lse = lse.view(kv_heads, group, tokens)
    selected: list[list[list[int]]] = [[[] for _ in range(kv_heads)] for _ in range(tokens)]
    margins = torch.full((tokens, kv_heads), float("inf"))
    for t, g in _tokens_and_heads(rows):
        own = t // BLOCK
        logits = rows[t, g] @ mean_keys[:own, g].T * scale  # [rows, own]
        scores = (logits - lse[g, :, t, None]).exp().sum(0).tolist()
        ranked = sorted(range(own + 1), key=lambda j: (-[*scores, float(group)][j], j))
        kept = ranked[:places]
        if own not in kept:
            kept[-1] = own
        selected[t][g] = sorted(kept)
        left = [scores[j] for j in range(own) if j not in kept]
        past = [scores[j] for j in kept if j != own]
        if left and past:
            margins[t, g] = min(past) / max(left) - 1
    return selected, margins


def attend_blocks(
    rows: torch.Tensor,
    k0: torch.Tensor,
    v0: torch.Tensor,
    selected: list[list[list[int]]],
    scale: float,
) -> torch.Tensor:
    """The selected branch: the tokens of the selected blocks, up to the own one."""
    out = torch.zeros_like(rows)
    for t, g in _tokens_and_heads(rows):
        starts = (j * BLOCK for j in selected[t][g])
        seen = [i for start in starts for i in range(start, min(start + BLOCK, t + 1))]
        out[t, g] = (rows[t, g] @ k0[seen, g].T * scale).softmax(-1) @ v0[seen, g]
    return out


def attend_window(
    rows: torch.Tensor, k0: torch.Tensor, v0: torch.Tensor, window: int, scale: float
) -> torch.Tensor:
    """The window branch: the last ``window`` tokens, the own one included."""
    out = torch.zeros_like(rows)
    for t, g in _tokens_and_heads(rows):
        seen = slice(max(0, t + 1 - window), t + 1)
        out[t, g] = (rows[t, g] @ k0[seen, g].T * scale).softmax(-1) @ v0[seen, g]
    return out


def _tokens_and_heads(rows: torch.Tensor) -> list[tuple[int, int]]:
    return [(t, g) for t in range(rows.shape[0]) for g in range(rows.shape[1])]
