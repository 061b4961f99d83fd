"""Dropping video tokens: the rule against loops, against vLLM's own, and places through a cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_adaspark.video.order import block_spread, cube_order
from vllm_adaspark.video.prune import (
    COLUMNS,
    VideoSpan,
    WholePrompt,
    kept_tokens,
    split_places,
    survivors,
    with_places,
)

GRIDS = ((1, 3, 5), (2, 4, 4), (7, 6, 5), (40, 4, 6))
RATES = (0.001, 0.3, 0.5, 0.75, 0.9, 0.999)


def footage(grid, seed: int = 0) -> torch.Tensor:
    """A video of which some places change from frame to frame, and the others move a little."""
    rng = np.random.default_rng(seed)
    t, h, w = grid
    video = np.repeat(rng.normal(size=(1, h * w, 16)), t, axis=0)
    video += 0.05 * rng.normal(size=video.shape)
    changes = rng.random((t, h * w)) < 0.4
    video[changes] = rng.normal(size=(int(changes.sum()), 16))
    return torch.tensor(video.reshape(t * h * w, 16), dtype=torch.float32)


def by_loops(video: torch.Tensor, grid, prune: float) -> set[int]:
    """The rule as a sentence: the first frame, then whatever differs most from the frame before."""
    t, h, w = grid
    distance = []
    for token in range(h * w, t * h * w):
        now, before = video[token].double(), video[token - h * w].double()
        distance.append((float(1 - now @ before / (now.norm() * before.norm())), token))
    room = max(0, int(t * h * w * (1000 - round(1000 * prune)) // 1000) - h * w)
    return set(range(h * w)) | {token for _, token in sorted(distance, reverse=True)[:room]}


@pytest.mark.parametrize("grid", GRIDS)
def test_survivors_are_what_differs_most(grid) -> None:
    video, order = footage(grid), cube_order(grid, (4, 4, 4))
    for prune in RATES:
        kept = survivors(video, grid, prune, order).tolist()
        assert len(kept) == kept_tokens(grid, prune)
        assert set(kept) == by_loops(video, grid, prune), prune
        assert kept == [token for token in order.tolist() if token in set(kept)], "in token order"


def test_still_places_go_in_order_of_time() -> None:
    """Of equal distances the earlier token stays, however the sort is implemented."""
    grid = (40, 4, 6)
    still = torch.ones(960, 8)
    order = cube_order(grid, (4, 4, 4), "raster")
    assert survivors(still, grid, 0.5, order).tolist() == list(range(480))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_rule_is_vllms(grid) -> None:
    evs = pytest.importorskip("vllm.multimodal.video_prune.evs")
    video, (t, h, w) = footage(grid, 1), grid
    for prune in RATES:
        mask = evs.compute_retention_mask(video, (t, h, w), 1, prune)
        kept = survivors(video, grid, prune, np.arange(t * h * w))
        # vLLM rounds the number kept in floating point: it may be one short.
        assert len(kept) - int(mask.sum()) in (0, 1)
        assert set(mask.nonzero().flatten().tolist()) <= set(kept.tolist())


def test_the_first_frame_stays_and_no_more_than_was_asked() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        grid, steps = tuple(rng.integers(1, 30, 3).tolist()), int(rng.integers(0, 1000))
        t, h, w = grid
        kept = kept_tokens(grid, steps / 1000)
        assert h * w <= kept <= t * h * w
        assert kept == h * w or kept * 1000 <= t * h * w * (1000 - steps) < (kept + 1) * 1000
    assert kept_tokens((10, 10, 1), 0.9) == 10  # where 100 * (1 - 0.9) is 9.999...


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places_come_back_exactly(dtype) -> None:
    """Also where a position is no number of the dtype: bfloat16 has no 257."""
    grid, per_frame = (600, 2, 3), 27.77
    video = torch.randn(3600, 8).to(dtype)
    tokens = survivors(video, grid, 0.7, cube_order(grid, (4, 4, 4)))
    entry = with_places(video, tokens, grid, per_frame)
    assert entry.dtype == dtype and entry.shape == (len(tokens), 8 + COLUMNS)
    embeddings, places = split_places(entry, 8)
    assert torch.equal(embeddings, video[tokens])
    frame, row, column = np.unravel_index(tokens.numpy(), grid)
    want = np.stack([(frame * per_frame).astype(np.int64), row, column, tokens.numpy()])
    assert want[0].max() > 16000 and torch.equal(places, torch.from_numpy(want))
    assert split_places(video, 8)[1] is None


def test_a_distance_does_not_depend_on_the_dtype_it_is_told_in() -> None:
    """bfloat16 embeddings are compared in float32: in bfloat16 near distances would be equal."""
    grid = (12, 6, 6)
    video = (torch.ones(432, 64) + 0.05 * torch.randn(432, 64)).bfloat16()
    order = cube_order(grid, (4, 4, 4))
    assert torch.equal(
        survivors(video, grid, 0.5, order), survivors(video.float(), grid, 0.5, order)
    )


def test_survivors_in_cube_order_are_compact() -> None:
    """KV blocks of half a video lie closer together in cube order than in raster order."""
    grid = (64, 8, 8)
    keep = np.random.default_rng(3).random(4096) < 0.5

    def spread(named: str) -> float:
        order = cube_order(grid, (4, 4, 4), named)
        order = order[keep[order]]
        at = np.stack(np.unravel_index(order[: len(order) // 64 * 64], grid), -1).reshape(-1, 64, 3)
        return float(((at - at.mean(1, keepdims=True)) ** 2).sum(-1).mean())

    assert block_spread(grid, (4, 4, 4), 64) < spread("cube") < 9 < spread("raster")


def whole_by_counting(tokens: int, videos: list[VideoSpan]) -> list[int]:
    """Whole-prompt tokens up to each place, one by one; a video's evenly between its survivors."""
    here, there, upto = 0, 0, [0]
    for video in [*videos, VideoSpan(tokens, 0, 0)]:
        while here < video.start:
            here, there = here + 1, there + 1
            upto.append(there)
        first = there
        for nth in range(1, video.tokens + 1):
            here, there = here + 1, first + nth * video.whole // video.tokens
            upto.append(there)
    return upto


@pytest.mark.parametrize("seed", range(20))
def test_the_whole_prompt(seed) -> None:
    rng = np.random.default_rng(seed)
    at, videos = int(rng.integers(0, 5)), []
    for _ in range(int(rng.integers(0, 4))):
        tokens = int(rng.integers(1, 30))
        videos.append(VideoSpan(at, tokens, tokens + int(rng.integers(0, 50))))
        at += tokens + int(rng.integers(0, 5))
    whole = WholePrompt(at, videos)
    upto = whole_by_counting(at, videos)
    assert whole.up_to(np.arange(at + 1)).tolist() == upto
    assert whole.tokens == upto[-1] == at + whole.dropped
    assert whole.dropped == sum(video.whole - video.tokens for video in videos)
    assert int(whole.up_to(at + 7)) == whole.tokens + 7, "an answer's tokens stand for themselves"
