"""Random steps through one layer of AdaSpark or VideoNSA, on vLLM's CPU kernel, against the twins.

Plan, scores, choice, block tables, kernel and FFN are the ones that serve.  Sets must be equal
wherever the twin's margin says that float32 can tell; outputs equal to rounding.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import numpy as np
import torch
from harness import PagedLayer, sizes
from kernels import test_fast_path, test_videonsa
from kernels.scenes import gather, known_of, relative_rms, rows_of

from vllm_adaspark.methods.adaspark import method as adaspark
from vllm_adaspark.methods.adaspark import reference
from vllm_adaspark.methods.adaspark.reference_choice import choose_under_budget, top_p
from vllm_adaspark.methods.adaspark.settings import (
    COMPENSATIONS,
    IMPORTANCES,
    SCORES,
    SELECTIONS,
    AdaSparkConfig,
)
from vllm_adaspark.methods.base import FFNCall
from vllm_adaspark.methods.videonsa.method import VideoNSA
from vllm_adaspark.methods.videonsa.request import VideoNSARequest
from vllm_adaspark.methods.videonsa.settings import BLOCK, VideoNSASettings

from .cases import Case, Pages, random_requests, random_steps

CUBES = {32: (2, 4, 4), 64: (4, 4, 4), 128: (8, 4, 4)}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # steps may have a single token
BLOCKS = 160  # physical
HIDDEN = 8  # of the FFN's input
FFN_TIE = 2e-6


def random_shape(rng: np.random.Generator) -> dict[str, Any]:
    kv_heads = int(rng.choice([1, 1, 2]))
    return dict(
        heads=kv_heads * int(rng.choice([1, 1, 2, 2, 3, 7])),
        kv_heads=kv_heads,
        head_size=int(rng.choice([32, 32, 64])),
        dtype=str(rng.choice(["float32", "float32", "float32", "bfloat16"])),
    )


# -- AdaSpark -----------------------------------------------------------------------------------


def random_adaspark(rng: np.random.Generator) -> Case:
    block = int(rng.choice([32, 32, 32, 64, 128]))
    server = {
        "cube": CUBES[block],
        "dense_below": int(rng.integers(0, 4)),
        "cube_queries": int(rng.choice([1, 4, 16, 128])),
        "score": str(rng.choice(SCORES)),
    }

    def settings() -> dict[str, Any]:
        budget = rng.random() < 0.2
        named = {
            "enabled": bool(rng.random() > 0.05),
            "min_cubes": int(rng.integers(1, 4)),
            "dense_layers": int(rng.choice([0, 0, 0, 1, 3])),
            "text_queries": str(rng.choice(["sparse", "sparse", "dense"])),
            "importance": str(rng.choice(IMPORTANCES)),
            "compensation": str(rng.choice(COMPENSATIONS)),
        }
        if budget:
            return server | named | {"flops": float(rng.choice([0.15, 0.4, 0.8]))}
        return (
            server
            | named
            | {
                "p_attn": float(rng.choice([0.2, 0.5, 0.8, 0.95, 1.0])),
                "p_ffn": float(rng.choice([0.1, 0.5, 0.9, 1.0])),
                "selection": str(rng.choice(SELECTIONS)),
                "keep": float(rng.choice([0.1, 0.3, 0.7])),
            }
        )

    most = int(rng.choice([3, 6])) if block > 32 else int(rng.choice([4, 9]))
    requests = random_requests(rng, block, settings, most)
    chunk = int(rng.choice([block, 2 * block, 50, 100, 333, 10_000]))
    server["tile_cubes"] = int(rng.integers(1, 3))
    return Case(
        "adaspark",
        random_shape(rng),
        requests,
        random_steps(rng, requests, chunk),
        layer=int(rng.integers(0, 3)),
        extra={"server": server},
    )


def check_adaspark(case: Case) -> Counter:
    """Run a case; count its steps, sets and ties.

    Raises:
        AssertionError: something differs from the twin.
    """
    server = AdaSparkConfig().override(case.extra["server"])
    configs = [AdaSparkConfig().override(r.settings | case.extra["server"]) for r in case.requests]
    pages = Pages(case, configs, BLOCKS)
    shape = case.shape | {"dtype": case.dtype}
    layer = PagedLayer(server, num_blocks=BLOCKS, layer_index=case.layer, **shape)
    layer.kv_cache.normal_()  # what a block held before must not matter
    torch.manual_seed(case.requests[0].seed)
    network = torch.nn.Sequential(
        torch.nn.Linear(HIDDEN, 2 * HIDDEN), torch.nn.SiLU(), torch.nn.Linear(2 * HIDDEN, HIDDEN)
    ).requires_grad_(False)
    for request in pages.requests:
        request.hidden = torch.randn(len(request.is_video), 2, HIDDEN)  # residual, and FFN input
    counts: Counter = Counter()
    with recorded_choices() as seen:
        for step in pages.steps():
            seen.clear()
            tensors = (gather(step, name) for name in "qkv")
            output = layer.step(rows_of(step), known_of(step), *tensors)
            ties = test_fast_path.TIE[case.dtype]
            test_fast_path.check_step(
                step, output, layer, seen, case.layer, TOLERANCE[case.dtype], ties
            )
            counts["steps"] += 1
            counts["sets"] += sum(choice.shape[0] * choice.shape[1] for choice in seen)
            counts += check_ffn(case, step, layer, network)
    return counts


@contextlib.contextmanager
def recorded_choices():
    """Every result of choose_cubes, as the layer sees it."""
    seen: list[torch.Tensor] = []
    original = adaspark.choose_cubes

    def recording(*args):
        seen.append(original(*args))
        return seen[-1]

    adaspark.choose_cubes = recording
    try:
        yield seen
    finally:
        adaspark.choose_cubes = original


def check_ffn(case: Case, step: list, layer: PagedLayer, network: torch.nn.Module) -> Counter:
    """The FFN of a step, whose plan attention has run under."""
    plan, counts = layer.runtime.plan, Counter()
    both = gather(step, "hidden")
    residual, x = both[:, 0].contiguous(), both[:, 1].contiguous()
    output = None
    if plan is not None:
        call = FFNCall(case.layer, x, residual, network, lambda chosen: chosen, None)
        output = layer.runtime.method.ffn(plan, call)
    if output is None:
        output, actives = network(x), {}
    else:
        active = adaspark.active_tokens(x, residual, plan.ffn, case.layer)
        first = plan.ffn.tokens[:, 0].tolist()
        actives = dict(zip(first, active, strict=True))
    start = 0
    for request, count in step:
        chunk = request.done, request.done + count
        want, ran = reference.tile_ffn(
            request.hidden[:, 0], request.hidden[:, 1], network, request.is_video,
            layer.block_size, chunk, request.config, case.layer,
        )  # fmt: skip
        tied = False
        for at in range(start, start + count):
            if at in actives:
                counts["sets"] += 1
                got = actives[at]
                theirs = ran[at - start : at - start + layer.block_size]
                if not torch.equal(got, theirs):
                    assert ffn_margin(request, chunk, layer.block_size) < FFN_TIE, (
                        f"FFN tokens of the cube at {at - start + request.done}"
                    )
                    counts["ties"] += 1
                    tied = True
        if not tied:
            assert ran[[i for i in range(count) if not _in_cube(start + i, actives)]].all()
            error = relative_rms(output[start : start + count], want)
            assert error < 1e-5, f"FFN output differs by {error}"
        start += count
    return counts


def _in_cube(at: int, actives: dict[int, torch.Tensor]) -> bool:
    return any(first <= at < first + len(active) for first, active in actives.items())


def ffn_margin(request: Any, chunk: tuple[int, int], size: int) -> float:
    """How near to a tie the closest choice of a chunk's FFN tokens is."""
    config, shares = request.config, []
    for first in range(-(-chunk[0] // size) * size, chunk[1] - size + 1, size):
        if request.is_video[first : first + size].all():
            x, h = request.hidden[first : first + size].double().unbind(1)
            measure = (x if config.importance == "norm" else h - h.mean(0)).norm(dim=-1)
            shares.append(measure / measure.sum())
    if config.flops is None:
        return min(top_p(share, config.p_ffn, min_keep=1)[1] for share in shares)
    cut = sum(
        1
        for t in range(*chunk)
        if request.is_video[t // size * size :][:size].all()
        and len(request.is_video) >= (t // size + 1) * size
        and (t // size * size < chunk[0] or (t // size + 1) * size > chunk[1])
    )
    return choose_under_budget(shares, config.flops, 1, cut * (1 - config.flops))[1]


# -- VideoNSA, paper mode -------------------------------------------------------------------------


def random_videonsa(rng: np.random.Generator) -> Case:
    def settings() -> dict[str, Any]:
        return {
            "enabled": bool(rng.random() > 0.05),
            "block_counts": int(rng.choice([1, 2, 3, 4, 8, 32])),
            "window_size": int(rng.choice([1, 17, 64, 100, 256])),
        }

    requests = random_requests(rng, BLOCK, settings, int(rng.choice([3, 7])))
    chunk = int(rng.choice([63, 64, 100, 333, 10_000]))
    steps = random_steps(rng, requests, chunk)
    return Case("videonsa", random_shape(rng), requests, steps, extra={"sample": 0})


def check_videonsa(case: Case) -> Counter:
    """As :func:`check_adaspark`; of each request's chunk the twin looks at some tokens."""
    shape = case.shape | {"dtype": case.dtype}
    configs = [VideoNSASettings().override(r.settings) for r in case.requests]
    pages = Pages(case, configs, BLOCKS, kind=VideoNSARequest)
    torch.manual_seed(case.requests[0].seed)
    hidden, heads = test_videonsa.HIDDEN, shape["heads"]
    modules = {
        "g_proj_1": test_videonsa.Projection(hidden, hidden, dtype=case.dtype),
        "g_proj_2": test_videonsa.Projection(hidden, 3 * heads, dtype=case.dtype),
    }
    for module in modules.values():
        module.requires_grad_(False)
    settings = VideoNSASettings()
    method = VideoNSA(settings, sizes(heads, shape["kv_heads"], shape["head_size"]), "cpu")
    layer = PagedLayer(settings, num_blocks=BLOCKS, method=method, modules=modules, **shape)
    layer.kv_cache.normal_()
    for request in pages.requests:
        request.hidden = torch.randn(len(request.is_video), hidden).to(case.dtype)
    scene = test_videonsa.Scene(layer, modules, pages.requests)
    rng, counts = np.random.default_rng(case.requests[0].seed), Counter()
    for step in pages.steps():
        output = scene.step(step)
        compared = test_videonsa.check_step(rng, scene, step, output, TOLERANCE[case.dtype])
        counts += Counter(steps=1, sets=compared)
    return counts
