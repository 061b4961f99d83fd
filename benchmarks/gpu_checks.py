"""What ``gpu_kernels.py`` checks: each Triton kernel of ours against plain PyTorch, same inputs.

A check returns, by name, an error and what it may be at most: a relative RMS, or a share of the
entries of a choice that differ.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from types import SimpleNamespace

import numpy as np
import torch
from gpu_measure import relative_rms

from vllm_adaspark.kernels import ffn, interpreted, videonsa_compress, videonsa_select
from vllm_adaspark.kernels import videonsa_twins as twins
from vllm_adaspark.methods.adaspark import ffn as token_ffn
from vllm_adaspark.methods.adaspark.planner import build_plan
from vllm_adaspark.methods.adaspark.request import AdaSparkRequest
from vllm_adaspark.methods.adaspark.score import choose_cubes
from vllm_adaspark.methods.adaspark.settings import COMPENSATIONS, SCORES, AdaSparkConfig
from vllm_adaspark.paged.state import KEY_SUMMARIES, StepRows
from vllm_adaspark.paged.tables import build_tables

Found = dict[str, tuple[float, float]]
# Products in bf16 and probabilities rounded to it.
ROUNDING = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
# Scores in bf16 come out the other way where two blocks are almost alike.
NEAR_TIES = {torch.bfloat16: 5e-3, torch.float32: 1e-4}


@contextmanager
def twins_only() -> Iterator[None]:
    """Plain PyTorch in place of the kernels, by the package's own switches."""
    names = {"VLLM_ADASPARK_TRITON": "0", "TRITON_INTERPRET": "0"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def differing(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got != want).float().mean())


