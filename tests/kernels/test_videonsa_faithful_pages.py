"""Faithful mode over a scratch cache, on vLLM's CPU kernel, against the transcription."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import PagedLayer, sizes
from torch.nn.functional import gelu

from kernels.scenes import gather, random_request, relative_rms, rows_of
from vllm_adaspark.methods.videonsa import faithful_reference as reference
from vllm_adaspark.methods.videonsa.faithful_step import FaithfulStep
from vllm_adaspark.methods.videonsa.method import VideoNSA
from vllm_adaspark.methods.videonsa.request import VideoNSARequest
from vllm_adaspark.methods.videonsa.settings import VideoNSASettings

HIDDEN = 16
TIE = 1e-4  # scores this close may be ranked either way by float32


class Projection(torch.nn.Linear):
    """As vLLM's linear layers, which also hand out a bias that was left to the caller."""

    def forward(self, x):
        return super().forward(x), None


def layer_of(settings: VideoNSASettings, shape: dict) -> PagedLayer:
    heads = shape["heads"]
    modules = {
        "g_proj_1": Projection(HIDDEN, HIDDEN, dtype=shape["dtype"]).requires_grad_(False),
        "g_proj_2": Projection(HIDDEN, 3 * heads, dtype=shape["dtype"]).requires_grad_(False),
    }
    method = VideoNSA(settings, sizes(heads, shape["kv_heads"], shape["head_size"]), "cpu")
    layer = PagedLayer(settings, num_blocks=40, method=method, modules=modules, **shape)
    layer.kv_cache.normal_()  # what a block held before must not matter
    return layer


@pytest.mark.parametrize(
    "heads, kv_heads, dtype, lse",
    [
        (28, 4, torch.float32, "released"),
        (28, 4, torch.float32, "own"),
        (4, 2, torch.float32, "released"),
        (28, 4, torch.bfloat16, "released"),
    ],
)
def test_a_step_equals_the_transcription(heads, kv_heads, dtype, lse) -> None:
    """Two prompts with vision, one of them with generated tokens behind it, and one of text."""
    torch.manual_seed(heads)
    settings = VideoNSASettings(mode="faithful", block_counts=2, window_size=50, lse=lse)
    shape = dict(heads=heads, kv_heads=kv_heads, head_size=32, dtype=dtype)
    layer = layer_of(settings, shape)
    rng, pool = np.random.default_rng(heads), list(range(1, 40))
    layouts = (
        [("text", 9), ("video", 150), ("text", 7), ("video", 40), ("text", 12)],
        [("text", 40)],
        [("video", 70)],
    )
    generated = (5, 0, 0)  # of the last text tokens
    requests = [
        random_request(rng, settings, layout, **shape, pool=pool, sharpness=1.5)
        for layout in layouts
    ]
    for request in requests:
        request.hidden = torch.randn(len(request.is_video), HIDDEN).to(dtype)
    prompts = [len(request.is_video) - n for request, n in zip(requests, generated, strict=True)]
    step = [(request, len(request.is_video)) for request in requests]
    known = [
        VideoNSARequest(settings, request.is_video[:n].numpy()) if request.is_video.any() else None
        for request, n in zip(requests, prompts, strict=True)
    ]
    tensors = [gather(step, name) for name in ("q", "k", "v", "hidden")]
    output = layer.step(rows_of(step), known, *tensors)
    plan = layer.runtime.plan
    assert isinstance(plan, FaithfulStep) and len(plan.attention.prompts) == 2
    assert plan.attends(0) and plan.gate_sums[0].shape == (3, 3)

    first = 0
    for request, n in zip(requests, prompts, strict=True):
        got = output[first : first + len(request.is_video)]
        first += len(request.is_video)
        modules = layer.layer.adaspark_modules
        logits = modules["g_proj_2"](gelu(modules["g_proj_1"](request.hidden)[0]))[0]
        q, k, v = request.q.double(), request.k.double(), request.v.double()
        text = torch.zeros_like(request.is_video)
        want = reference.dense_pass(q, k, v, text, 32**-0.5)
        same = torch.ones(len(q)).bool()
        if request.is_video.any():
            answer = reference.attend(
                *(x[:n] for x in (q, k, v, request.is_video, logits.unflatten(-1, (-1, 3)))),
                scale=32**-0.5, block_counts=2, window=50, misread_lse=lse == "released",
            )  # fmt: skip
            want[:n] = answer.output
            same[:n] = ~((answer.margins > 0) & (answer.margins < TIE)).any(1)
        assert same.float().mean() > 0.9
        assert relative_rms(got[same], want[same]) < (1e-5 if dtype == torch.float32 else 5e-3)


def test_decode_steps_have_no_plan() -> None:
    settings = VideoNSASettings(mode="faithful")
    shape = dict(heads=4, kv_heads=2, head_size=32, dtype=torch.float32)
    layer = layer_of(settings, shape)
    rng = np.random.default_rng(0)
    request = random_request(
        rng, settings, [("video", 64), ("text", 3)], **shape, pool=list(range(1, 9))
    )
    request.done = 66
    known = [VideoNSARequest(settings, request.is_video[:66].numpy())]
    layer.runtime.plan_step(rows_of([(request, 1)]), known, torch.device("cpu"))
    assert layer.runtime.plan is None
