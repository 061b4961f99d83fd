"""A FLOPs budget: what a prompt costs, counted again naively, and the share that keeps it."""

import numpy as np
import pytest
import torch

from vllm_adaspark.accounts.flops import ModelShape
from vllm_adaspark.methods.adaspark.budget import LEAST_SHARE, prompt_cost
from vllm_adaspark.methods.adaspark.planner import build_plan
from vllm_adaspark.methods.adaspark.request import AdaSparkRequest
from vllm_adaspark.methods.adaspark.settings import COMPENSATIONS, AdaSparkConfig
from vllm_adaspark.paged.plan import MAX_TEXT_TILES
from vllm_adaspark.paged.state import StepRows

SHAPE = ModelShape(hidden=64, heads=4, kv_heads=2, head_size=16, intermediate=160)
BLOCK, LAYERS, CUBE_QUERIES = 8, 3, 4
CPU = torch.device("cpu")


def layout(seed: int) -> np.ndarray:
    """``[tokens]`` bool: the video tokens of a random prompt."""
    rng = np.random.default_rng(seed)
    parts = [np.zeros(int(rng.integers(1, 20)), bool)]
    for _ in range(int(rng.integers(0, 4))):
        parts += [np.ones(int(rng.integers(1, 90)), bool), np.zeros(int(rng.integers(1, 12)), bool)]
    return np.concatenate(parts)


def settings(**rules) -> AdaSparkConfig:
    return AdaSparkConfig(cube=(2, 2, 2), cube_queries=CUBE_QUERIES, **rules)


