"""The FLASH_ATTN and TRITON_ATTN adapters, their GPU kernels replaced by a naive paged attention.

What is tested is all of ours and of vLLM's Python around the kernel: the virtual batch, the cache
views, the metadata.  The kernels themselves need a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import PagedLayer, adaspark
from vllm.v1.attention.backends import flash_attn, triton_attn

from kernels.scenes import gather, known_of, random_request, relative_rms, rows_of
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.paged.adapters import SUPPORTED, adapter_for
from vllm_adaspark.step import Runtime

SHAPE = dict(heads=6, kv_heads=2, head_size=32, dtype=torch.float32)
CONFIG = AdaSparkConfig(p_attn=0.6, min_cubes=1, dense_below=1)


def naive_paged(
    *, q, k, v, out, cu_seqlens_q, seqused_k, block_table, softmax_scale, causal, **ignored
) -> None:
    """As flash_attn_varlen_func and unified_attention; caches ``[blocks, B, heads, d]``."""
    assert causal is True
    size = k.shape[1]
    for i, length in enumerate(seqused_k.tolist()):
        rows = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        queries = rows.stop - rows.start
        assert queries <= ignored["max_seqlen_q"] and length <= ignored["max_seqlen_k"]
        blocks = block_table[i, : -(-length // size)].long()
        keys = k[blocks].flatten(0, 1)[:length].repeat_interleave(q.shape[1] // k.shape[2], 1)
        values = v[blocks].flatten(0, 1)[:length].repeat_interleave(q.shape[1] // k.shape[2], 1)
        logits = torch.einsum("qhd,khd->hqk", q[rows], keys) * softmax_scale
        at = torch.arange(length)
        future = at[None] > (length - queries + torch.arange(queries))[:, None]
        probs = logits.masked_fill(future, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", probs, values)


def naive_cache_write(key, value, key_cache, value_cache, slots, *scales) -> None:
    size = key_cache.shape[1]
    key_cache[slots // size, slots % size] = key
    value_cache[slots // size, slots % size] = value


def flash_metadata(common: dict):
    return flash_attn.FlashAttentionMetadata(**common, scheduler_metadata=torch.zeros(1))


def triton_metadata(common: dict):
    scratch = dict.fromkeys(("softmax_segm_output", "softmax_segm_max", "softmax_segm_expsum"))
    return triton_attn.TritonAttentionMetadata(
        **common, seq_threshold_3D=64, num_par_softmax_segments=16, causal=True, **scratch
    )


@pytest.mark.parametrize("name", ["FLASH_ATTN", "TRITON_ATTN"])
def test_adapter_equals_cpu_adapter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def kernel(**kwargs) -> None:
        calls.append(kwargs)
        naive_paged(**kwargs)

    if name == "FLASH_ATTN":
        monkeypatch.setattr(flash_attn, "_FA4_DENSE_ATTENTION_KERNEL", kernel)
        monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **_: 3)
        monkeypatch.setattr(
            flash_attn, "flash_attn_supports_quant_query_input", lambda: False, raising=False
        )
        monkeypatch.setattr(flash_attn, "reshape_and_cache_flash", naive_cache_write, raising=False)
        stock, make_metadata = flash_attn.FlashAttentionBackend, flash_metadata
    else:
        monkeypatch.setattr(triton_attn, "unified_attention", kernel)
        monkeypatch.setattr(triton_attn, "triton_reshape_and_cache_flash", naive_cache_write)
        stock, make_metadata = triton_attn.TritonAttentionBackend, triton_metadata
    backend = adapter_for(stock)
    assert backend.get_name() == name and issubclass(backend, stock)
    impl = backend.get_impl_cls()(6, 32, 32**-0.5, 2, None, None, "auto")
    runtime = Runtime(adaspark(CONFIG, 6, 2, 32))
    one = torch.ones(())
    layer = SimpleNamespace(
        adaspark=runtime, adaspark_layer=0, _q_scale=one, _k_scale=one, _v_scale=one
    )
    cache = torch.zeros(64, 2, 64, 64)

    cpu = PagedLayer(CONFIG, num_blocks=64, **SHAPE)
    rng = np.random.default_rng(0)
    pool = list(range(1, 60))
    video = [("text", 9), ("video", 64 * 8 + 3), ("text", 12)]
    requests = [
        random_request(rng, CONFIG, layout, **SHAPE, pool=pool, sharpness=2.0)
        for layout in (video, [("text", 200)], video)
    ]
    for counts in ((300, 200, 535), (225, 0, 1)):
        step = [(r, n) for r, n in zip(requests, counts, strict=True) if n]
        rows = rows_of(step)
        q, k, v = (gather(step, name) for name in "qkv")
        want = cpu.step(rows, known_of(step), q, k, v)

        runtime.plan_step(rows, known_of(step), torch.device("cpu"))
        impl.do_kv_cache_update(layer, k, v, cache, cpu._slots)
        metadata = make_metadata(
            dict(
                num_actual_tokens=len(q),
                max_query_len=int(rows.query_lens.max()),
                query_start_loc=torch.from_numpy(rows.query_start).int(),
                max_seq_len=int(rows.seq_lens.max()),
                seq_lens=torch.from_numpy(rows.seq_lens).int(),
                block_table=torch.from_numpy(rows.block_table),
                slot_mapping=cpu._slots,
            )
        )
        out = torch.full_like(q, float("nan"))
        impl.forward(layer, q, k, v, cache, metadata, out)
        assert calls[-1]["k"].shape[2] == 1, "virtual sequences have one KV head"
        assert calls[-1].get("scheduler_metadata") is None, "a schedule for other lengths"
        assert relative_rms(out, want) < 1e-5
        for request, count in step:
            request.done += count


def test_other_backends_are_refused_with_the_fix() -> None:
    class Other(flash_attn.FlashAttentionBackend):
        @staticmethod
        def get_name() -> str:
            return "FLASHINFER"

    with pytest.raises(ValueError, match=r"FLASHINFER.*--attention-backend") as error:
        adapter_for(Other)
    assert all(name in str(error.value) for name in SUPPORTED)
