"""One attention layer on vLLM's own CPU kernel, without an engine: for benchmarks and tests.

It does what the model runner does for a step (slots, metadata, cache update, forward) with any
requests, chunk edges and physical blocks the caller wants.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from vllm import _custom_ops, envs
from vllm.v1.attention.backends import cpu_attn

from vllm_adaspark.methods.adaspark.method import AdaSpark
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.methods.base import Method
from vllm_adaspark.paged.adapters import adapter_for
from vllm_adaspark.paged.state import StepRows
from vllm_adaspark.requests import Request
from vllm_adaspark.settings import Settings
from vllm_adaspark.step import Runtime


class PagedLayer:
    """A paged attention layer; ``sparse=False`` gives the stock backend.

    Args:
        config: AdaSpark settings; the cube's volume is the block size.
        heads, kv_heads, head_size, dtype: the layer's shape.
        num_blocks: physical KV blocks, block 0 included (vLLM's null block).
        layer_index: which layer this pretends to be.
        isa: of the kernel, by vLLM's name; None for the one that vLLM would take here.
        method: another method than AdaSpark, made for ``config``.
        modules: the method's own, by name (Method.attention_modules).
    """

    def __init__(
        self,
        config: Settings,
        *,
        heads: int,
        kv_heads: int,
        head_size: int,
        num_blocks: int,
        dtype: torch.dtype = torch.float32,
        kv_cache_dtype: str = "auto",
        layer_index: int = 0,
        sparse: bool = True,
        isa: str | None = None,
        method: Method | None = None,
        modules: Mapping[str, Any] | None = None,
    ) -> None:
        self.block_size = config.cube_volume
        self.heads, self.kv_heads, self.head_size, self.dtype = heads, kv_heads, head_size, dtype
        self.kv_cache_dtype = kv_cache_dtype
        self.runtime = Runtime(method or adaspark(config, heads, kv_heads, head_size))
        isa = isa or cpu_attn._get_attn_isa(dtype, self.block_size, head_size, kv_cache_dtype)
        if isa == "amx":
            # The system hands out tile registers on request.  In an engine oneDNN has asked, in the
            # projections before; without, the kernel dies of an illegal instruction.
            torch.cpu._init_amx()
        self.layer = SimpleNamespace(
            isa=isa,
            _q_scale_float=1.0,
            _k_scale_float=1.0,
            _v_scale_float=1.0,
            adaspark=self.runtime,
            adaspark_layer=layer_index,
            adaspark_modules=modules,
        )
        stock = cpu_attn.CPUAttentionBackend
        backend = adapter_for(stock) if sparse else stock
        current = SimpleNamespace(model_config=SimpleNamespace(dtype=dtype))
        with ExitStack() as stack:  # the constructor asks vLLM's current config for the dtype
            stack.enter_context(patch.object(cpu_attn, "get_current_vllm_config", lambda: current))
            self.impl = backend.get_impl_cls()(
                heads, head_size, head_size**-0.5, kv_heads, None, None, kv_cache_dtype
            )
        cache_dtype = torch.uint8 if kv_cache_dtype.startswith("fp8") else dtype
        self.kv_cache = torch.zeros(
            num_blocks, kv_heads, self.block_size, 2 * head_size, dtype=cache_dtype
        )

    def step(
        self,
        rows: StepRows,
        requests: list[Request | None],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run one step; tensors ``[tokens, heads, head_size]``, output likewise.

        ``hidden [tokens, hidden]`` is the layer's normed input, for a method that wants it.
        """
        self.begin(rows, requests)
        self.write(key, value)
        return self.attend(query, hidden=hidden, written=(key, value))

    def begin(self, rows: StepRows, requests: list[Request | None]) -> None:
        """Plan and metadata, which all layers of a step share."""
        self.runtime.plan_step(rows, requests, torch.device("cpu"))
        nth_block, offset = np.divmod(rows.token_position, self.block_size)
        block = rows.block_table[rows.token_row, nth_block].astype(np.int64)
        self._slots = torch.from_numpy(block * self.block_size + offset)
        query_start = torch.from_numpy(rows.query_start.astype(np.int32))
        seq_lens = torch.from_numpy(rows.seq_lens.astype(np.int32))
        schedule = _custom_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_size,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=query_start,
            causal=True,
            sliding_window_size=-1,
            isa=self.layer.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        self._metadata = cpu_attn.CPUAttentionMetadata(
            num_actual_tokens=len(rows.token_row),
            max_query_len=int(rows.query_lens.max()),
            query_start_loc=query_start,
            max_seq_len=int(rows.seq_lens.max()),
            seq_lens=seq_lens,
            block_table=torch.from_numpy(rows.block_table.astype(np.int32)),
            slot_mapping=self._slots,
            scheduler_metadata=schedule,
        )

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put keys and values into the cache (and, if sparse, into the key sums)."""
        self.impl.do_kv_cache_update(self.layer, key, value, self.kv_cache, self._slots)

    def attend(
        self,
        query: torch.Tensor,
        output: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        written: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    ) -> torch.Tensor:
        """Attention of one layer: selection, tables and kernel.

        ``written`` are the step's keys and values, for a method that wants them once more.
        """
        if output is None:
            output = torch.full_like(query, float("nan"))  # all of it must be written
        extra = {} if hidden is None else {"hidden": hidden}  # the stock impl has no such argument
        self.impl.forward(
            self.layer, query, *written, self.kv_cache, self._metadata, output, **extra
        )
        return output


def one_request(tokens: int, block_size: int, *, start: int = 0, shuffle_seed: int | None = None):
    """StepRows of a single request whose tokens ``start`` to ``tokens`` are in this step."""
    blocks = np.arange(1, -(-tokens // block_size) + 1, dtype=np.int32)
    if shuffle_seed is not None:
        np.random.default_rng(shuffle_seed).shuffle(blocks)
    return StepRows(np.array([0, tokens - start]), np.array([tokens]), blocks[None])


def sizes(heads: int, kv_heads: int, head_size: int) -> SimpleNamespace:
    """The text config of a model of such layers."""
    return SimpleNamespace(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=heads * head_size,
        intermediate_size=1,
        num_hidden_layers=1,
    )


def adaspark(config: AdaSparkConfig, heads: int, kv_heads: int, head_size: int) -> AdaSpark:
    """AdaSpark for a model of such layers."""
    return AdaSpark(config, sizes(heads, kv_heads, head_size), "cpu")


def cpu_takes_fp8() -> bool:
    """Whether vLLM's CPU kernel reads an fp8 cache on this machine."""
    return torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
