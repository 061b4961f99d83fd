"""Who attends in the GPU benchmark: dense kernels, and paged ones over the chosen blocks.

A contender is a function that makes one run's closure from a :class:`Scene`, or raises
:class:`Absent` with the reason why it cannot take part on this machine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_paged_kernel import CONFIGS, paged_attention
from gpu_scene import Scene
from torch.nn.attention import SDPBackend, sdpa_kernel

from vllm_adaspark.kernels import interpreted


class Absent(Exception):
    """This contender cannot run here; the message says why."""


# Writes its result into the tensor it is given, or returns it.
Run = Callable[[torch.Tensor], torch.Tensor | None]


# Dense.  Outputs are [queries, heads, d].


def sdpa(backend: SDPBackend) -> Callable[[Scene], Run]:
    """PyTorch's attention by one backend; grouped heads without copies."""

    def make(scene: Scene) -> Run:
        shape = scene.shape
        if backend == SDPBackend.CUDNN_ATTENTION and not scene.query.is_cuda:
            raise Absent("cuDNN needs CUDA")
        q = scene.query.transpose(0, 1).contiguous().unsqueeze(0)
        k, v = scene.keys_and_values().unsqueeze(1).unbind()
        old = shape.tokens - shape.queries
        attend = torch.nn.functional.scaled_dot_product_attention

        def run(out: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                if old:
                    # The cached keys, for which no mask is needed.  Joining both parts is not
                    # done, nor counted, in favour of dense.
                    attend(q, k[:, :, :old], v[:, :, :old], enable_gqa=True)
                own = attend(q, k[:, :, old:], v[:, :, old:], is_causal=True, enable_gqa=True)
            return own[0].transpose(0, 1)

        return run

    return make


def vllm_flash_dense(version: int) -> Callable[[Scene], Run]:
    """vLLM's FlashAttention over the whole block table."""

    def make(scene: Scene) -> Run:
        attend = _vllm_flash(version)
        shape, d, device = scene.shape, scene.shape.head_size, scene.query.device
        cache = scene.cache.transpose(1, 2)  # [blocks, block, kv_heads, 2 d]
        start = torch.tensor([0, shape.queries], dtype=torch.int32, device=device)
        length = torch.tensor([shape.tokens], dtype=torch.int32, device=device)

        def run(out: torch.Tensor) -> None:
            attend(
                q=scene.query, k=cache[..., :d], v=cache[..., d:], out=out, cu_seqlens_q=start,
                max_seqlen_q=shape.queries, seqused_k=length, max_seqlen_k=shape.tokens,
                softmax_scale=shape.scale, causal=True, block_table=scene.blocks[None],
                fa_version=version,
            )  # fmt: skip

        return run

    return make


# Sparse.  Outputs are [kv_heads * queries, group, d].


def own_triton(config: tuple[int, int, int, int]) -> Callable[[Scene], Run]:
    """The benchmark's own kernel, see gpu_paged_kernel.py."""

    def make(scene: Scene) -> Run:
        shape = scene.shape

        def run(out: torch.Tensor) -> None:
            paged_attention(
                scene.by_head.flatten(0, 1), scene.pages, scene.tables, scene.seq_lens,
                scene.query_start, shape.block, shape.scale, out, config,
            )  # fmt: skip

        return run

    return make


def vllm_flash_sparse(version: int) -> Callable[[Scene], Run]:
    """vLLM's FlashAttention over the virtual batch: what the FLASH_ATTN adapter runs."""

    def make(scene: Scene) -> Run:
        attend = _vllm_flash(version)
        shape, d = scene.shape, scene.shape.head_size
        pages = scene.pages.unsqueeze(2)

        def run(out: torch.Tensor) -> None:
            attend(
                q=scene.by_head.flatten(0, 1), k=pages[..., :d], v=pages[..., d:], out=out,
                cu_seqlens_q=scene.query_start, max_seqlen_q=shape.block,
                seqused_k=scene.seq_lens, max_seqlen_k=shape.tokens, softmax_scale=shape.scale,
                causal=True, block_table=scene.tables, fa_version=version,
            )  # fmt: skip

        return run

    return make


def vllm_triton_sparse(scene: Scene) -> Run:
    """vLLM's Triton kernel over the virtual batch: what the TRITON_ATTN adapter runs."""
    if not scene.query.is_cuda:
        raise Absent("vLLM's Triton kernel needs CUDA")
    try:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    except Exception as error:
        raise Absent(f"vLLM: {error}") from error
    shape, d = scene.shape, scene.shape.head_size
    pages = scene.pages.unsqueeze(2)

    def run(out: torch.Tensor) -> None:
        unified_attention(
            q=scene.by_head.flatten(0, 1), k=pages[..., :d], v=pages[..., d:], out=out,
            cu_seqlens_q=scene.query_start, max_seqlen_q=shape.block, seqused_k=scene.seq_lens,
            max_seqlen_k=shape.tokens, softmax_scale=shape.scale, causal=True,
            window_size=(-1, -1), block_table=scene.tables, softcap=0, q_descale=None,
            k_descale=None, v_descale=None,
        )  # fmt: skip

    return run


def _vllm_flash(version: int) -> Callable:
    if not torch.cuda.is_available():
        raise Absent("FlashAttention needs CUDA")
    try:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func
    except Exception as error:  # without vLLM, or a build of it without the kernel
        raise Absent(f"vLLM: {error}") from error
    return flash_attn_varlen_func


DENSE: dict[str, Callable[[Scene], Run]] = {
    "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "vLLM FA2": vllm_flash_dense(2),
    "vLLM FA3": vllm_flash_dense(3),
}


def sparse_contenders() -> dict[str, Callable[[Scene], Run]]:
    """Those that may take part; the benchmark's own in each of its configurations."""
    configs = CONFIGS[:1] if interpreted() else CONFIGS
    own = {f"benchmark's Triton {config}": own_triton(config) for config in configs}
    return own | {
        "vLLM FA2": vllm_flash_sparse(2),
        "vLLM FA3": vllm_flash_sparse(3),
        "vLLM Triton": vllm_triton_sparse,
    }
