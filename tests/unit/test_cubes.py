"""Geometry: the order has every token once, and KV blocks cut from it are compact."""

import random

import numpy as np
import pytest

from vllm_adaspark.video.order import block_spread, cube_order, spread_tokens

IDEAL = 3.75  # mean squared spread of a 4x4x4 box


def coordinates(grid, cube, order="cube"):
    """``[T * H * W, 3]`` (t, h, w) in token order."""
    return np.stack(np.unravel_index(cube_order(grid, cube, order), grid), axis=-1)


def strip_height(rows, h):
    """Rows of the tallest strip."""
    return -(-rows // max(1, round(rows / h)))


def slab_lengths(grid, cube):
    """Frames of each slab, in order, found where the order leaves all earlier frames behind."""
    frames = coordinates(grid, cube)[:, 0]
    latest = np.maximum.accumulate(frames)
    earliest_to_come = np.minimum.accumulate(frames[::-1])[::-1]
    last = latest[:-1][latest[:-1] < earliest_to_come[1:]]
    return np.diff([-1, *last, grid[0] - 1]).tolist()


def test_every_token_is_visited_once():
    rng = random.Random(0)
    for _ in range(200):
        grid = tuple(rng.randint(1, n) for n in (9, 19, 23))
        cube = tuple(rng.randint(1, 9) for _ in range(3))
        token_order = cube_order(grid, cube)
        assert token_order.dtype == np.int64
        assert np.array_equal(np.sort(token_order), np.arange(np.prod(grid))), (grid, cube)


def test_an_order_by_hand():
    # Two slabs of one frame, two strips of two rows: there and back, then the same way back.
    token_order = cube_order((2, 4, 2), (1, 2, 2))
    assert token_order.tolist() == [0, 2, 1, 3, 5, 7, 4, 6, 14, 12, 15, 13, 11, 9, 10, 8]


@pytest.mark.parametrize(
    ("cube", "frames", "slabs"),
    [
        ((4, 4, 4), 3, [3]),
        ((4, 4, 4), 4, [4]),
        ((4, 4, 4), 5, [5]),
        ((4, 4, 4), 6, [3, 3]),
        ((4, 4, 4), 7, [4, 3]),
        ((4, 4, 4), 9, [4, 5]),
        ((4, 4, 4), 16, [4, 4, 4, 4]),
        ((4, 4, 4), 17, [4, 4, 5, 4]),
        ((4, 4, 4), 30, [4, 4, 3, 4, 4, 3, 4, 4]),
        ((2, 4, 4), 7, [2, 3, 2]),
        ((8, 4, 4), 9, [4, 5]),  # one slab of 9 would be less compact
        ((8, 4, 4), 24, [8, 8, 8]),
        ((4, 4, 8), 7, [7]),  # 7 x 4 x 4.6, not 3.5 x 4 x 9.1
    ],
    ids=str,
)
def test_slabs_are_near_equal(cube, frames, slabs):
    assert slab_lengths((frames, 8, 12), cube) == slabs


@pytest.mark.parametrize("cube", [(4, 4, 4), (8, 4, 4), (2, 4, 4), (4, 4, 8)])
def test_slabs_add_no_thin_rest(cube):
    for frames in range(1, 70):
        lengths = slab_lengths((frames, 5, 6), cube)
        assert sum(lengths) == frames
        assert max(lengths) - min(lengths) <= 1
        if frames % cube[0] == 0:
            assert lengths == [cube[0]] * (frames // cube[0])
        assert len(lengths) in (frames // cube[0], -(-frames // cube[0]))


@pytest.mark.parametrize("cube", [(4, 4, 4), (8, 4, 4), (2, 4, 4), (4, 8, 4), (1, 8, 8), (2, 2, 8)])
def test_aligned_divisible_grid_gives_exact_boxes(cube):
    grid = tuple(n * side for n, side in zip((3, 2, 4), cube, strict=True))
    blocks = coordinates(grid, cube).reshape(-1, np.prod(cube), 3)
    corners = set()
    for block in blocks:
        low, high = block.min(0), block.max(0)
        assert tuple(high - low + 1) == cube
        assert (low % cube == 0).all()
        assert len(np.unique(block, axis=0)) == np.prod(cube)
        corners.add(tuple(low))
    assert len(corners) == len(blocks)


def test_ideal_box_has_the_ideal_spread():
    assert block_spread((8, 8, 16), (4, 4, 4), 64) == IDEAL


@pytest.mark.parametrize(
    "grid",
    [
        *[(32, 8, 8), (32, 9, 16), (32, 12, 22), (32, 16, 28), (32, 18, 32)],
        # Frames that do not divide.
        *[(5, 9, 16), (9, 12, 22), (17, 12, 22), (30, 13, 23), (31, 9, 16)],
    ],
)
def test_blocks_are_compact_wherever_the_video_starts(grid):
    phases = np.random.default_rng(0).integers(0, 64, 12)
    spreads = [block_spread(grid, (4, 4, 4), 64, phase=int(phase)) for phase in phases]
    raster = block_spread(grid, (4, 4, 4), 64, phase=int(phases[0]), order="raster")
    assert min(spreads) >= IDEAL
    assert np.mean(spreads) < 4.95
    assert max(spreads) < 5.3
    assert raster > 2 * max(spreads)


@pytest.mark.parametrize("cube", [(4, 4, 4), (8, 4, 4), (2, 4, 4)])
def test_neighbours_in_the_sequence_are_neighbours_in_the_video(cube):
    rng = random.Random(1)
    h = cube[1]
    for _ in range(50):
        grid = tuple(rng.randint(1, n) for n in (17, 24, 32))
        steps = np.abs(np.diff(coordinates(grid, cube), axis=0))
        if len(steps) == 0:
            continue
        assert steps[:, 0].max() <= max(slab_lengths(grid, cube))
        assert steps[:, 1].max() <= max(1, strip_height(grid[1], h) - 1)
        assert steps[:, 2].max() <= 1


def test_a_block_stays_within_one_slab_and_its_neighbour():
    # A KV block may cross a slab's edge but never reaches two slabs on.
    blocks = coordinates((16, 6, 10), (4, 4, 4))[23:][: 14 * 64].reshape(-1, 64, 3)
    slabs = blocks[:, :, 0] // 4
    assert (slabs.max(1) - slabs.min(1)).max() == 1


def test_raster_is_stock_order():
    assert np.array_equal(cube_order((3, 5, 7), (4, 4, 4), "raster"), np.arange(105))


def test_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order='hilbert'"):
        cube_order((2, 2, 2), (4, 4, 4), "hilbert")


def test_the_cached_order_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        cube_order((2, 4, 4), (2, 2, 2))[0] = 5


def test_spread_of_one_row_by_hand():
    # Four tokens in a row: mean squared distance from 1.5 is (2.25 + 0.25) / 2.
    assert block_spread((1, 1, 8), (1, 1, 4), 4) == 1.25
    # One token in, the row's second block is cut short and left out.
    assert block_spread((1, 1, 8), (1, 1, 4), 4, phase=1) == 1.25


@pytest.mark.parametrize("cube", [(4, 4, 4), (8, 4, 4), (2, 4, 4), (4, 4, 2)])
def test_tokens_that_are_asked_are_of_all_frames_rows_and_columns(cube) -> None:
    t, h, w = cube
    volume = t * h * w
    token_order = cube_order(cube, cube)  # one cube: the order is the block's
    for count in (16, 32):
        scored = spread_tokens(volume, count)
        assert len(scored) == min(count, volume) and (np.diff(scored) > 0).all()
        places = np.unravel_index(token_order[scored], cube)
        assert [len(set(place.tolist())) for place in places] == list(cube)
    assert spread_tokens(volume, volume).tolist() == list(range(volume))
    assert spread_tokens(volume, 2 * volume).tolist() == list(range(volume))
