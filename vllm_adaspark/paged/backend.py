"""Where a method's attention plugs into vLLM: one thin adapter per stock attention backend.

An adapter subclasses the stock backend and hands its kernel either the stock arguments (the dense
path, untouched), a virtual batch, or any sequences that a method makes (see tables.py).  The
kernel, the cache and its layout, fp8 and everything else stay vLLM's.  Tested with vLLM 0.32.0;
out-of-tree backends have no stable contract yet (vLLM RFC #57566), hence the exact pin.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
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

from ..methods.base import AttentionCall
from .depth_metadata import rebuild
from .heads import HeadRanks
from .plan import StepPlan
from .state import KEY_SUMMARIES, BlockSummaries, BlockSums, StepRows
from .tables import Sequences, SharedTensors, VirtualBatch, build_tables, to_virtual
from .tiles import TilePlan


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
        metadata.adaspark_rebuild = partial(rebuild, self, common_attn_metadata)
        return metadata


def _host_rows(common: CommonAttentionMetadata) -> StepRows:
    seq_lens = common.seq_lens_cpu_upper_bound  # exact: see startup._settle_speculation
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
    rank's.  ``layer.adaspark`` is the model's :class:`~vllm_adaspark.step.Runtime`.
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
        self._stock = self.stock_impl(num_heads, head_size, scale, num_kv_heads, *args, **kwargs)
        # The same kernel as a virtual sequence sees it: one KV head and its group of query heads.
        group = num_heads // num_kv_heads
        self._virtual = self.stock_impl(group, head_size, scale, 1, *args, **kwargs)
        self._windowed: dict[tuple[bool, int], Any] = {}  # by (one KV head?, window)
        self._key_summaries: BlockSummaries | None = None
        self._value_summaries: BlockSums | None = None

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Never: a method writes the output itself, and does not quantize it."""
        return False

    def fused_rope_kvcache_supported(self) -> bool:
        """Never: a fused update would pass by the one below, and with it the block summaries."""
        return False

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        runtime = layer.adaspark
        plan = runtime.plan
        if plan is None or plan.summary_writes is None or plan.summary_writes.empty:
            return
        if self._key_summaries is None:
            blocks, kv_heads, block_size, _ = kv_cache.shape
            shape = (blocks, kv_heads, self.head_size, block_size, key.device, key.dtype)
            settings = runtime.method.settings
            self._key_summaries = KEY_SUMMARIES[settings.key_summary](*shape)
            if settings.summaries_per_block > 1:
                self._value_summaries = BlockSums(*shape)
        self._key_summaries.write(key, plan.summary_writes)
        if self._value_summaries is not None:
            self._value_summaries.write(value, plan.summary_writes)

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
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the stock ``forward``; shapes ``[tokens, heads, head_size]``.

        ``hidden [tokens, hidden]`` is the layer's normed input, for a method that wants it.
        """
        step = layer.adaspark.plan if attn_metadata is not None else None
        if step is not None and step.drops_after(layer.adaspark_layer):
            self._observe(layer, step, query, key)
        if step is None or not step.attends(layer.adaspark_layer):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        assert output_scale is None and output_block_scale is None, "no fused output quantization"
        runtime, index = layer.adaspark, layer.adaspark_layer
        tokens = int(runtime.rows.query_start[-1])
        query, output_here = query[:tokens], output[:tokens]
        choose, run = self._by_tiles(layer, step, query, kv_cache, attn_metadata, output_here)

        def run_sequences(
            query: torch.Tensor,
            sequences: Sequences,
            output: torch.Tensor,
            *,
            one_kv_head: bool = False,
            window: int | None = None,
            cache: torch.Tensor | None = None,
        ) -> None:
            cache = kv_cache if cache is None else cache
            cache = virtual_cache(cache) if one_kv_head else cache
            self._run_sequences(
                layer, query, cache, attn_metadata, sequences, output, one_kv_head, window
            )

        def scratch_cache(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            size = kv_cache.shape[2]
            made = kv_cache.new_zeros(-(-len(key) // size), *kv_cache.shape[1:])
            slots = torch.arange(len(key), device=key.device)
            super(SparseImpl, self).do_kv_cache_update(layer, key, value, made, slots)
            return made

        call = AttentionCall(
            layer=index,
            query=query,
            key=None if key is None else key[:tokens],
            value=None if value is None else value[:tokens],
            hidden=None if hidden is None else hidden[:tokens],
            output=output_here,
            kv_cache=kv_cache,
            kv_heads=kv_cache.shape[1],
            scale=self._scale_of(layer, query),
            key_summaries=self._key_summaries,
            value_summaries=self._value_summaries,
            modules=getattr(layer, "adaspark_modules", None) or {},
            head_ranks=runtime.head_ranks,
            choose=choose,
            run=run,
            run_sequences=run_sequences,
            scratch_cache=scratch_cache,
            mapped=runtime.mapped,
        )
        runtime.method.attend(step, call)
        return output

    def _observe(
        self, layer: torch.nn.Module, step: StepPlan, query: torch.Tensor, key: torch.Tensor
    ) -> None:
        """Let the method see queries and keys of a layer after which it drops tokens."""
        runtime, index = layer.adaspark, layer.adaspark_layer
        tokens = int(step.depths.rows[step.depths.of(index)].query_start[-1])
        scale = self._scale_of(layer, query)
        runtime.method.observe(step, index, query[:tokens], key[:tokens], scale, runtime.head_ranks)

    def _scale_of(self, layer: torch.nn.Module, query: torch.Tensor) -> float:
        """Of the logits; with an fp8 cache some kernels take queries divided by a scale."""
        return self.scale * (layer._q_scale_float if query.dtype.itemsize == 1 else 1.0)

    def _by_tiles(
        self,
        layer: torch.nn.Module,
        step: StepPlan,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        output: torch.Tensor,
    ) -> tuple[Callable[[torch.Tensor], VirtualBatch], Callable[[VirtualBatch], None]]:
        """``choose`` and ``run`` of a call, for a plan that is made of tiles."""
        plan, index = step.attention, layer.adaspark_layer

        def choose(chosen: torch.Tensor) -> VirtualBatch:
            batch = build_tables(chosen, plan, kv_cache.shape[2])
            step.kept_blocks[index] = batch.kept_blocks
            if step.trace is not None:
                step.trace.cubes(index, chosen)
            return batch

        def run(batch: VirtualBatch) -> None:
            self._attend(layer, query, kv_cache, metadata, batch, plan, output)

        return choose, run

    def _attend(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        batch: VirtualBatch,
        plan: TilePlan,
        output: torch.Tensor,
    ) -> None:
        """Run the kernel on the virtual batch; ``query`` and ``output [tokens, heads, d]``."""
        kv_heads = kv_cache.shape[1]
        if plan.shared is None:  # made by the first layer of a step, used by all
            plan.shared = SharedTensors.make(plan, query, output, kv_heads)
        shared = plan.shared
        sequences = Sequences(
            query_start=shared.query_start,
            seq_lens=batch.seq_lens,
            block_table=batch.block_table,
            queries=plan.num_tokens * kv_heads,
            max_query_len=plan.max_query_len,
            max_seq_len=plan.max_seq_len,
        )
        self._run_sequences(
            layer,
            to_virtual(query, shared.query).flatten(0, 1),
            virtual_cache(kv_cache),
            metadata,
            sequences,
            shared.output.flatten(0, 1),
            one_kv_head=True,
        )
        output.unflatten(1, (kv_heads, -1)).copy_(shared.output.transpose(0, 1))

    def _run_sequences(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: Any,
        sequences: Sequences,
        output: torch.Tensor,
        one_kv_head: bool,
        window: int | None = None,
    ) -> None:
        """Run the stock kernel on ``query [queries, heads, d]``; ``kv_cache`` has its KV heads."""
        impl = self._virtual if one_kv_head else self._stock
        if window is not None:
            impl = self._with_window(impl, one_kv_head, window)
        metadata = self._metadata_of(layer, metadata, sequences, impl, query)
        impl.forward(layer, query, None, None, kv_cache, metadata, output)

    def _metadata_of(
        self,
        layer: torch.nn.Module,
        metadata: Any,
        sequences: Sequences,
        impl: Any,
        query: torch.Tensor,
    ) -> Any:
        """The stock metadata with ``sequences`` in place of the requests, for ``impl``."""
        return replace(
            metadata,
            num_actual_tokens=sequences.queries,
            max_query_len=sequences.max_query_len,
            max_seq_len=sequences.max_seq_len,
            query_start_loc=sequences.query_start,
            seq_lens=sequences.seq_lens,
            block_table=sequences.block_table,
            scheduler_metadata=None,
        )

    def _with_window(self, impl: Any, one_kv_head: bool, window: int) -> Any:
        """``impl`` with a causal sliding window of so many keys, a query's own among them.

        A stock impl takes its window when it is made, and reads nothing but ``sliding_window`` of
        it later; a copy with another window saves making one while a step runs.
        """
        key = (one_kv_head, window)
        if key not in self._windowed:
            self._windowed[key] = made = copy(impl)
            made.sliding_window = self._window_value(window)
        return self._windowed[key]

    @staticmethod
    def _window_value(window: int) -> Any:
        """``sliding_window`` as the stock impl keeps it: keys to the left and right of a query."""
        return (window - 1, 0)


def first_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The first tensor-parallel rank's tensor of this shape, on every rank."""
    group = get_tp_group()
    return tensor if group.world_size == 1 else group.broadcast(tensor.contiguous(), src=0)


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
