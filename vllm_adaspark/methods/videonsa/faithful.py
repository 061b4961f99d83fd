"""What VideoNSA's released code computes, in closed forms and over pages.

``faithful_reference`` says what that is, step by step, and must be equalled.  Here:

* A prompt's vision tokens go through the three branches with the query rows that the released code
  gives each KV head: copies of all heads, padded with zeros to a multiple of 16 per KV head.  The
  copies lie behind each other, so no table of heads is needed: the rows *are* the heads repeated,
  and an output head is the mean of its copies.
* Keys and values with zeroed text lie in a *scratch* paged cache, which this layer fills and the
  next one overwrites.  Its blocks are numbered as in the sequence.  Selection and window run over
  it on a paged kernel (:class:`Pages`); the compressed branch is a product with the blocks' means.
* A token with a zero query weighs everything it sees alike, so what text tokens get from the
  branches, and vision tokens from the dense pass, are means of values: differences of running sums.

All of it is for one request whose whole prompt is in the step, because a vision token sees the
means of later blocks.  Tokens that were generated (and are computed again after a preemption) are
not part of it: they attend densely and get nothing added.

Everything needed of a prompt's layout is known on the host before the first layer
(:func:`plan_prompt`); no function here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from ...paged.tables import Sequences
from .faithful_reference import GROUP_ROWS
from .settings import BLOCK, places_of

# Logits of the compressed branch held at a time, in numbers.
SLAB_LOGITS = 1 << 21


@dataclass(frozen=True)
class PromptPlan:
    """One prompt of ``tokens`` tokens; index tensors on the device.

    Attributes:
        tokens: of the prompt, all of which are in the step.
        vision: ``[n]`` int64 positions of the vision tokens, rising.
        text: ``[m]`` int64 positions of the others, rising.
        own: ``[n]`` the block of each vision token, on the host.
        counts: ``[n]`` int64 blocks that each vision token chooses before its own one.
        places: the most blocks that a token selects, its own included.
        window: tokens of the window branch, the own one included.
        windows: the runs of consecutive vision tokens as sequences over the scratch cache.
        misread_lse: see ``faithful_reference.misread``.
    """

    tokens: int
    vision: torch.Tensor
    text: torch.Tensor
    own: np.ndarray
    counts: torch.Tensor
    places: int
    window: int
    windows: Sequences
    misread_lse: bool = True
    _selections: dict[int, Sequences] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return -(-self.tokens // BLOCK)

    def selection(self, kv_heads: int) -> Sequences:
        """Each vision token and KV head as a sequence of one query: ``kv_head * n + token``.

        How many blocks a token selects is known beforehand; which ones, a layer writes into the
        table.  Made by the first layer, used by all, since layers run one after the other.
        """
        if kv_heads not in self._selections:
            number, device = kv_heads * len(self.vision), self.vision.device
            lengths = self.counts * BLOCK + self.vision % BLOCK + 1
            self._selections[kv_heads] = Sequences(
                query_start=torch.arange(number + 1, dtype=torch.int32, device=device),
                seq_lens=lengths.int().repeat(kv_heads),
                block_table=torch.zeros(number, self.places, dtype=torch.int32, device=device),
                queries=number,
                max_query_len=1,
                max_seq_len=self.places * BLOCK,
            )
        return self._selections[kv_heads]


def plan_prompt(
    is_vision: np.ndarray,
    block_counts: int,
    window: int,
    device: torch.device,
    *,
    misread_lse: bool = True,
) -> PromptPlan:
    """The plan of a prompt ``is_vision [T]`` (bool) under a checkpoint's or request's sizes."""
    vision = np.flatnonzero(is_vision)
    edges = np.flatnonzero(np.diff(is_vision.astype(np.int8), prepend=0, append=0))
    first, end = edges.reshape(-1, 2).T
    blocks = -(-len(is_vision) // BLOCK)
    places = places_of(min(block_counts, max(1, blocks)))  # more would stay empty

    def to(array: np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.as_tensor(array).to(device, dtype)

    windows = Sequences(
        query_start=to(np.concatenate([[0], np.cumsum(end - first)]), torch.int32),
        seq_lens=to(np.ascontiguousarray(end), torch.int32),
        block_table=to(np.tile(np.arange(blocks), (len(end), 1)), torch.int32),
        queries=len(vision),
        max_query_len=int((end - first).max(initial=0)),
        max_seq_len=len(is_vision),
    )
    return PromptPlan(
        tokens=len(is_vision),
        vision=to(vision),
        text=to(np.flatnonzero(~is_vision)),
        own=vision // BLOCK,
        counts=to(np.minimum(vision // BLOCK, places - 1)),
        places=places,
        window=window,
        windows=windows,
        misread_lse=misread_lse,
    )


class Pages(Protocol):
    """A scratch paged cache for one prompt and one layer, and a paged kernel over it."""

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put ``[T, kv_heads, d]`` into blocks 0, 1, ..., in order."""

    def select(
        self, query: torch.Tensor, chosen: torch.Tensor, plan: PromptPlan, scale: float
    ) -> torch.Tensor:
        """Attend to the chosen blocks, and causally to the own one.

        Args:
            query: ``[n, kv_heads, rows, d]`` of the vision tokens.
            chosen: ``[n, kv_heads, places - 1]`` blocks before the own one, rising, then -1.

        Returns:
            As ``query``.
        """

    def attend_window(self, query: torch.Tensor, plan: PromptPlan, scale: float) -> torch.Tensor:
        """Attend to the last ``plan.window`` tokens, the own one included; shapes as above."""


