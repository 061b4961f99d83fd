"""Gives the layers of each depth their own attention metadata and slot mapping (paged/depths.py).

vLLM's forward context has both by layer name, and its layers look there.  At the top of the model's
forward the entries of all layers behind an event are replaced: the metadata by asking the builder
again, with the lengths of the depth, so whatever a kernel needs beside lengths is vLLM's to say.
This is a private seam, tested with vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.forward_context import ForwardContext
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

from .depths import DepthRows, Depths

# (rows of a depth, whether tokens are dropped in this step) to (metadata, slot mapping)
Rebuild = Callable[[DepthRows, bool], tuple[Any, torch.Tensor]]


def rebuild(
    builder: AttentionMetadataBuilder,
    common: CommonAttentionMetadata,
    rows: DepthRows,
    dropping: bool,
) -> tuple[Any, torch.Tensor]:
    """The metadata and slot mapping ``[tokens]`` of one depth.

    A step that drops tokens runs eagerly, with as many tokens as there are.  In any other the token
    axis keeps its length, which may be padded for a CUDA graph.

    Args:
        builder: that made the step's metadata.
        common: what it was made from.
        rows: of the depth.
        dropping: whether tokens are dropped in this step.
    """
    device = common.seq_lens.device
    start = torch.from_numpy(rows.query_start).to(common.query_start_loc_cpu.dtype)
    seq_lens = torch.from_numpy(rows.seq_lens).to(common.seq_lens.dtype)
    slots = torch.from_numpy(rows.slots)
    if not dropping:
        padded = torch.full(common.slot_mapping.shape, -1, dtype=slots.dtype)
        padded[: len(slots)] = slots
        slots = padded
    slots = slots.to(device=device, dtype=common.slot_mapping.dtype)
    changed = common.replace(
        query_start_loc=start.to(device) if dropping else common.query_start_loc,
        query_start_loc_cpu=start if dropping else common.query_start_loc_cpu,
        num_actual_tokens=len(rows.slots) if dropping else common.num_actual_tokens,
        seq_lens=seq_lens.to(device),
        seq_lens_cpu_upper_bound=seq_lens,
        max_query_len=int(rows.query_lens.max()),
        max_seq_len=int(rows.seq_lens.max()),
        slot_mapping=slots,
        positions=None,
        # Both were computed from the old lengths.
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
    return builder.build(0, changed), slots


def is_ours(metadata: Any) -> bool:
    """Whether our builder made a layer's metadata (paged/backend.py); a draft model's are stock."""
    return hasattr(metadata, "adaspark_rows")


def give_depths(context: ForwardContext, depths: Depths) -> None:
    """Let every layer of the step see the lengths of its depth.

    Args:
        context: of the step; its metadata were made by our builder (paged/backend.py).
        depths: of the step.
    """
    if depths.dropping:
        context.skip_compiled = True  # sizes change between layers
    metadata = context.attn_metadata
    made: dict[tuple[int, int], tuple[Any, torch.Tensor]] = {}  # by depth and KV cache group
    for name, of_layer in list(metadata.items()):
        depth = depths.of(extract_layer_index(name))
        if depth == 0:
            continue
        key = depth, id(of_layer)
        if key not in made:
            made[key] = of_layer.adaspark_rebuild(depths.rows[depth], depths.dropping)
        metadata[name], context.slot_mapping[name] = made[key]
