"""Block state through a KV block's life: reuse, prefix hits, preemption, chunk edges, poison."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from harness import PagedLayer, cpu_takes_fp8

from kernels.scenes import Request, gather, known_of, random_request, relative_rms, rows_of
from kernels.test_fast_path import check_step, chosen_by_tile, record_choices
from vllm_adaspark.methods.adaspark.settings import SCORES, AdaSparkConfig
from vllm_adaspark.paged.state import BlockBounds, SummaryWrites

SHAPE = dict(heads=4, kv_heads=2, head_size=32, dtype=torch.float32)
CONFIG = AdaSparkConfig(p_attn=0.6, min_cubes=1, dense_below=1)
LAYOUT = [("text", 20), ("video", 64 * 9 + 10), ("text", 40)]
BLOCK = CONFIG.cube_volume


def make(seed: int, pool: list[int], layout=LAYOUT, config=CONFIG) -> Request:
    rng = np.random.default_rng(seed)
    return random_request(rng, config, layout, **SHAPE, pool=pool, sharpness=2.0)


def new_layer(config=CONFIG, **kwargs) -> PagedLayer:
    return PagedLayer(config, num_blocks=64, **SHAPE, **kwargs)


def run(layer: PagedLayer, request: Request, count: int) -> torch.Tensor:
    step = [(request, count)]
    out = layer.step(rows_of(step), known_of(step), *(gather(step, name) for name in "qkv"))
    request.done += count
    return out


def run_all(layer: PagedLayer, request: Request, chunk: int, seen: list) -> tuple:
    """Outputs and the choices of every sparse tile, over chunks."""
    outputs, choices = [], {}
    while request.done < len(request.is_video):
        seen.clear()
        outputs.append(run(layer, request, min(chunk, len(request.is_video) - request.done)))
        for (_, position), kept in chosen_by_tile(layer, seen).items():
            choices[position] = kept[:, : position // BLOCK]  # candidates lie before the own block
    return torch.cat(outputs), choices


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list:
    return record_choices(monkeypatch)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("chunk", [64, 100, 10_000])
def test_blocks_are_reused_cleanly(chunk: int, score: str, seen: list) -> None:
    """Blocks that held another video, other text or half a cube say nothing about their past."""
    layer = new_layer(config := CONFIG.override({"score": score}))
    reused: list[int] = []
    layout = [("text", 3), ("video", 64 * 12 + 31), ("text", 70)]
    earlier = make(0, list(range(1, 40)), layout, config)
    run(layer, earlier, 600)
    run(layer, earlier, len(earlier.is_video) - 600)
    reused = earlier.blocks.tolist()
    # Same blocks, other order: where video was there may now be text, and the other way round.
    request = make(1, reused, config=config)
    while request.done < len(request.is_video):
        seen.clear()
        count = min(chunk, len(request.is_video) - request.done)
        step = [(request, count)]
        out = layer.step(rows_of(step), known_of(step), *(gather(step, n) for n in "qkv"))
        check_step(step, out, layer, seen, 0, 1e-5)
        request.done += count


def test_text_over_video_blocks_is_dense(seen: list) -> None:
    """A text-only request in blocks that were cubes runs the stock path."""
    layer, stock = new_layer(), new_layer(sparse=False)
    earlier = make(0, list(range(1, 40)))
    run_all(layer, earlier, 10_000, seen)
    seen.clear()
    text = make(2, earlier.blocks.tolist(), [("text", 300)])
    out = run(layer, text, 300)
    text.done = 0
    assert not seen
    assert torch.equal(out, run(stock, text, 300))


def test_prefix_hit_chooses_as_cold(seen: list) -> None:
    """A request that finds its video in the prefix cache chooses as one that computed it."""
    layer = new_layer()
    cold = make(3, list(range(1, 40)))
    cold_out, cold_choices = run_all(layer, cold, 10_000, seen)

    hit = replace(cold, done=(len(cold.is_video) - 1) // BLOCK * BLOCK)
    own = cold.blocks.copy()
    own[-1] = 50  # the cached blocks are shared, the last one is its own
    hit.blocks = own
    hit_out, hit_choices = run_all(layer, hit, 10_000, seen)
    assert hit_choices
    for block, kept in hit_choices.items():
        assert torch.equal(kept, cold_choices[block])
    assert relative_rms(hit_out, cold_out[-len(hit_out) :]) < 1e-5


def test_preempted_request_chooses_again_alike(seen: list) -> None:
    """Preempted halfway, its blocks handed to others, resumed in other (dirty) blocks."""
    undisturbed = make(4, list(range(1, 40)))
    want_out, want = run_all(new_layer(), undisturbed, 128, seen)

    layer = new_layer()
    request = make(4, list(range(1, 40)))
    run(layer, request, 128 * 3 + 50)
    other = make(5, request.blocks.tolist() + list(range(41, 60)))
    run_all(layer, other, 100, seen)
    request.done = 0
    request.blocks = other.blocks[::-1][: len(request.blocks)].copy()
    out, choices = run_all(layer, request, 128, seen)
    assert choices.keys() == want.keys()
    assert all(torch.equal(choices[b], want[b]) for b in want)
    assert relative_rms(out, want_out) < 1e-5


@pytest.mark.parametrize("chunk", [64, 192, 320])
def test_aligned_chunks_choose_alike(chunk: int, seen: list) -> None:
    """Chunk edges between KV blocks change nothing."""
    _, whole = run_all(new_layer(), make(6, list(range(1, 40))), 10_000, seen)
    _, parts = run_all(new_layer(), make(6, list(range(1, 40))), chunk, seen)
    assert whole.keys() == parts.keys() and len(whole) > 5
    assert all(torch.equal(whole[b], parts[b]) for b in whole)


def test_ragged_chunks_only_compute_more(seen: list) -> None:
    """A cube cut by a chunk edge attends to everything; all others choose as before."""
    request = make(7, list(range(1, 40)))
    _, whole = run_all(new_layer(), request, 10_000, seen)
    _, parts = run_all(new_layer(), make(7, list(range(1, 40))), 100, seen)
    for position, kept in parts.items():
        assert torch.equal(kept, whole[position])
    missing = set(whole) - set(parts)  # these ran dense
    assert missing, "a chunk of 100 must have cut some cube"


def test_batch_mates_do_not_matter(seen: list) -> None:
    """A request chooses the same alone and beside text and other videos."""
    _, alone = run_all(new_layer(), make(8, list(range(1, 40))), 10_000, seen)
    pool = list(range(1, 60))
    layer = new_layer()
    request, text = make(8, pool), make(9, pool, [("text", 130)])
    other_config = CONFIG.override({"p_attn": 0.2, "selection": "uniform", "keep": 0.5})
    other = make(10, pool, config=other_config)
    seen.clear()
    step = [(r, len(r.is_video)) for r in (text, request, other)]
    out = layer.step(rows_of(step), known_of(step), *(gather(step, n) for n in "qkv"))
    check_step(step, out, layer, seen, 0, 1e-5)
    together = {at: kept for (row, at), kept in chosen_by_tile(layer, seen).items() if row == 1}
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[at][:, : at // BLOCK], alone[at]) for at in alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_poisoned_unselected_blocks_reach_nothing(dtype: torch.dtype, seen: list) -> None:
    """NaN in every block a decode token did not select, null block included, leaves it finite."""
    layer = PagedLayer(CONFIG, num_blocks=64, **SHAPE | {"dtype": dtype})
    rng = np.random.default_rng(11)
    request = random_request(
        rng, CONFIG, LAYOUT, **SHAPE | {"dtype": dtype}, pool=list(range(1, 40)), sharpness=2.0
    )
    run(layer, request, len(request.is_video) - 1)
    seen.clear()
    step = [(request, 1)]
    rows = rows_of(step)
    query, key, value = (gather(step, n) for n in ("q", "k", "v"))
    layer.begin(rows, known_of(step))
    layer.write(key, value)
    clean = layer.attend(query)

    plan = layer.runtime.plan.attention
    always = plan.always[0].numpy()
    poisoned = 0
    chosen = seen[-1][0]  # [kv_heads, blocks]
    for head in range(SHAPE["kv_heads"]):
        attended = request.blocks[always | chosen[head].numpy()]
        others = np.setdiff1d(np.arange(len(layer.kv_cache)), attended)
        poisoned += len(np.intersect1d(others, request.blocks))
        layer.kv_cache[others, head] = float("nan")
    assert poisoned > 0, "some of the request's own blocks must be left out"
    assert torch.equal(layer.attend(query), clean)


def test_poison_in_a_selected_block_is_seen(seen: list) -> None:
    """The counter-test: the poison test could fail."""
    layer = new_layer()
    request = make(11, list(range(1, 40)))
    run(layer, request, len(request.is_video) - 1)
    step = [(request, 1)]
    layer.begin(rows_of(step), known_of(step))
    layer.write(gather(step, "k"), gather(step, "v"))
    layer.attend(gather(step, "q"))
    kept = int(seen[-1][0, 0].nonzero()[0])
    layer.kv_cache[request.blocks[kept], 0] = float("nan")
    assert layer.attend(gather(step, "q")).isnan().any()


@pytest.mark.parametrize("score", SCORES)
def test_what_is_kept_of_anchor_blocks_does_not_matter(score: str, seen: list) -> None:
    """A block that is no cube may keep NaN of an earlier owner; no choice may notice."""
    config = CONFIG.override({"score": score})
    request = make(14, list(range(1, 40)), config=config)
    want_out, want = run_all(new_layer(config), request, 10_000, seen)
    layer = new_layer(config)
    again = make(14, list(range(1, 40)), config=config)
    run_all(layer, again, 64, seen)
    layer.impl._key_summaries.vectors.fill_(float("nan"))
    again.done = 0
    out, choices = run_all(layer, again, 10_000, seen)
    assert choices.keys() == want.keys() and all(torch.equal(choices[at], want[at]) for at in want)
    assert torch.equal(out, want_out)


def test_text_queries_dense_leaves_video_tiles_sparse(seen: list) -> None:
    config = CONFIG.override({"text_queries": "dense"})
    layer = new_layer()
    request = make(12, list(range(1, 40)), config=config)
    _, choices = run_all(layer, request, 10_000, seen)
    assert choices and all(request.is_video[position] for position in choices)


@pytest.mark.skipif(not cpu_takes_fp8(), reason="vLLM's CPU kernel takes fp8 with AVX-512 or AMX")
@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_cache(kv_cache_dtype: str, seen: list) -> None:
    """Choices come from unquantised keys, so they are those of a bf16 cache; outputs are close."""
    shape = SHAPE | {"dtype": torch.bfloat16}

    def result(cache: str, sparse: bool = True):
        layer = PagedLayer(CONFIG, num_blocks=64, kv_cache_dtype=cache, sparse=sparse, **shape)
        rng = np.random.default_rng(13)
        request = random_request(rng, CONFIG, LAYOUT, **shape, pool=list(range(1, 40)))
        return run_all(layer, request, 10_000, seen) if sparse else run(layer, request, 600)

    (out, choices), (want, wanted) = result(kv_cache_dtype), result("auto")
    assert wanted and all(torch.equal(choices[b], wanted[b]) for b in wanted)
    stock_error = relative_rms(result(kv_cache_dtype, False), result("auto", False))
    assert relative_rms(out, want) < 1.5 * stock_error


def test_bounds_bound_every_product_of_a_cube() -> None:
    """By the largest and smallest key, written whole, in parts, and in parts over several steps."""
    size, kv_heads, d = 32, 2, 16
    keys = torch.randn(4 * size, kv_heads, d, generator=torch.Generator().manual_seed(0))
    kept = BlockBounds(8, kv_heads, d, size, torch.device("cpu"), torch.bfloat16)
    keys = keys.bfloat16()
    order = torch.arange(4 * size)

    def parts(of: torch.Tensor, blocks: torch.Tensor, fresh: torch.Tensor) -> SummaryWrites:
        return SummaryWrites(None, None, of, blocks, fresh)

    kept.write(keys, SummaryWrites(slice(0, 2 * size), torch.tensor([5, 3]), None, None, None))
    third, fourth = order[2 * size : 3 * size], order[3 * size :]
    kept.write(keys, parts(third, torch.full((size,), 6), torch.tensor([6])))
    half = size // 2
    kept.write(keys, parts(fourth[:half], torch.full((half,), 1), torch.tensor([1])))
    kept.write(keys, parts(fourth[half:], torch.full((half,), 1), torch.tensor([], dtype=int)))

    query = torch.randn(7, kv_heads, d)
    of_cubes = kept.of(torch.tensor([5, 3, 6, 1]))  # [4, kv_heads, 2 * d]
    bound = torch.einsum("qhd,chd->qch", kept.asking(query), of_cubes)
    cubes = keys.float().unflatten(0, (4, size))
    products = torch.einsum("qhd,cthd->qcth", query, cubes).amax(2)
    assert (products <= bound + 1e-5).all()
    reachable = torch.maximum(query[:, None] * cubes.amax(1), query[:, None] * cubes.amin(1)).sum(
        -1
    )
    assert torch.allclose(bound, reachable, atol=1e-5), "and no looser than it must be"
