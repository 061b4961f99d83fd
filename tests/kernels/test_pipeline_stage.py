"""A later pipeline stage has no embeddings or videos: only what the scheduler tells every worker.

Stock vLLM 0.32.0 fails with pipeline parallelism on the CPU, so this is tested below the engine:
two stages, each with its own runtime and caches, must plan and attend alike.
"""

from __future__ import annotations

import numpy as np
import torch
from harness import PagedLayer

from kernels.scenes import gather, known_of, random_request, rows_of
from vllm_adaspark.config import AdaSparkConfig

SHAPE = dict(heads=4, kv_heads=2, head_size=32, dtype=torch.float32)
CONFIG = AdaSparkConfig(p_attn=0.6, min_cubes=1, dense_below=1, dense_layers=3, p_ffn=0.7)


def test_later_stage_plans_as_the_first_one() -> None:
    rng = np.random.default_rng(0)
    layout = [("text", 20), ("video", 600), ("text", 30)]
    request = random_request(rng, CONFIG, layout, **SHAPE, pool=list(range(1, 40)), sharpness=2.0)
    server = AdaSparkConfig(dense_below=1)
    # Layer 2 is on the first stage and dense for this request, layer 3 on the second and sparse.
    first, second = (
        PagedLayer(server, num_blocks=64, layer_index=index, **SHAPE) for index in (2, 3)
    )
    stock = PagedLayer(server, num_blocks=64, sparse=False, **SHAPE)
    prompt = len(request.is_video) - 3
    differs = False
    for count in (256, prompt - 256, 1, 1, 1):
        step = [(request, count)]
        rows, (q, k, v) = rows_of(step), (gather(step, name) for name in "qkv")
        known = known_of(step)
        outputs = [layer.step(rows, known, q, k, v) for layer in (first, second, stock)]
        assert torch.equal(outputs[0], outputs[2]), "dense_layers is the request's"
        differs |= not torch.allclose(outputs[1], outputs[2], atol=1e-3)
        one, two = first.runtime.plan, second.runtime.plan
        assert np.array_equal(one.cubes_seen, two.cubes_seen)
        assert (one.ffn is None) == (two.ffn is None)
        if one.ffn is not None:
            assert torch.equal(one.ffn.tokens, two.ffn.tokens)
            assert torch.allclose(one.ffn.share, torch.tensor(0.7))
        request.done += count
    assert differs, "the second stage must have been sparse"
