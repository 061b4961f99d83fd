"""The gates that mix the branches: one number per token, head and branch, from the normed input.

``sigmoid(g_proj_2(gelu(g_proj_1(x))) / 0.3)``, each on its own: they do not add up to 1.  Row
``3 h + b`` of ``g_proj_2`` belongs to head h and branch b, so tensor-parallel ranks, which hold
consecutive heads, hold consecutive rows of it; ``g_proj_1`` is the same on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

BRANCHES = ("cmp", "slc", "swa")  # in the order of the weights
TEMPERATURE = 0.3
NAMES = ("g_proj_1", "g_proj_2")


def gate_modules(text_config: Any, quant_config: Any, prefix: str) -> dict[str, torch.nn.Module]:
    """The two projections of a layer, made by vLLM's linear layers."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear

    hidden = text_config.hidden_size
    first, second = NAMES
    return {
        first: ReplicatedLinear(
            hidden, hidden, quant_config=quant_config, prefix=f"{prefix}.{first}"
        ),
        second: ColumnParallelLinear(
            hidden,
            len(BRANCHES) * text_config.num_attention_heads,
            quant_config=quant_config,
            prefix=f"{prefix}.{second}",
        ),
    }


def gates_of(hidden: torch.Tensor, modules: Mapping[str, torch.nn.Module]) -> torch.Tensor:
    """Gates ``[tokens, heads, 3]`` in fp32 of this rank's heads; ``hidden [tokens, hidden]``."""
    first, second = (modules[name] for name in NAMES)
    logits, _ = second(functional.gelu(first(hidden)[0]))
    return from_logits(logits.unflatten(-1, (-1, len(BRANCHES))))


def from_logits(logits: torch.Tensor) -> torch.Tensor:
    """Gates in fp32 from what ``g_proj_2`` gave."""
    return torch.sigmoid(logits.float() / TEMPERATURE)


def flops_per_token(hidden: int, heads: int) -> int:
    """Of the two projections, over all heads of the model."""
    return 2 * hidden * (hidden + len(BRANCHES) * heads)
