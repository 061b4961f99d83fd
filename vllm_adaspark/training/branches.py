"""VideoNSA's attention of one layer: three branches and their gates, as served in paper mode.

A vision token (of a video or an image) attends three times, and its gates weigh the three outputs;
a text token attends densely.  ``methods.videonsa.reference`` is the twin and has the rules:

* *cmp*: the mean keys and values of the whole vision blocks before its own block;
* *slc*: the ``block_counts - 1`` most important of these blocks, and its own block causally;
* *swa*: the last ``window_size`` tokens, its own included.

A text token is written down as one whose selected branch sees all blocks and whose gates are 0, 1
and 0.  Which blocks are selected is chosen without gradient; everything else passes it on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..methods.videonsa.compress import most_important
from ..methods.videonsa.settings import BLOCK
from .attention import by_slab, masked_attention
from .packing import Step

NAME = "videonsa"  # as attn_implementation
TEXT_GATES = (0.0, 1.0, 0.0)  # cmp, slc, swa


@dataclass(frozen=True)
class NSAPlan:
    """What the layers of a step share.

    Attributes:
        is_vision: ``[tokens]`` bool, of the step's tokens.
        block_counts: blocks that a vision token selects, its own included.
        window_size: tokens of the window, its own included.
    """

    is_vision: torch.Tensor
    block_counts: int
    window_size: int


def videonsa_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    step: Step | None = None,
    gates: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """What transformers' AttentionInterface calls.

    Args:
        module: the layer's attention; its ``layer_idx`` counts.
        query: ``[1, heads, tokens, d]``, rotated, the step's tokens.
        key, value: ``[1, kv_heads, tokens, d]``.
        attention_mask: ignored; who sees whom follows from the step.
        step: from the language model's forward.
        gates: ``[tokens, heads, 3]`` from the layer's forward; those of text mean nothing.

    Returns:
        ``[1, tokens, heads, d]`` and no weights.

    Raises:
        RuntimeError: there is no step: the layer was called on its own.
    """
    if step is None or gates is None:
        raise RuntimeError(
            f"attn_implementation={NAME!r} works inside a VideoNSAForConditionalGeneration, and "
            "only through the whole model"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    return gated_attention(q, k, v, gates, step, module.layer_idx, scale, dropout)[None], None


def gated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: torch.Tensor,
    step: Step,
    layer: int,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of the step's tokens.

    Args:
        q: ``[tokens, heads, d]``, rotated.
        k, v: ``[tokens, kv_heads, d]``.
        gates: ``[tokens, heads, 3]`` of the compressed, the selected and the window branch; those
            of text mean nothing.
        step: the forward pass, its plan an :class:`NSAPlan`; the choice is left in
            ``step.cubes[layer]`` ``[tokens, kv_heads, blocks]``, or taken from there.
        layer: index of the layer.
        scale: of the logits.
        dropout: of attention weights.

    Returns:
        ``[tokens, heads, d]``.
    """
    plan: NSAPlan = step.plan
    vision = plan.is_vision
    if layer not in step.cubes:
        step.cubes[layer] = _choose(q, k, step, scale)
    chosen = step.cubes[layer].transpose(0, 1)  # [kv_heads, tokens, blocks]
    gates = torch.where(vision[:, None, None], gates, gates.new_tensor(TEXT_GATES))
    gates = gates.unflatten(1, (k.shape[1], -1)).permute(3, 1, 2, 0)[..., None]
    # [branches, kv_heads, group, tokens, 1]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: slice, keys: torch.Tensor):
        blocks = -(-len(keys) // BLOCK)
        slc = masked_attention(q, k, v, chosen[:, rows, :blocks], BLOCK, scale, dropout)
        if not vision[rows].any():
            return slc
        before = _Cubes.of(vision[keys], q.shape[2])
        probabilities = before.probabilities(q, k, scale)
        cmp = F.dropout(probabilities, dropout).to(v) @ before.means(v).to(v)[:, None]
        m, window = q.shape[2], plan.window_size
        reach = min(len(keys), m + window - 1)  # keys that some window holds
        swa = masked_attention(q, k[:, -reach:], v[:, -reach:], None, BLOCK, scale, dropout, window)
        return sum(
            gate[:, :, rows].to(branch) * branch
            for gate, branch in zip(gates, (cmp, slc, swa), strict=True)
        )

    return by_slab(q, k, v, step, attend)


def _choose(q: torch.Tensor, k: torch.Tensor, step: Step, scale: float) -> torch.Tensor:
    """``[tokens, kv_heads, blocks]`` bool: the blocks each token selects.  No gradient."""
    plan: NSAPlan = step.plan
    kv_heads, blocks = k.shape[1], step.rows.block_table.shape[1]
    chosen = torch.zeros(len(q), kv_heads, blocks, dtype=torch.bool, device=q.device)

    def choose(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: slice, keys: torch.Tensor):
        before = _Cubes.of(plan.is_vision[keys], q.shape[2])
        importance = before.probabilities(q, k, scale).sum(1)  # [kv_heads, m, cubes]
        places = min(plan.block_counts - 1, len(before.cubes))
        best = before.cubes[most_important(importance, before.seen, places)]
        used = torch.arange(places, device=q.device) < before.seen[:, None]
        own = before.own[:, None].expand(kv_heads, -1, 1)
        mine = chosen[rows].transpose(0, 1)  # a view
        mine.scatter_(-1, torch.cat([torch.where(used, best, own), own], -1), True)
        mine[:, ~plan.is_vision[rows]] = True
        return q

    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        by_slab(q, k, k, step, choose)
    return chosen


@dataclass(frozen=True)
class _Cubes:
    """The cubes of a sequence, whole blocks that hold vision tokens, as its last tokens see them.

    Attributes:
        cubes: ``[cubes]`` int64 blocks.
        shares: ``[cubes, BLOCK]`` fp32 weights of a block's tokens in its mean: the vision tokens
            weigh alike, text nothing.
        own: ``[m]`` int64 block of each of the last tokens.
        seen: ``[m]`` int64 how many cubes lie before it.
    """

    cubes: torch.Tensor
    shares: torch.Tensor
    own: torch.Tensor
    seen: torch.Tensor

    @classmethod
    def of(cls, is_vision: torch.Tensor, queries: int) -> _Cubes:
        """Of a sequence ``is_vision [n]``, whose last ``queries`` tokens ask."""
        blocks = len(is_vision) // BLOCK
        by_block = is_vision[: blocks * BLOCK].view(blocks, BLOCK)
        cubes = by_block.any(1).nonzero().flatten()
        shares = by_block[cubes].float()
        at = torch.arange(len(is_vision) - queries, len(is_vision), device=is_vision.device)
        own = at // BLOCK
        return cls(cubes, shares / shares.sum(1, True), own, torch.searchsorted(cubes, own))

    def means(self, states: torch.Tensor) -> torch.Tensor:
        """``[kv_heads, cubes, d]`` fp32 of keys or values ``[kv_heads, n, d]``."""
        blocks = states.shape[1] // BLOCK
        of_cubes = states[:, : blocks * BLOCK].unflatten(1, (blocks, BLOCK))[:, self.cubes]
        return torch.einsum("hcbd,cb->hcd", of_cubes.float(), self.shares)

    def probabilities(self, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        """``[kv_heads, group, m, cubes]`` fp32, over the mean keys seen; 0 where there is none."""
        with torch.autocast(q.device.type, enabled=False):
            logits = q.float() @ self.means(k)[:, None].transpose(-1, -2) * scale
            visible = torch.arange(len(self.cubes), device=q.device) < self.seen[:, None]
            logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
            return logits.softmax(-1) * visible
