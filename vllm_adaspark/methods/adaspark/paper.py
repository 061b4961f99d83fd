"""The paper to the letter, in plain PyTorch (arXiv 2604.08077, AdaS-Attn and AdaS-FFN).

Every query token and query head chooses its own cubes; every cube chooses its own active tokens.
No engine runs this: reference.py is the rule that the fast path follows, and ``make fidelity``
measures how far that strays from this one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .reference import attend, ffn_of, mean_logits, wide
from .reference_choice import top_p


def paper_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cube_of: torch.Tensor, p: float, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """AdaS-Attn for every query token and query head on its own.

    A query keeps the Top-p of the cubes before its own (text: of the cubes that have ended), and
    attends to these, to its own cube causally, and to all text before it.

    Args:
        q: ``[n, heads, d]`` post-RoPE queries.
        k, v: ``[n, kv_heads, d]`` post-RoPE keys, and values.
        cube_of: ``[n]`` cube of each token, counted from 0 in sequence order, every number in use;
            -1 is text.  At least one cube.
        p: probability mass to keep, in (0, 1].
        scale: of the logits, usually ``d ** -0.5``.

    Returns:
        ``[n, heads, d]`` output and ``[n, heads, cubes]`` bool, the preceding cubes kept.
    """
    q, k, v = wide(q), wide(k), wide(v)
    n, heads, _ = q.shape
    group = heads // k.shape[1]
    members = [(cube_of == j).nonzero().flatten() for j in range(int(cube_of.max()) + 1)]
    mean_keys = torch.stack([k[tokens].mean(0) for tokens in members])  # [cubes, kv_heads, d]
    logits = mean_logits(q, scale * mean_keys)  # [n, heads, cubes]

    kept = torch.zeros(n, heads, len(members), dtype=torch.bool)
    for token in range(n):
        own = int(cube_of[token])
        ended = sum(int(tokens[-1]) < token for tokens in members)
        preceding = own if own >= 0 else ended  # how many; cubes count in sequence order
        for head in range(heads if preceding else 0):
            probs = logits[token, head, :preceding].softmax(-1)
            kept[token, head, :preceding] = top_p(probs, p, min_keep=1)[0]

    at = torch.arange(n)
    out = torch.empty_like(q)
    for rows in at.split(64):  # [m] queries
        always = (cube_of == -1) | (cube_of == cube_of[rows, None])  # [m, n] text and own cube
        for head in range(heads):
            visible = (always | kept[rows, head][:, cube_of]) & (at <= rows[:, None])
            keys, values, here = k[:, head // group], v[:, head // group], slice(head, head + 1)
            out[rows, here] = attend(q[rows, here], keys, values, visible, scale)
    return out, kept


def paper_ffn(
    x: torch.Tensor,
    ffn: Callable[[torch.Tensor], torch.Tensor],
    cube_of: torch.Tensor,
    p: float,
    compensation: str = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's AdaS-FFN: in every cube the tokens that hold ``p`` of the norm mass run the FFN.

    Args:
        x: ``[n, hidden]`` residual stream before the post-attention norm.
        ffn: norm and FFN, ``[m, hidden]`` to ``[m, hidden]``, without the residual.
        cube_of: ``[n]`` as in :func:`paper_attention`; text always runs the FFN.
        compensation: ``"mean"``: a skipped token gets the mean FFN output of its cube's active
            tokens; ``"bypass"``: it gets nothing; ``"centroid"``: the FFN of the skipped tokens'
            mean (ours; here of the stream before the norm).

    Returns:
        ``[n, hidden]`` the residual stream after the FFN, and ``[n]`` bool, the active tokens.
    """
    x = wide(x)
    y = torch.empty_like(x)
    active = cube_of == -1
    y[active] = x[active] + ffn(x[active])
    for cube in range(int(cube_of.max()) + 1):
        tokens = (cube_of == cube).nonzero().flatten()
        norms = x[tokens].norm(dim=-1)
        runs, _ = top_p(norms / norms.sum(), p, min_keep=1)
        branch = ffn_of(x[tokens], ffn, runs, compensation)
        y[tokens] = x[tokens] + branch
        active[tokens] = runs
    return y, active
