"""Where AdaS-Attn plugs into vLLM: one thin adapter per stock attention backend.

An adapter subclasses the stock backend and hands its kernel either the stock arguments (the dense
path, untouched) or a virtual batch (see tables.py).  The kernel, the cache and its layout, fp8 and
everything else stay vLLM's.  Tested with vLLM 0.32.0; out-of-tree backends have no stable contract
yet (vLLM RFC #57566), hence the exact pin.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from .heads import HeadRanks
from .plan import AttentionPlan
from .score import choose_cubes
from .state import KeySums, StepRows
from .tables import SharedTensors, VirtualBatch, build_tables, to_virtual


class SparseBackend(AttentionBackend):
    """What all adapters share; mixed in before a stock backend."""

    forward_includes_kv_cache_update: bool = False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Head-major: a KV head's part of a block is contiguous, so it can pass for a block.
        return (KVCacheLayout.LBHNC,)


class SparseMetadataBuilder:
    """Attaches what the host knows of the step to the stock metadata, as ``adaspark_rows``."""

    # Which cubes a step keeps depends on the data, so the attention op must run outside CUDA
    # graphs; the pieces between attention ops are still captured.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec
    ) -> AttentionCGSupport:
        return AttentionCGSupport.NEVER

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.adaspark_rows = _host_rows(common_attn_metadata)
        return metadata


def _host_rows(common: CommonAttentionMetadata) -> StepRows:
    seq_lens = common.seq_lens_cpu_upper_bound  # exact without speculative decoding
    if seq_lens is None:
        seq_lens = common.seq_lens.cpu()
    return StepRows(
        query_start=common.query_start_loc_cpu.numpy().astype("int64"),
        seq_lens=seq_lens.numpy().astype("int64"),
        block_table=None,  # the runtime has it from the scheduler, for steps with video
    )


class SparseImpl:
    """The layer's forward: dense by the stock path, or sparse over a virtual batch.

    Mixed in before a stock ``AttentionImpl``, whose ``num_heads`` and ``num_kv_heads`` are this
    rank's.  ``layer.adaspark`` is the model's :class:`~vllm_adaspark.runtime.Runtime`.
    """

    stock_impl: ClassVar[type]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, head_size, scale, num_kv_heads, *args, **kwargs)
        # The same kernel as a virtual sequence sees it: one KV head and its group of query heads.
        group = num_heads // num_kv_heads
        self._virtual = self.stock_impl(group, head_size, scale, 1, *args, **kwargs)
        self._key_sums: KeySums | None = None

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        plan = layer.adaspark.plan
        if plan is None or plan.key_writes.empty:
            return
        if self._key_sums is None:
            blocks, kv_heads, block_size, _ = kv_cache.shape
            self._key_sums = KeySums(blocks, kv_heads, self.head_size, block_size, key.device)
        self._key_sums.write(key, plan.key_writes)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the stock ``forward``; shapes ``[tokens, heads, head_size]``."""
        step = layer.adaspark.plan if attn_metadata is not None else None
        plan = step.attention if step is not None else None
        if plan is None or layer.adaspark_layer < plan.dense_layers_range[0]:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        assert output_scale is None and output_block_scale is None, "no fused output quantization"
        assert self._key_sums is not None, "cubes to choose from, but no keys were written"
        query, output_here = query[: plan.num_tokens], output[: plan.num_tokens]
        # With an fp8 cache some kernels take queries that were divided by the layer's q scale.
        scale = self.scale * (layer._q_scale_float if query.dtype.itemsize == 1 else 1.0)
        with step.selection.running(query.device):
            by_head = query.unflatten(1, (kv_cache.shape[1], -1)).transpose(0, 1)
            chosen = choose_cubes(
                by_head, self._key_sums, plan, scale, layer.adaspark_layer,
                layer.adaspark.head_ranks,
            )  # fmt: skip
            batch = build_tables(chosen, plan, kv_cache.shape[2])
        step.kept_blocks[layer.adaspark_layer] = batch.kept_blocks
        if step.trace is not None:
            step.trace.cubes(layer.adaspark_layer, chosen)
        self._attend(layer, query, kv_cache, attn_metadata, batch, plan, output_here)
        return output

    def _attend(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        batch: VirtualBatch,
        plan: AttentionPlan,
        output: torch.Tensor,
    ) -> None:
        """Run the kernel on the virtual batch; ``query`` and ``output [tokens, heads, d]``."""
        kv_heads = kv_cache.shape[1]
        if plan.shared is None:  # made by the first layer of a step, used by all
            plan.shared = SharedTensors.make(plan, query, output, kv_heads)
        shared = plan.shared
        self._virtual.forward(
            layer,
            to_virtual(query, shared.query).flatten(0, 1),
            None,
            None,
            virtual_cache(kv_cache),
            self._virtual_metadata(metadata, batch, plan, shared.query_start),
            shared.output.flatten(0, 1),
        )
        output.unflatten(1, (kv_heads, -1)).copy_(shared.output.transpose(0, 1))

    def _virtual_metadata(
        self, metadata: Any, batch: VirtualBatch, plan: AttentionPlan, query_start: torch.Tensor
    ) -> Any:
        """The stock metadata with the virtual batch in place of the requests."""
        return replace(
            metadata,
            num_actual_tokens=plan.num_tokens * batch.kept_blocks.shape[0],
            max_query_len=plan.max_query_len,
            max_seq_len=plan.max_seq_len,
            query_start_loc=query_start,
            seq_lens=batch.seq_lens,
            block_table=batch.block_table,
            scheduler_metadata=None,
        )


def head_ranks(kv_heads: int) -> HeadRanks | None:
    """The ranks that share a model of so many KV heads; None for a single rank."""
    group = get_tp_group()
    if group.world_size == 1:
        return None
    return HeadRanks(
        rank=group.rank_in_group,
        ranks=group.world_size,
        kv_heads=kv_heads,
        gather=lambda tensor: group.all_gather(tensor, dim=0),
    )


def virtual_cache(kv_cache: torch.Tensor) -> torch.Tensor:
    """``[blocks, kv_heads, B, 2d]`` as ``[blocks * kv_heads, 1, B, 2d]``: see tables.py."""
    blocks, kv_heads, block_size, content = kv_cache.shape
    return kv_cache.view(blocks * kv_heads, 1, block_size, content)  # never a copy