def naive_spent(is_video, config, share) -> float:
    """FLOPs, token by token and layer by layer, where each tile keeps its share or its least."""
    tokens = len(is_video)
    cube = {b: all(is_video[b * BLOCK : (b + 1) * BLOCK]) for b in range(tokens // BLOCK)}
    h, kv, d, f = SHAPE.heads, SHAPE.kv_heads, SHAPE.head_size, SHAPE.intermediate
    spent = 0.0
    for layer in range(LAYERS):
        sparse = layer >= config.dense_layers and share < 1
        for token in range(tokens):
            spent += 2 * SHAPE.hidden * (h + 2 * kv) * d + 2 * h * d * SHAPE.hidden
            spent += 3 * 2 * SHAPE.hidden * f + (token + 1) * h * 4 * d
            own = token // BLOCK
            before = sum(is_cube for b, is_cube in cube.items() if b < own)
            whole = cube.get(own, False)
            second = config.tile_cubes == 2 and own % 2 and whole and cube[own - 1]
            if second and before - 1 >= max(config.dense_below, 1):
                before -= 1  # it chooses with the cube before it
            if sparse and whole:
                kept = max(share, 1 / BLOCK)  # of a cube's tokens, at least one
                spent -= (1 - kept) * 3 * 2 * SHAPE.hidden * f
                if token % BLOCK == 0 and config.compensation == "centroid":
                    spent += 3 * 2 * SHAPE.hidden * f
            chooses = whole or (not is_video[token] and config.text_queries == "sparse")
            if sparse and chooses and before and before >= config.dense_below:
                kept = max(share * before, min(config.min_cubes, before))
                spent -= (before - kept) * BLOCK * h * 4 * d
                if not whole or token % BLOCK < CUBE_QUERIES:  # so many of a cube are scored
                    spent += before * h * 2 * d
    return spent


@pytest.mark.parametrize("seed", range(30))
def test_the_cost_of_a_prompt_equals_the_loops(seed):
    is_video = layout(seed)
    config = settings(
        dense_below=seed % 4,
        dense_layers=seed % 5,
        text_queries="sparse" if seed % 3 else "dense",
        compensation=COMPENSATIONS[seed % 3],
        min_cubes=1 + seed % 6,
        tile_cubes=1 + seed % 2,
    )
    cost = prompt_cost(SHAPE, LAYERS, is_video, config)
    assert cost.dense == pytest.approx(naive_spent(is_video, config, 1.0))
    for share in (0.02, 0.2, 0.5, 0.9, 1.0):
        assert cost.spent(share, share) == pytest.approx(naive_spent(is_video, config, share))


def plan_of(is_video, config, share, chunk) -> list:
    """The plans of a prompt's chunks."""
    tokens = len(is_video)
    table = np.arange(-(-tokens // BLOCK))[None]
    made = []
    for start in range(0, tokens, chunk):
        end = min(tokens, start + chunk)
        rows = StepRows(np.array([0, end - start]), np.array([end]), table)
        made.append(
            build_plan(
                rows, [AdaSparkRequest(config, is_video, share)], BLOCK,
                dense_below=config.dense_below, cube_queries=CUBE_QUERIES,
                tile_cubes=config.tile_cubes, device=CPU,
            )
        )  # fmt: skip
    return made


def kept_by_plan(plans_made) -> tuple[float, float]:
    """(query token, cube) pairs kept above what must be, and FFN tokens, as the groups allow."""
    pairs = ffn = 0.0
    for plan in plans_made:
        if plan.attention is not None:
            length = plan.attention.tiles.length[plan.attention.sparse_tiles.numpy()]
            for group in plan.attention.budget:
                for rows, keep in zip(group.rows.numpy(), group.keep, strict=True):
                    pairs += keep * min(length[rows[0]], BLOCK)  # a tile of two counts twice
        if plan.ffn is not None:
            ffn += sum(group.keep.sum() for group in plan.ffn.budget)
    return pairs, ffn


@pytest.mark.parametrize("tile_cubes", [1, 2])
@pytest.mark.parametrize("min_cubes", [1, 4, 8, 16])
@pytest.mark.parametrize("seed", range(6))
def test_the_plan_keeps_what_the_cost_counts(seed, min_cubes, tile_cubes):
    """Whole or in chunks between tiles, the groups may keep together what the share says."""
    is_video = np.concatenate(
        [np.zeros(5 + seed, bool), np.ones(400 + seed, bool), np.zeros(9, bool)]
    )
    config = settings(flops=0.5, dense_below=2, min_cubes=min_cubes, tile_cubes=tile_cubes)
    cost = prompt_cost(SHAPE, LAYERS, is_video, config)
    share = cost.share(max(0.5, cost.least + 0.01))
    kept = np.maximum(share * cost.cubes, cost.at_least)
    pairs = float((kept * cost.flops_per_cube).sum()) / (
        LAYERS * BLOCK * SHAPE.attention_flops_per_pair
    )
    cubes = int(cost.ffn / (LAYERS * BLOCK * SHAPE.ffn_flops_per_token))
    for chunk in (10_000, 64, 16 * BLOCK):
        got_pairs, got_ffn = kept_by_plan(plan_of(is_video, config, share, chunk))
        assert got_pairs == pytest.approx(pairs)
        assert got_ffn == pytest.approx(cubes * max(share * BLOCK, 1))


@pytest.mark.parametrize("chunk", [50, 77, 100])
def test_whole_cubes_save_what_a_chunk_edge_costs(chunk):
    """Tokens of a cut cube attend to everything and all run; the others keep as much less."""
    is_video = np.concatenate([np.zeros(5, bool), np.ones(800, bool), np.zeros(9, bool)])
    config, share = settings(flops=0.5, dense_below=2, min_cubes=1), 0.6
    block = np.arange(len(is_video)) // BLOCK
    is_cube = np.array([is_video[block == b].all() for b in range(block[-1] + 1)])
    is_cube[-1] = False  # not full
    before = np.cumsum(is_cube) - is_cube
    pairs, ffn = kept_by_plan(plan_of(is_video, config, share, chunk))
    for start in range(0, len(is_video), chunk):
        for token in range(start, min(start + chunk, len(is_video))):
            first = block[token] * BLOCK
            whole = start <= first and first + BLOCK <= start + chunk
            if is_cube[block[token]] and not whole and before[block[token]] >= 2:
                pairs += before[block[token]]
            ffn += is_cube[block[token]] and not whole
    want_pairs, want_ffn = kept_by_plan(plan_of(is_video, config, share, 10_000))
    assert pairs == pytest.approx(want_pairs)
    assert ffn == pytest.approx(want_ffn)


def long_video(tokens: int = 4000, **rules):
    is_video = np.concatenate([np.zeros(10, bool), np.ones(tokens, bool), np.zeros(20, bool)])
    rules = dict(dense_below=2, min_cubes=1, compensation="mean") | rules
    return prompt_cost(SHAPE, LAYERS, is_video, settings(**rules))


@pytest.mark.parametrize("min_cubes", [1, 8, 16])
@pytest.mark.parametrize("flops", [0.2, 0.3, 0.5, 0.9, 0.99])
def test_the_share_spends_the_budget_to_the_thousandth(flops, min_cubes):
    cost = long_video(min_cubes=min_cubes)
    share = cost.share(flops)
    assert flops * cost.dense - cost.optional / 1000 <= cost.spent(share, share)
    assert cost.spent(share, share) <= flops * cost.dense
    assert share == round(share, 3)


@pytest.mark.parametrize("tokens", [90, 200, 500, 1000])
@pytest.mark.parametrize("min_cubes", [1, 8, 16])
def test_the_smallest_budget_can_be_kept_and_no_smaller_one(tokens, min_cubes):
    cost = long_video(tokens, min_cubes=min_cubes)
    share = cost.share(cost.least + 1e-9)
    assert cost.spent(share, share) <= (cost.least + 1e-6) * cost.dense
    assert cost.spent(LEAST_SHARE, LEAST_SHARE) > (cost.least - 1e-6) * cost.dense
    assert long_video(tokens, min_cubes=1).least <= cost.least


def test_a_budget_is_a_share_of_the_whole_video():
    """Where tokens were dropped, the dense FLOPs are those of the prompt that still had them."""
    is_video = np.concatenate([np.zeros(10, bool), np.ones(2000, bool), np.zeros(20, bool)])
    config = settings(dense_below=2, min_cubes=1)
    kept, all_of_it = (prompt_cost(SHAPE, LAYERS, is_video, config, n) for n in (2000, 0))
    grown = np.concatenate([is_video, np.ones(2000, bool)])
    assert (
        kept.whole
        == prompt_cost(SHAPE, LAYERS, grown, config).dense
        == pytest.approx(naive_spent(grown, config, 1.0))
    )
    assert kept.dense == all_of_it.dense == all_of_it.whole < kept.whole / 2
    assert kept.least == pytest.approx(all_of_it.least * kept.dense / kept.whole)
    half, quarter = kept.share(0.5), kept.share(0.25)
    assert half == 1.0, "dropping tokens keeps it alone"
    assert 0 < quarter < 1
    assert kept.spent(quarter, quarter) <= 0.25 * kept.whole
    assert kept.spent(quarter + 0.002, quarter + 0.002) > 0.25 * kept.whole


def test_edges_of_a_budget():
    cost = long_video()
    assert cost.share(1.0) == 1.0
    assert 0 < cost.least < 0.2
    assert cost.share(cost.least + 0.001) >= LEAST_SHARE
    assert cost.share(cost.least - 0.01) == cost.least - 0.01  # cannot be kept: see its docstring
    text = prompt_cost(SHAPE, LAYERS, np.zeros(50, bool), settings())
    assert (text.optional, text.least, text.share(0.4)) == (0, 1.0, 1.0)
    assert long_video(dense_layers=LAYERS).share(0.4) == 1.0


def test_much_text_after_a_video_is_counted_as_dense():
    """Past MAX_TEXT_TILES of them, text tokens no longer choose."""
    video = np.ones(400, bool)
    few, many = (
        prompt_cost(SHAPE, LAYERS, np.append(video, np.zeros(n, bool)), settings(dense_below=2))
        for n in (MAX_TEXT_TILES, MAX_TEXT_TILES + 1)
    )
    assert len(few.cubes) > len(many.cubes) == 400 // BLOCK - 2
