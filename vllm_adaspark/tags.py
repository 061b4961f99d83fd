"""What a token tells the layers, packed into the spare bits of its M-RoPE position.

Per-token facts must reach every layer, on every tensor- and pipeline-parallel rank, for every
prefill chunk, in both of vLLM's model runners.  M-RoPE positions already go everywhere a token
goes, three numbers a token; runner V2 stages them as int32.  We keep 19 bits of each for the
position and use the 12 bits above it in each of the three rows::

    row 0 (time)    bit 19: is video | bit 20: importance | bits 21-30: attention share
    row 1 (height)  bits 19-20: compensation | bits 21-30: FFN share
    row 2 (width)   bits 19-20: selection rule | bit 21: text queries sparse
                    bits 22-25: min_cubes - 1 | bits 26-29: dense_layers

Shares are in thousandths.

With a budget (``flops``) the rule is :data:`BUDGET`, and both shares say how much of the cubes and
of the FFN tokens may be kept; the model sets them when it knows the whole prompt (budget.py).

Only video tokens carry tags.  Text learns its request's settings from the KV blocks of the video
before it (see attention/state.py), so tokens the model generates need none.  This file is the only
place that packs or unpacks; it needs no vLLM.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .config import (
    COMPENSATIONS,
    IMPORTANCES,
    SELECTIONS,
    SHARE_STEPS,
    TEXT_QUERIES,
    AdaSparkConfig,
)

POSITION_BITS = 19
MAX_POSITION = (1 << POSITION_BITS) - 1
BUDGET = len(SELECTIONS)  # the selection rule of a request with a budget
_FIELD_BITS = 12
_FIELD_MASK = (1 << _FIELD_BITS) - 1
_SHARE_BITS = (_FIELD_MASK & ~3) * (1 | 1 << _FIELD_BITS)


class Tags(NamedTuple):
    """Settings per token or per KV block; every field has the shape of the word unpacked.

    ``word`` is 0 for text.  Shares are in thousandths.
    """

    is_video: torch.Tensor
    attn_share: torch.Tensor
    ffn_share: torch.Tensor
    importance: torch.Tensor  # index into config.IMPORTANCES
    compensation: torch.Tensor  # index into config.COMPENSATIONS
    rule: torch.Tensor  # index into config.SELECTIONS, or BUDGET
    sparse_text: torch.Tensor
    min_cubes: torch.Tensor
    dense_layers: torch.Tensor


def tag_word(config: AdaSparkConfig) -> int:
    """The 36-bit word a video token carries under ``config``.

    A budget's shares are provisional: see :func:`with_shares`.
    """
    attn = config.p_attn if config.selection == "top_p" else config.keep
    ffn = config.p_ffn
    rule = SELECTIONS.index(config.selection)
    if config.flops is not None:
        attn, ffn, rule = config.flops, config.flops, BUDGET
    if not config.enabled:
        attn = ffn = 1.0
    time = 1 | IMPORTANCES.index(config.importance) << 1
    height = COMPENSATIONS.index(config.compensation)
    width = (
        rule
        | (TEXT_QUERIES.index(config.text_queries) ^ 1) << 2
        | (config.min_cubes - 1) << 3
        | config.dense_layers << 7
    )
    return with_shares(time | height << _FIELD_BITS | width << 2 * _FIELD_BITS, attn, ffn)


def with_shares(word: int, attn: float, ffn: float) -> int:
    """``word`` with other shares, each above 0 and at most 1."""
    shares = round(attn * SHARE_STEPS) << 2 | round(ffn * SHARE_STEPS) << _FIELD_BITS + 2
    return word & ~_SHARE_BITS | shares


def unpack(word: torch.Tensor) -> Tags:
    """Words ``[...]`` (int64 tensor or NumPy array, 0 for text) to tags ``[...]``."""
    time = word & _FIELD_MASK
    height = word >> _FIELD_BITS & _FIELD_MASK
    width = word >> 2 * _FIELD_BITS & _FIELD_MASK
    return Tags(
        is_video=(time & 1) != 0,
        attn_share=time >> 2,
        ffn_share=height >> 2,
        importance=time >> 1 & 1,
        compensation=height & 3,
        rule=width & 3,
        sparse_text=(width >> 2 & 1) != 0,
        min_cubes=(width >> 3 & 15) + 1,
        dense_layers=width >> 7 & 15,
    )


def add_tags(positions: torch.Tensor, word: int, tokens: slice) -> None:
    """Put ``word`` into the positions of ``tokens``, in place.

    Args:
        positions: ``[3, n]`` integer M-RoPE positions, none above :data:`MAX_POSITION`.
        word: from :func:`tag_word`.
        tokens: the video's tokens.

    Raises:
        ValueError: a position does not fit in 19 bits.
    """
    largest = int(positions[:, tokens].max()) if positions[:, tokens].numel() else 0
    if largest > MAX_POSITION:
        raise ValueError(
            f"M-RoPE position {largest} is above {MAX_POSITION}, the largest AdaSpark can tag; "
            "give the video a higher fps or fewer frames"
        )
    for row in range(3):
        field = word >> row * _FIELD_BITS & _FIELD_MASK
        positions[row, tokens] |= field << POSITION_BITS


def split_tags(
    positions: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tagged positions ``[3, n]`` to (plain positions ``[3, n]``, tag words ``[n]`` int64)."""
    fields = (positions >> POSITION_BITS).to(torch.int64)
    words = fields[0] | fields[1] << _FIELD_BITS | fields[2] << 2 * _FIELD_BITS
    return torch.bitwise_and(positions, MAX_POSITION, out=out), words
