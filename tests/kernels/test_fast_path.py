"""The fast path on vLLM's CPU kernel against the naive twin, on random batches.

Selected sets must be exactly equal and outputs equal to rounding (issue: >= 200 random cases).
Where two choices lie closer than float32 can tell (the twin's ``margin``), either is right.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import PagedLayer

from kernels.scenes import Request, gather, known_of, random_request, relative_rms, rows_of
from vllm_adaspark.methods.adaspark import method
from vllm_adaspark.methods.adaspark.reference import Tile, tile_attention
from vllm_adaspark.methods.adaspark.settings import SCORES, AdaSparkConfig
from vllm_adaspark.paged.tiles import DENSE

CASES = 240
PAIRED = 120  # more, with two cubes in a tile
# A bf16 logit may round the other way on another CPU, which moves a pooled probability a little.
TIE = {torch.float32: 2e-6, torch.bfloat16: 2e-4}
CUBES = {32: (2, 4, 4), 64: (4, 4, 4), 128: (8, 4, 4)}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def random_layout(rng: np.random.Generator, block: int) -> list[tuple[str, int]]:
    """Text, then one to three videos with text between, in block-sized proportions."""
    layout = [("text", int(rng.integers(1, 2 * block)))]
    for _ in range(int(rng.integers(1, 4))):
        layout.append(("video", int(rng.integers(1, 6 * block))))
        layout.append(("text", int(rng.integers(1, block + 8))))
    return layout


def random_config(rng: np.random.Generator, block: int) -> AdaSparkConfig:
    selection = str(rng.choice(["top_p", "top_p", "top_k", "uniform", "budget"]))
    return AdaSparkConfig(
        enabled=bool(rng.random() > 0.05),
        p_attn=float(rng.choice([0.2, 0.5, 0.8, 0.95, 1.0])),
        flops=float(rng.choice([0.15, 0.4, 0.8])) if selection == "budget" else None,
        selection="top_p" if selection == "budget" else selection,
        keep=float(rng.choice([0.1, 0.3, 0.7])),
        min_cubes=int(rng.integers(1, 4)),
        dense_layers=int(rng.choice([0, 0, 1, 3])),
        text_queries=str(rng.choice(["sparse", "dense"])),
        cube=CUBES[block],
        dense_below=int(rng.integers(0, 4)),
    )


@pytest.mark.parametrize("seed", range(CASES + PAIRED))
def test_fast_path_equals_twin(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    block = int(rng.choice([32, 32, 64, 128]))
    dtype = torch.float32 if seed % 4 else torch.bfloat16
    kv_heads = int(rng.choice([1, 2]))
    heads = kv_heads * int(rng.choice([1, 2, 4, 7]))
    head_size = int(rng.choice([32, 64, 128]))
    shape = dict(heads=heads, kv_heads=kv_heads, head_size=head_size, dtype=dtype)
    layer_index = int(rng.integers(0, 3))

    # These are the server's; all else may differ from request to request.
    servers = {
        "dense_below": int(rng.integers(0, 4)),
        "cube_queries": int(rng.choice([4, 16, 128])),
        "score": str(rng.choice(SCORES)),
        "tile_cubes": 1 + (seed >= CASES),
    }
    server = AdaSparkConfig(cube=CUBES[block], **servers)
    pool = list(range(1, 200))
    requests = []
    for _ in range(int(rng.integers(1, 4))):
        settings = random_config(rng, block).to_dict() | servers
        config = AdaSparkConfig().override(settings)
        layout = random_layout(rng, block) if rng.random() > 0.15 else [("text", 3 * block + 5)]
        sharpness = float(rng.choice([0.3, 1.0, 3.0]))
        requests.append(
            random_request(rng, config, layout, **shape, pool=pool, sharpness=sharpness)
        )
    layer = PagedLayer(server, num_blocks=200, layer_index=layer_index, **shape)
    # What a block held before must not matter.
    layer.kv_cache.normal_()

    seen = record_choices(monkeypatch)
    chunk = int(rng.choice([block, 2 * block, 100, 333, 10_000]))
    while step := next_step(rng, requests, chunk):
        seen.clear()
        tensors = (gather(step, name) for name in "qkv")
        output = layer.step(rows_of(step), known_of(step), *tensors)
        check_step(step, output, layer, seen, layer_index, TOLERANCE[dtype], TIE[dtype])
        for request, count in step:
            request.done += count


def next_step(
    rng: np.random.Generator, requests: list[Request], chunk: int
) -> list[tuple[Request, int]]:
    """Some requests, each with its next chunk; towards its end a request decodes token by token."""
    step = []
    for request in requests:
        left = len(request.is_video) - request.done
        if not left or (step and rng.random() < 0.3):
            continue
        prefill = left - min(4, request.layout[-1][1] - 1)
        step.append((request, min(chunk, prefill) if prefill > 0 else 1))
    rng.shuffle(step)
    return step


def record_choices(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every result of choose_cubes, as the layer sees it."""
    seen: list[torch.Tensor] = []
    original = method.choose_cubes

    def recording(*args):
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(method, "choose_cubes", recording)
    return seen


def check_step(
    step: list[tuple[Request, int]],
    output: torch.Tensor,
    layer: PagedLayer,
    seen: list[torch.Tensor],
    layer_index: int,
    tolerance: float,
    tie: float = TIE[torch.float32],
) -> None:
    """Compare one step with the twin, request by request."""
    chosen = chosen_by_tile(layer, seen)
    first = 0
    for row, (request, count) in enumerate(step):
        expected, tiles = tile_attention(
            request.q,
            request.k,
            request.v,
            request.is_video,
            layer.block_size,
            (request.done, request.done + count),
            request.config,
            layer=layer_index,
        )
        tied = False
        for tile in tiles:
            tied |= check_tile(tile, chosen.get((row, tile.tokens.start)), tie)
        if not tied:
            assert relative_rms(output[first : first + count], expected) < tolerance
        first += count
    assert first == len(output)


def check_tile(tile: Tile, got: torch.Tensor | None, tie: float) -> bool:
    """Same choice as the twin's; True if it was a tie that rounding may break either way."""
    if got is None:  # this tile was not sparse in the plan
        assert tile.dense or not tile.candidates, f"{tile} should have been sparse"
        return False
    got = got[:, tile.candidates]
    if tile.margin < tie:
        return not torch.equal(got, tile.kept)
    assert torch.equal(got, tile.kept), f"{tile}: fast path kept {got}"
    assert got.any(dim=1).all(), "always at least one cube"
    return False


def chosen_by_tile(
    layer: PagedLayer, seen: list[torch.Tensor]
) -> dict[tuple[int, int], torch.Tensor]:
    """(row, first position) -> ``[kv_heads, blocks]`` kept, for the last step's sparse tiles."""
    if not seen:
        return {}
    tiles, rows = layer.runtime.plan.attention.tiles, layer.runtime.rows
    sparse = tiles.kind != DENSE
    first = rows.token_position[tiles.start[sparse]]
    keys = zip(tiles.row[sparse].tolist(), first.tolist(), strict=True)
    return dict(zip(keys, seen[-1], strict=True))