def attend(
    plan: PromptPlan,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: torch.Tensor,
    scale: float,
    pages: Pages,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompt's attention, except for the text tokens' dense part.

    Args:
        plan: of this prompt.
        query: ``[T, H, d]`` after RoPE.
        key, value: ``[T, kv_heads, d]`` after RoPE.
        gates: ``[T, H, 3]`` after the sigmoid; those of text tokens are not read.
        scale: of the logits.
        pages: the scratch cache.

    Returns:
        ``[T, H, d]`` fp32: for vision tokens their attention, for text tokens what the released
        code *adds* to their dense causal attention.  And ``[n, kv_heads, places - 1]`` int64, the
        blocks that vision tokens chose: rising, then -1.
    """
    heads, kv_heads = query.shape[1], key.shape[1]
    key0, value0 = torch.zeros_like(key), torch.zeros_like(value)
    key0[plan.vision], value0[plan.vision] = key[plan.vision], value[plan.vision]
    pages.write(key0, value0)
    mean_keys, mean_values = block_means(key0), block_means(value0)
    rows = group_rows(query[plan.vision], kv_heads)

    compressed, lse = compress(plan, rows, mean_keys, mean_values, scale)
    chosen = choose(plan, rows, mean_keys, misread(lse) if plan.misread_lse else lse, scale)
    branches = (
        compressed,
        pages.select(rows, chosen, plan, scale),
        pages.attend_window(rows, plan, scale),
    )
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    gates = gates[plan.vision].float()
    mixed = value_means(plan, value).repeat_interleave(heads // kv_heads, 1)
    for nth, branch in enumerate(branches):
        mixed += gates[..., nth, None] * mean_of_copies(branch.float(), heads)
    out[plan.vision] = mixed
    if len(plan.text):
        out[plan.text] = text_terms(plan, value0, mean_values, heads)
    return out, chosen


# The released code's rows


def rows_per_group(heads: int, kv_heads: int) -> int:
    """Query rows of each KV head: a multiple of 16, and enough for all heads."""
    return -(-heads // (GROUP_ROWS * kv_heads)) * GROUP_ROWS


def group_rows(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """``[n, H, d]`` to ``[n, kv_heads, rows, d]``: whole copies of the heads, then zeros."""
    heads = query.shape[1]
    rows = rows_per_group(heads, kv_heads) * kv_heads
    copies = rows // heads
    repeated = query.repeat(1, copies, 1)
    padded = torch.nn.functional.pad(repeated, (0, 0, 0, rows - copies * heads))
    return padded.unflatten(1, (kv_heads, -1))


def mean_of_copies(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """``[n, kv_heads, rows, d]`` back to ``[n, H, d]``."""
    flat = rows.flatten(1, 2)
    copies = flat.shape[1] // heads
    return flat[:, : copies * heads].unflatten(1, (copies, heads)).mean(1)


# The compressed branch and the choice of blocks


def block_means(x: torch.Tensor) -> torch.Tensor:
    """``[T, kv_heads, d]`` to ``[kv_heads, blocks, d]`` fp32, the last over its real length."""
    tokens = len(x)
    blocks = -(-tokens // BLOCK)
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, 0, 0, blocks * BLOCK - tokens))
    sums = padded.unflatten(0, (blocks, BLOCK)).sum(1)  # [blocks, kv_heads, d]
    sums[:-1] /= BLOCK
    sums[-1] /= tokens - (blocks - 1) * BLOCK
    return sums.transpose(0, 1).contiguous()


def compress(
    plan: PromptPlan,
    rows: torch.Tensor,
    mean_keys: torch.Tensor,
    mean_values: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to the means of the own block and of all later ones.

    Args:
        rows: ``[n, kv_heads, rows, d]`` of the vision tokens.
        mean_keys, mean_values: ``[kv_heads, blocks, d]`` fp32.

    Returns:
        ``[n, kv_heads, rows, d]`` fp32, and the log-sum-exp of *all* tokens
        ``[kv_heads * rows, T]``: a text token's zero query sees each of its blocks with logit 0.
    """
    _, kv_heads, group, _ = rows.shape
    blocks = plan.blocks
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    at = torch.arange(plan.tokens, device=rows.device)
    lse = (blocks - at // BLOCK).float().log().repeat(kv_heads, group, 1)  # [kv_heads, rows, T]
    for slab in _slabs(plan, kv_heads * group):
        first = int(plan.own[slab.start])  # no token of the slab sees a block before it
        logits = _logits(rows[slab], mean_keys[:, first:], scale)
        own = plan.vision[slab] // BLOCK
        before = torch.arange(first, blocks, device=rows.device) < own[:, None]  # [slab, blocks]
        logits.masked_fill_(before[None, :, None], float("-inf"))
        total = logits.logsumexp(-1)  # [kv_heads, slab, rows]
        lse[:, :, plan.vision[slab]] = total.transpose(1, 2)
        probs = (logits - total[..., None]).exp_()
        mixed = probs.flatten(1, 2) @ mean_values[:, first:]
        out[slab] = mixed.unflatten(1, (-1, group)).transpose(0, 1)
    return out, lse.flatten(0, 1)


def misread(lse: torch.Tensor) -> torch.Tensor:
    """``[rows, T]``, whose memory is read as ``[T, rows]``, and back."""
    rows, tokens = lse.shape
    return lse.view(tokens, rows).T


def choose(
    plan: PromptPlan, rows: torch.Tensor, mean_keys: torch.Tensor, lse: torch.Tensor, scale: float
) -> torch.Tensor:
    """The best ``places - 1`` blocks before each vision token's own one.

    Args:
        rows: ``[n, kv_heads, rows, d]``.
        mean_keys: ``[kv_heads, blocks, d]`` fp32.
        lse: ``[kv_heads * rows, T]``.

    Returns:
        ``[n, kv_heads, places - 1]`` int64, rising, then -1.  Of equal scores the earlier one wins.
    """
    n, kv_heads, group, _ = rows.shape
    lse = lse.unflatten(0, (kv_heads, group))
    chosen = torch.full((n, kv_heads, plan.places - 1), -1, device=rows.device)
    for slab in _slabs(plan, kv_heads * group):
        end = int(plan.own[slab.stop - 1])  # no token of the slab chooses a block from there on
        keep = min(end, plan.places - 1)
        if not keep:
            continue
        logits = _logits(rows[slab], mean_keys[:, :end], scale)
        logits -= lse[:, :, plan.vision[slab]].transpose(1, 2)[..., None]
        scores = logits.exp_().sum(2).transpose(0, 1)  # [slab, kv_heads, blocks]
        own = plan.vision[slab, None, None] // BLOCK
        scores = scores.masked_fill(torch.arange(end, device=rows.device) >= own, -1.0)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
        best = torch.where(best < own, best, end).sort(-1).values
        chosen[slab, :, :keep] = torch.where(best < end, best, -1)
    return chosen


def _slabs(plan: PromptPlan, rows: int) -> list[slice]:
    """The vision tokens in pieces, so that so many rows' logits fit."""
    step = max(1, SLAB_LOGITS // (rows * plan.blocks))
    n = len(plan.own)
    return [slice(first, min(first + step, n)) for first in range(0, n, step)]


def _logits(rows: torch.Tensor, mean_keys: torch.Tensor, scale: float) -> torch.Tensor:
    """``[n, kv_heads, rows, d]``, ``[kv_heads, blocks, d]``: ``[kv_heads, n, rows, blocks]``."""
    flat = rows.transpose(0, 1).flatten(1, 2).float()
    return (flat @ (mean_keys * scale).transpose(1, 2)).unflatten(1, (-1, rows.shape[2]))


# Means of values


def value_means(plan: PromptPlan, value: torch.Tensor) -> torch.Tensor:
    """Means ``[n, kv_heads, d]`` fp32 of all values up to each vision token, its own included."""
    sums = value.cumsum(0, dtype=torch.float64)[plan.vision]
    return (sums / (plan.vision[:, None, None] + 1)).float()


def text_terms(
    plan: PromptPlan, value0: torch.Tensor, mean_values: torch.Tensor, heads: int
) -> torch.Tensor:
    """What text tokens get from the three branches, each with the gate .5.

    Args:
        value0: ``[T, kv_heads, d]``, text zeroed.
        mean_values: ``[kv_heads, blocks, d]`` fp32.
        heads: query heads.

    Returns:
        ``[m, H, d]`` fp32.
    """
    t, kv_heads = plan.text, value0.shape[1]
    own = t // BLOCK

    later = mean_values.transpose(0, 1).double().flip(0).cumsum(0).flip(0)  # from each block on
    compressed = later[own] / (plan.blocks - own)[:, None, None]

    sums = torch.nn.functional.pad(value0.cumsum(0, dtype=torch.float64), (0, 0, 0, 0, 1, 0))
    through = sums[t + 1]
    # All blocks score the same, so by decree the earliest are chosen.
    chosen = own.clamp(max=plan.places - 1) * BLOCK
    own_start = own * BLOCK
    selected = sums[chosen] + through - sums[own_start]
    selected /= (chosen + t + 1 - own_start)[:, None, None]
    window_start = (t + 1 - plan.window).clamp(min=0)
    near = (through - sums[window_start]) / (t + 1 - window_start)[:, None, None]

    terms = 0.5 * (compressed + selected + near).float()  # [m, kv_heads, d]
    rows = rows_per_group(heads, kv_heads)
    return mean_of_copies(terms.unsqueeze(2).expand(-1, -1, rows, -1), heads)


class TorchPages:
    """:class:`Pages` in plain PyTorch: the twin of a paged kernel, and what runs without one."""

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self._keys, self._values = key.transpose(0, 1), value.transpose(0, 1)  # [kv_heads, T, d]

    def select(
        self, query: torch.Tensor, chosen: torch.Tensor, plan: PromptPlan, scale: float
    ) -> torch.Tensor:
        own = (plan.vision // BLOCK)[:, None, None].expand(-1, chosen.shape[1], 1)
        blocks = torch.cat([chosen, own], -1)
        inside = torch.arange(BLOCK, device=query.device)
        slots = (blocks[..., None] * BLOCK + inside).masked_fill(blocks[..., None] < 0, -1)
        return self._attend(query, slots.flatten(2), plan, scale)

    def attend_window(self, query: torch.Tensor, plan: PromptPlan, scale: float) -> torch.Tensor:
        back = torch.arange(plan.window, device=query.device)
        slots = (plan.vision[:, None] - back).clamp(min=-1)
        return self._attend(query, slots[:, None].expand(-1, query.shape[1], -1), plan, scale)

    def _attend(
        self, query: torch.Tensor, slots: torch.Tensor, plan: PromptPlan, scale: float
    ) -> torch.Tensor:
        """Attend to ``slots [n, kv_heads, width]``, those of -1 and of later tokens left out."""
        out = torch.empty_like(query)
        head = torch.arange(slots.shape[1], device=query.device)[:, None]
        step = max(1, SLAB_LOGITS // (slots.shape[2] * query.shape[-1]))
        for first in range(0, len(query), step):
            slab = slice(first, first + step)
            at = slots[slab]  # [slab, kv_heads, width]
            hidden = (at < 0) | (at > plan.vision[slab, None, None])
            at = at.clamp(min=0, max=plan.tokens - 1)
            keys, values = self._keys[head, at], self._values[head, at]  # [..., width, d]
            logits = (query[slab] @ keys.transpose(-1, -2)).float() * scale
            probs = logits.masked_fill(hidden.unsqueeze(-2), float("-inf")).softmax(-1)
            out[slab] = probs.to(values.dtype) @ values
        return out
