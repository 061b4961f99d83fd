"""What EVS leaves of a video, and which rate spends given FLOPs.

EVS (vLLM's ``--video-pruning-rate q``) keeps a share 1 − q of a video's tokens, those that differ
most from the same place one patch earlier, and the whole first patch.  The language model never
sees the others.  Its FLOPs are those of a dense prompt with so many tokens; text is counted.
"""

from __future__ import annotations

from vllm_adaspark.accounts.cost import Model

from .videos import Cell


def kept_tokens(cell: Cell, rate: float) -> int:
    """Video tokens that EVS keeps, as vLLM counts them."""
    return max(cell.tokens_per_patch, int(cell.tokens * (1 - rate)))


def flops_ratio(model: Model, kept: int, video_tokens: int, text_tokens: int) -> float:
    """FLOPs of the prompt with ``kept`` of its video tokens, over those with all."""
    return _dense(model, kept + text_tokens) / _dense(model, video_tokens + text_tokens)


def rate_for(model: Model, ratio: float, cell: Cell, text_tokens: int) -> float:
    """The pruning rate at which EVS spends at most ``ratio`` of the dense FLOPs.

    Raises:
        ValueError: not even one patch fits.
    """
    low, high = cell.tokens_per_patch, cell.tokens  # the answer is in [low, high]
    if flops_ratio(model, low, cell.tokens, text_tokens) > ratio:
        raise ValueError(f"ratio={ratio}: less than EVS needs for the first patch of {cell}")
    while low < high:
        middle = (low + high + 1) // 2
        if flops_ratio(model, middle, cell.tokens, text_tokens) <= ratio:
            low = middle
        else:
            high = middle - 1
    # Half a token more, so that no rounding in `1 - rate` loses one.
    return 1 - min(low + 0.5, cell.tokens) / cell.tokens


def _dense(model: Model, tokens: int) -> float:
    """FLOPs of a prompt in one layer, as accounting.Account counts them."""
    shape = model.shape
    pairs = tokens * (tokens + 1) / 2
    return pairs * shape.attention_flops_per_pair + tokens * (
        shape.qkvo_flops_per_token + shape.ffn_flops_per_token
    )
