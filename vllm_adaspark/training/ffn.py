"""AdaS-FFN of one layer in training: the served functions, and a choice that is made once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..methods.adaspark.ffn import active_tokens, sparse_ffn
from .packing import Step


def sparse_mlp(
    x: torch.Tensor,
    residual: torch.Tensor,
    ffn: Callable[[torch.Tensor], torch.Tensor],
    step: Step,
    layer: int,
) -> torch.Tensor:
    """FFN output of a layer, residual not added.

    Args:
        x: ``[tokens, hidden]`` after the post-attention norm.
        residual: ``[tokens, hidden]`` the stream before it.
        ffn: maps ``[n, hidden]`` to ``[n, hidden]``, token by token.
        step: the forward pass; the choice is left in ``step.active[layer]``, or taken from there.
        layer: index of the layer.
    """
    plan = step.plan.ffn if step.plan is not None else None
    if plan is None or layer < plan.dense_layers_range[0]:
        return ffn(x)
    if layer not in step.active:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            step.active[layer] = active_tokens(x, residual, plan, layer)
    return sparse_ffn(x, ffn, step.active[layer], plan)
