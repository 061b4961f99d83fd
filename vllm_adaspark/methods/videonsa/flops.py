"""What a prompt costs, part by part, before any server runs it; as the accounts will count it."""

from __future__ import annotations

import numpy as np
import torch

from ...accounts.flops import ModelShape
from ...paged.state import StepRows
from . import faithful_step, plan
from .request import VideoNSARequest
from .settings import BLOCK, VideoNSASettings


def prompt_flops(
    settings: VideoNSASettings, shape: ModelShape, layers: int, is_vision: np.ndarray
) -> dict[str, float]:
    """FLOPs of a prompt's layers in one step, by part.

    Args:
        settings: their ``mode`` says whose rules.
        shape, layers: of the model.
        is_vision: ``[tokens]`` bool.

    Returns:
        ``qkvo``, ``text``, ``cmp``, ``slc``, ``swa``, ``gates`` and ``ffn``, as accounts name them;
        ``qkvo``, ``attention`` and ``ffn`` of a prompt that attends densely.
    """
    tokens, blocks = len(is_vision), -(-len(is_vision) // BLOCK)
    rows = StepRows(
        query_start=np.array([0, tokens]),
        seq_lens=np.array([tokens]),
        block_table=np.arange(blocks)[None],
    )
    build = faithful_step.build_plan if settings.mode == "faithful" else plan.build_plan
    step = build(rows, [VideoNSARequest(settings, is_vision)], torch.device("cpu"))
    if step is None:
        qkvo, ffn = tokens * shape.qkvo_flops_per_token, tokens * shape.ffn_flops_per_token
        attention = shape.layer_flops(tokens) - qkvo - ffn
        one_layer = {"qkvo": qkvo, "attention": attention, "ffn": ffn}
    else:
        told = step.tell(shape, range(1)).flops
        one_layer = {part: flops.sum() for part, flops in told.items()}
    return {part: float(layers * flops) for part, flops in one_layer.items()}
