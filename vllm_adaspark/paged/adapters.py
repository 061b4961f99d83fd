"""The three adapters: CPU_ATTN, FLASH_ATTN and TRITON_ATTN.

Each says only what its kernel needs beyond the shared virtual metadata.  Stock classes are imported
when asked for, because not every build of vLLM can import every backend.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionBackend

from .backend import SparseBackend, SparseImpl, SparseMetadataBuilder, virtual_cache
from .heads_apart import HeadsApart
from .tables import Sequences

SUPPORTED = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")


@cache
def adapter_for(stock: type[AttentionBackend]) -> type[AttentionBackend]:
    """Our backend over the one vLLM chose.

    Raises:
        ValueError: there is no adapter for it; the message says how to choose one that has.
    """
    name = stock.get_name()
    make = {"CPU_ATTN": _cpu, "FLASH_ATTN": _flash, "TRITON_ATTN": _triton}.get(name)
    if make is None:
        raise ValueError(
            f"AdaSpark has no adapter for attention backend {name}; start the server with "
            f"--attention-backend set to one of {', '.join(SUPPORTED)}"
        )
    return make()


def _assemble(stock: type[AttentionBackend], impl: type) -> type[AttentionBackend]:
    """Backend, metadata builder and impl, each ours before the stock one."""
    builder = type(
        f"AdaSpark{stock.get_builder_cls().__name__}",
        (SparseMetadataBuilder, stock.get_builder_cls()),
        {},
    )
    return type(
        f"AdaSpark{stock.__name__}",
        (SparseBackend, stock),
        {
            "get_impl_cls": staticmethod(lambda: impl),
            "get_builder_cls": staticmethod(lambda: builder),
        },
    )


def _cpu() -> type[AttentionBackend]:
    from vllm import _custom_ops, envs
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

    class AdaSparkCPUImpl(SparseImpl, CPUAttentionBackendImpl):
        stock_impl = CPUAttentionBackendImpl

        def _attend(self, layer, query, kv_cache, metadata, batch, plan, output) -> None:
            if plan.shared is None:
                plan.shared = HeadsApart.make(plan, query, output, kv_cache.shape[1])
            apart = plan.shared
            apart.gather(query)
            # Tables are written once for every query head, so no wider than they must be.
            table = batch.block_table[:, : max(1, int(batch.kept_blocks.max()))]
            for part in apart.parts:
                rows = apart.query[part.rows].unflatten(0, (-1, part.heads))
                self._run_sequences(
                    layer,
                    rows,
                    virtual_cache(kv_cache),
                    metadata,
                    self._sequences(batch.seq_lens, table, plan, part),
                    apart.output[part.rows].unflatten(0, (-1, part.heads)),
                    one_kv_head=True,
                )
            apart.scatter(output)

        def _sequences(self, seq_lens, table, plan, part) -> Sequences:
            seq_lens = seq_lens[part.sequences]
            shape = (len(seq_lens), table.shape[1])
            here = plan.scratch.take("part", shape, table.dtype, table.device)
            torch.index_select(table, 0, part.sequences, out=here)
            return Sequences(
                query_start=part.query_start,
                seq_lens=seq_lens,
                block_table=here,
                queries=(part.rows.stop - part.rows.start) // part.heads,
                max_query_len=part.max_query_len,
                max_seq_len=plan.max_seq_len,
            )

        def _metadata_of(self, layer, metadata, sequences, impl, query) -> Any:
            # The CPU kernel splits work over threads by a schedule made from the lengths.
            heads = query.shape[1]
            key = (heads, impl.num_kv_heads, impl.sliding_window)
            if key not in sequences.schedules:
                sequences.schedules[key] = _custom_ops.cpu_attn_get_scheduler_metadata(
                    num_reqs=len(sequences.seq_lens),
                    num_heads=heads,
                    num_kv_heads=impl.num_kv_heads,
                    head_dim=self.head_size,
                    seq_lens=sequences.seq_lens,
                    dtype=query.dtype,
                    query_start_loc=sequences.query_start,
                    causal=True,
                    sliding_window_size=impl.sliding_window,
                    isa=layer.isa,
                    enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
                    dynamic_causal=None,
                    kv_cache_dtype=self.kv_cache_dtype,
                )
            metadata = super()._metadata_of(layer, metadata, sequences, impl, query)
            return replace(metadata, scheduler_metadata=sequences.schedules[key])

        @staticmethod
        def _window_value(window: int) -> int:
            return window

    return _assemble(CPUAttentionBackend, AdaSparkCPUImpl)


def _flash() -> type[AttentionBackend]:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl

    class AdaSparkFlashImpl(SparseImpl, FlashAttentionImpl):
        stock_impl = FlashAttentionImpl

        def _metadata_of(self, *arguments) -> Any:
            metadata = super()._metadata_of(*arguments)
            return replace(metadata, max_num_splits=0)  # let the kernel choose: no plan was made

    return _assemble(FlashAttentionBackend, AdaSparkFlashImpl)


def _triton() -> type[AttentionBackend]:
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

    class AdaSparkTritonImpl(SparseImpl, TritonAttentionImpl):
        stock_impl = TritonAttentionImpl

        def _metadata_of(self, *arguments) -> Any:
            metadata = super()._metadata_of(*arguments)
            # The 3D (split-KV) kernel's scratch is sized for the real batch, so use the 2D one.
            return replace(metadata, seq_threshold_3D=0)

    return _assemble(TritonAttentionBackend, AdaSparkTritonImpl)
