"""A FLOPs budget: what a prompt costs, counted again naively, and the share that meets it."""

import numpy as np
import pytest
import torch

from vllm_adaspark.accounting import ModelShape
from vllm_adaspark.attention.planner import build_plan
from vllm_adaspark.attention.state import BlockTags, StepRows
from vllm_adaspark.budget import LEAST_SHARE, prompt_cost
from vllm_adaspark.config import COMPENSATIONS, AdaSparkConfig
from vllm_adaspark.tags import tag_word

SHAPE = ModelShape(hidden=64, heads=4, kv_heads=2, head_size=16, intermediate=160)
BLOCK, LAYERS, CUBE_QUERIES = 8, 3, 4


def layout(seed: int) -> tuple[int, list[tuple[int, int]]]:
    """Tokens and videos (offset, length) of a random prompt."""
    rng = np.random.default_rng(seed)
    tokens, videos = int(rng.integers(1, 20)), []
    for _ in range(int(rng.integers(0, 4))):
        length = int(rng.integers(1, 90))
        videos.append((tokens, length))
        tokens += length + int(rng.integers(1, 12))
    return tokens, videos


def naive_cost(tokens, videos, *, dense_below, dense_layers, sparse_text, compensation):
    """(dense, optional, selection, compensation) FLOPs, token by token and layer by layer."""
    video = [any(start <= t < start + n for start, n in videos) for t in range(tokens)]
    cube = {b: all(video[b * BLOCK : (b + 1) * BLOCK]) for b in range(tokens // BLOCK)}
    h, kv, d, f = SHAPE.heads, SHAPE.kv_heads, SHAPE.head_size, SHAPE.intermediate
    dense = optional = selection = centroids = 0
    for layer in range(LAYERS):
        for token in range(tokens):
            projections = 2 * SHAPE.hidden * (h + 2 * kv) * d + 2 * h * d * SHAPE.hidden
            dense += projections + 3 * 2 * SHAPE.hidden * f + (token + 1) * h * 4 * d
            if layer < dense_layers:
                continue
            own = token // BLOCK
            before = sum(is_cube for b, is_cube in cube.items() if b < own)
            whole = cube.get(own, False)
            if whole:
                optional += 3 * 2 * SHAPE.hidden * f
                if token % BLOCK == 0 and compensation == "centroid":
                    centroids += 3 * 2 * SHAPE.hidden * f
            chooses = whole or (not video[token] and sparse_text)
            if chooses and before and before >= dense_below:
                optional += before * BLOCK * h * 4 * d
                if not whole or token % BLOCK < CUBE_QUERIES:  # so many of a cube are asked
                    selection += before * h * 2 * d
    return dense, optional, selection, centroids


@pytest.mark.parametrize("seed", range(30))
def test_the_cost_of_a_prompt_equals_the_loops(seed):
    tokens, videos = layout(seed)
    rules = dict(dense_below=seed % 4, dense_layers=seed % 5, sparse_text=seed % 3 > 0)
    rules["compensation"] = COMPENSATIONS[seed % 3]
    cost = prompt_cost(
        SHAPE, LAYERS, tokens, videos, block_size=BLOCK, cube_queries=CUBE_QUERIES, **rules
    )
    expected = naive_cost(tokens, videos, **rules)
    assert (cost.dense, cost.optional, cost.selection, cost.compensation) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(10))
def test_the_cost_counts_what_the_plan_scores(seed):
    tokens, videos = layout(seed)
    config = AdaSparkConfig(flops=0.5, cube=(2, 2, 2), dense_below=2)
    words = np.zeros(tokens, np.int64)
    for start, length in videos:
        words[start : start + length] = tag_word(config)
    blocks = -(-tokens // BLOCK)
    rows = StepRows(np.array([0, tokens]), np.array([tokens]), np.arange(blocks)[None])
    plan = build_plan(
        rows,
        words,
        BlockTags(blocks, BLOCK),
        dense_below=2,
        cube_queries=CUBE_QUERIES,
        device=torch.device("cpu"),
    )
    seen = scored = cubes = 0
    if plan is not None and plan.attention is not None:
        tiles = plan.attention.tiles
        candidates = tiles.candidates.sum(axis=1)
        seen = int((candidates * tiles.length).sum())
        scored = int((candidates * tiles.asked).sum())
    if plan is not None and plan.ffn is not None:
        cubes = len(plan.ffn.tokens)
    cost = prompt_cost(
        SHAPE, 1, tokens, videos,
        block_size=BLOCK, dense_below=2, dense_layers=0, sparse_text=True,
        compensation=config.compensation, cube_queries=CUBE_QUERIES,
    )  # fmt: skip
    assert cost.selection == scored * SHAPE.score_flops_per_pair
    attention = seen * BLOCK * SHAPE.attention_flops_per_pair
    assert cost.optional == attention + cubes * BLOCK * SHAPE.ffn_flops_per_token
    assert cost.compensation == cubes * SHAPE.ffn_flops_per_token


def long_video(**rules):
    rules = dict(dense_below=2, dense_layers=0, sparse_text=True, compensation="mean") | rules
    rules |= {"cube_queries": CUBE_QUERIES}
    return prompt_cost(SHAPE, LAYERS, 4030, [(10, 4000)], block_size=BLOCK, **rules)


@pytest.mark.parametrize("flops", [0.2, 0.3, 0.5, 0.9, 0.99])
def test_the_share_spends_the_budget_to_the_thousandth(flops):
    cost = long_video()
    share = cost.share(flops)
    spent = cost.dense - cost.optional + cost.selection + share * cost.optional
    assert flops * cost.dense - cost.optional / 1000 <= spent <= flops * cost.dense
    assert share == round(share, 3)


def test_edges_of_a_budget():
    cost = long_video()
    assert cost.share(1.0) == 1.0
    assert 0 < cost.least < 0.2
    assert cost.share(cost.least + 0.001) >= LEAST_SHARE
    assert cost.share(cost.least - 0.01) == cost.least - 0.01  # cannot be met: see its docstring
    text = prompt_cost(
        SHAPE, LAYERS, 50, [],
        block_size=BLOCK, dense_below=2, dense_layers=0, sparse_text=True, compensation="mean",
        cube_queries=CUBE_QUERIES,
    )  # fmt: skip
    assert (text.optional, text.least, text.share(0.4)) == (0, 1.0, 1.0)
    assert long_video(dense_layers=LAYERS).share(0.4) == 1.0