def adaspark_attention(device: torch.device, small: bool) -> Found:
    """Scores, Top-p and tables of a step with two requests, chunks of both in it."""
    found = {}
    heads, kv_heads, d = (4, 2, 32) if small else (28, 4, 128)
    for dtype, score in product((torch.bfloat16, torch.float32), SCORES):
        config = AdaSparkConfig(score=score, p_attn=0.6, min_cubes=1, dense_below=1)
        size, cubes = config.cube_volume, 3 if small else 120
        requests, lengths = [], (size * cubes + 40, size * cubes // 2 + 21)
        for length in lengths:
            is_video = np.zeros(length, bool)
            is_video[9:-11] = True
            requests.append(AdaSparkRequest(config, is_video, None))
        start = np.cumsum([0, *lengths])
        width = -(-max(lengths) // size)
        blocks = np.random.default_rng(0).permutation(2 * width).astype(np.int32)
        rows = StepRows(start, np.array(lengths), blocks.reshape(2, width))
        plan = build_plan(
            rows, requests, size, dense_below=1, cube_queries=config.cube_queries, device=device
        )
        query = torch.randn(int(start[-1]), heads, d, device=device).to(dtype)
        kept = KEY_SUMMARIES[config.key_summary](2 * width, kv_heads, d, size, device, dtype)
        key = torch.randn(len(query), kv_heads, d, device=device)
        key += torch.randn(len(key) // 16 + 1, kv_heads, d, device=device).repeat_interleave(16, 0)[
            : len(key)
        ]
        kept.write(key.to(dtype), plan.summary_writes)
        by_head = query.unflatten(1, (kv_heads, -1)).transpose(0, 1).contiguous()
        got = choose_cubes(by_head, kept, plan.attention, d**-0.5, 0)
        table = build_tables(got, plan.attention, size)
        with twins_only():
            want = choose_cubes(by_head, kept, plan.attention, d**-0.5, 0)
            want_table = build_tables(got, plan.attention, size)
        name = f"{str(dtype).removeprefix('torch.')}, {score}"
        found[f"AdaSpark choice, {name}"] = differing(got, want), NEAR_TIES[dtype]
        wrong = differing(table.block_table[:, :-1], want_table.block_table[:, :-1])
        wrong += differing(table.seq_lens, want_table.seq_lens)
        found[f"AdaSpark tables, {name}"] = wrong, 0.0
    return found


def ffn_scene(
    tokens: int, hidden: int, inner: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, SimpleNamespace]:
    """Input, both weights, and a plan whose cubes lie behind each other."""
    size = 64
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    gate_up = (torch.randn(2 * inner, hidden, device=device) / hidden**0.5).to(dtype)
    down = (torch.randn(hidden, inner, device=device) / inner**0.5).to(dtype)
    cubes = tokens // size - 1
    codes = torch.zeros(cubes, dtype=torch.int64, device=device)
    codes += COMPENSATIONS.index("centroid")
    at = 7 + torch.arange(cubes * size, device=device).view(cubes, size)
    plan = SimpleNamespace(tokens=at, compensation=codes, compensations=(int(codes[0]),))
    return x, gate_up, down, plan


def adaspark_ffn(device: torch.device, small: bool) -> Found:
    """Importances, the partition, gathering, SwiGLU and what skipped tokens get."""
    sizes = (300, 48, 72) if small else (2048, 3584, 4736)
    x, gate_up, down, plan = ffn_scene(*sizes, torch.bfloat16, device)
    found = {}
    for name, centred in (("norms", False), ("deviations", True)):
        measure = token_ffn._deviation if centred else token_ffn._norm
        with twins_only():
            want = measure(x, plan.tokens)
        got = ffn.token_norms(x, plan.tokens, centred=centred)
        found[f"AdaSpark FFN {name}"] = relative_rms(got, want), 1e-5
    if device.type != "cuda" or not ffn.waits_for_nothing(x, gate_up, down):
        return found  # the product needs CUTLASS, on compute capability 9 or 10

    def dense(rows: torch.Tensor) -> torch.Tensor:
        gate, up = (rows @ gate_up.T).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up) @ down.T

    codes = torch.arange(len(plan.tokens), device=device) % len(COMPENSATIONS)
    plan.compensation, plan.compensations = codes, tuple(range(len(COMPENSATIONS)))
    active = torch.rand(plan.tokens.shape, device=device) < 0.5
    active[:, 0] = True
    got = ffn.sparse_swiglu(x, gate_up, down, active, plan)
    want = token_ffn.sparse_ffn(x, dense, active, plan)
    found["AdaSpark FFN"] = relative_rms(got, want), ROUNDING[torch.bfloat16]
    return found


def videonsa(device: torch.device, small: bool) -> Found:
    """The compressed branch with its importances, the choice, and the selected branch."""
    found = {}
    n, width, places = (4, 40, 3) if small else (80, 700, 31)
    d = 32 if small else 128
    for dtype, group, kv_heads in ((torch.bfloat16, 7, 4), (torch.float32, 2, 2)):
        name = str(dtype).removeprefix("torch.")
        query = (1.5 * torch.randn(2 * n, kv_heads * group, d, device=device)).to(dtype)
        tokens = torch.randperm(2 * n, device=device)[:n]
        keys, values = torch.randn(2, kv_heads, width, d, device=device)
        end = torch.randint(1, width + 1, (n,), device=device, dtype=torch.int32)
        begin = (torch.rand(n, device=device) * end).int()
        end[0] = begin[0]  # sees nothing
        arguments = (query, tokens, keys, values.to(dtype), begin, end, width, d**-0.5)
        got, importance = videonsa_compress.compress(*arguments)
        want, want_importance = twins.compress(*arguments)
        there = torch.arange(width, device=device) < (end - begin)[:, None, None]
        rounding = ROUNDING[dtype]
        found[f"VideoNSA cmp, {name}"] = relative_rms(got, want), rounding
        importance = torch.where(there, importance, 0.0)
        found[f"VideoNSA importances, {name}"] = relative_rms(importance, want_importance), 5e-5
        chosen = videonsa_compress.best(importance, end - begin, places)
        want = twins.best(importance, end - begin, places)
        found[f"VideoNSA choice, {name}"] = differing(chosen, want), 0.0

        cache = torch.randn(width + 2, kv_heads, 64, 2 * d, device=device).to(dtype)
        own = torch.full((n,), width, dtype=torch.int32, device=device)
        offset = torch.arange(n, device=device, dtype=torch.int32) % 64
        cache[width, :, int(offset.max()) + 1 :] = cache[-1] = float("nan")  # read by nobody
        arguments = query, tokens, cache, chosen, own, offset, d**-0.5
        got, want = videonsa_select.select(*arguments), twins.select(*arguments)
        found[f"VideoNSA slc, {name}"] = relative_rms(got, want), rounding
    return found


CHECKS: tuple[Callable[[torch.device, bool], Found], ...] = (
    videonsa, adaspark_attention, adaspark_ffn,
)  # fmt: skip

assert interpreted() or torch.cuda.is_available(), "run through gpu_kernels.py"
