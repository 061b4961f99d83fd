"""The picture of a trace: what it shows is what the trace says, whatever the trace lacks."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vllm_adaspark.traces import reader
from vllm_adaspark.traces.attended import cubes_of, frame_heat, most_attended, spread
from vllm_adaspark.traces.picture import (
    ALWAYS,
    NEVER,
    OPACITY,
    colors,
    gradient,
    save_heatmap,
)
from vllm_adaspark.video.order import cube_order

LAYERS = [0, 1, 2]
GRID, CUBE, OFFSET, SIZE = (8, 8, 8), (4, 4, 4), 64, 64  # eight exact cubes
GREY = 120


def jpeg(level: int = GREY, width: int = 224, height: int = 224) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (level,) * 3).save(buffer, "JPEG")
    return buffer.getvalue()


def make_trace(**changes) -> dict:
    heat = [[(layer + 1) * cube / 24 for cube in range(8)] for layer in LAYERS]
    trace = {
        "layers": LAYERS,
        "block_size": SIZE,
        "video_tokens": 512,
        "cached_tokens": 0,
        "truncated": None,
        "settings": {"selection": "top_p", "p_attn": 0.9, "p_ffn": 0.8, "flops": None},
        "usage": {"flops_ratio": 0.5},
        "videos": [
            {"offset": OFFSET, "grid": list(GRID), "cube": list(CUBE), "order": "cube",
             "seconds_per_frame": 1.0, "frames": 8}
        ],
        "cube_starts": [OFFSET + SIZE * n for n in range(8)],
        "spans": [
            {"kind": "video", "start": OFFSET, "end": OFFSET + 512, "video": 0},
            {"kind": "question", "start": 576, "end": 578, "texts": ["Why", "?"]},
            {"kind": "answer", "start": 578, "end": 580, "texts": ["Be", "cause"]},
        ],
        "density": {"video": [0.9, 0.5, 0.1], "question": [0.4] * 3, "answer": [None] * 3},
        "heat": {source: {"heat": heat, "tokens": 2, "wanted": 2} for source in
                 ("question", "answer")},
        "jpegs": {(0, n): jpeg() for n in range(8)},
    }  # fmt: skip
    return trace | changes


def drawn(trace: dict, path: Path, **how) -> np.ndarray:
    assert save_heatmap(trace, path, **how) == path
    return np.array(Image.open(path)).astype(int)


def has_color(pixels: np.ndarray, rgb, least: int = 400) -> bool:
    """Whether at least so many pixels are of a colour, within what JPEG and rounding do."""
    return (np.abs(pixels - np.asarray(rgb)).max(-1) <= 3).sum() >= least


def over_frame(rgb) -> np.ndarray:
    return OPACITY * np.asarray(rgb, float) + (1 - OPACITY) * GREY


def test_cubes_of_an_aligned_video_are_boxes() -> None:
    cubes = cubes_of(make_trace(), 0)
    assert cubes.shape == GRID and sorted(set(cubes.ravel())) == list(range(8))
    for cube in range(8):
        box = np.argwhere(cubes == cube)
        assert (np.ptp(box, axis=0) == 3).all()
    assert (
        cubes.reshape(-1)[cube_order(GRID, CUBE)].tolist() == np.repeat(np.arange(8), 64).tolist()
    )


def test_cubes_of_a_video_that_starts_inside_a_block() -> None:
    trace = make_trace(cube_starts=[SIZE * n for n in range(2, 9)])
    trace["videos"][0]["offset"] = OFFSET + 10
    cubes = cubes_of(trace, 0).reshape(-1)[cube_order(GRID, CUBE)]
    assert (cubes[:54] == -1).all() and (cubes[54:118] == 0).all() and (cubes[-10:] == -1).all()


def test_colors() -> None:
    rgb = colors(np.array([0.0, 1.0, np.nan, 0.5]), np.array([0, 1, 2, -1, 3]))
    assert rgb[0].tolist() == [0, 0, 4] and rgb[1].tolist() == [252, 255, 164]
    assert tuple(rgb[2]) == NEVER and tuple(rgb[3]) == ALWAYS
    brightness = gradient(np.linspace(0, 1, 50)).sum(-1)
    assert (np.diff(brightness) > 0).all(), "a brighter cube must be a more attended one"


@pytest.mark.parametrize("layer", [None, 0, 2])
def test_frames_carry_the_heat(tmp_path: Path, layer: int | None) -> None:
    trace = make_trace()
    pixels = drawn(trace, tmp_path / "a.png", layer=layer)
    heat = np.array(trace["heat"]["answer"]["heat"])
    heat = heat.mean(0) if layer is None else heat[layer]
    for cube in range(8):
        assert has_color(pixels, over_frame(gradient(heat[cube]))), f"cube {cube}"
    assert not has_color(pixels, over_frame(gradient(np.array(1.0))))


def test_sources_and_layers_look_different(tmp_path: Path) -> None:
    trace = make_trace()
    trace["heat"]["question"] = {"heat": [[1.0] * 8] * 3, "tokens": 2, "wanted": 2}
    pictures = {
        (source, layer): drawn(trace, tmp_path / "a.png", source=source, layer=layer).tobytes()
        for source in ("question", "answer")
        for layer in (None, 0, 2)
    }
    assert len(set(pictures.values())) == len(pictures)


def test_cubes_after_the_source(tmp_path: Path) -> None:
    trace = make_trace()
    trace["heat"]["cube:2"] = {"heat": [[0.2, 0.9, 1.0] + [None] * 5] * 3}
    pixels = drawn(trace, tmp_path / "a.png", source="cube:2", frames=8)
    assert has_color(pixels, over_frame(NEVER))


LACKS = {
    "frames": {"jpegs": {}},
    "some frames": {"jpegs": {(0, 3): jpeg()}},
    "usage": {"usage": None},
    "texts": {"spans": []},
    "answer": {"heat": {"answer": {"heat": [[None] * 8] * 3, "tokens": 0, "wanted": 0}}},
    "room": {"truncated": "the traces reached trace_mb=64", "cached_tokens": 12345},
}


@pytest.mark.parametrize("changes", LACKS.values(), ids=LACKS)
def test_what_is_missing_is_left_out(tmp_path: Path, changes: dict) -> None:
    pixels = drawn(make_trace(**changes), tmp_path / "a.png")
    assert pixels.shape[1] == 1240 and 200 < pixels.shape[0] < 1500
    assert (pixels < 200).any()


def test_two_videos(tmp_path: Path) -> None:
    trace = make_trace(
        cube_starts=[OFFSET + SIZE * n for n in range(8)] + [704 + SIZE * n for n in range(8)]
    )
    second = trace["videos"][0] | {"offset": 704, "seconds_per_frame": None}
    trace["videos"] = [trace["videos"][0], second]
    trace["jpegs"] |= {(1, n): jpeg(200) for n in range(8)}
    rows = [[0.0] * 8 + [1.0] * 8] * 3
    trace["heat"] = {"answer": {"heat": rows, "tokens": 1, "wanted": 1}}
    pixels = drawn(trace, tmp_path / "a.png", frames=16)
    bright = OPACITY * gradient(np.array(1.0)) + (1 - OPACITY) * 200
    assert has_color(pixels, bright) and has_color(pixels, over_frame(gradient(np.array(0.0))))


@pytest.mark.parametrize("frames", [1, 2, 7, 8, 50])
def test_number_of_frames(tmp_path: Path, frames: int) -> None:
    assert drawn(make_trace(), tmp_path / "a.png", frames=frames).shape[1] == 1240


# -- which frames ------------------------------------------------------------------------------


def test_frame_heat_is_the_mean_over_tokens() -> None:
    """Of a video that starts inside a block, some of whose tokens were dropped."""
    cubes = cubes_of(make_trace(), 0)
    cubes[0, 0] = -1  # always attended: they say nothing
    cubes[1, :3] = -2  # dropped
    cubes[6] = -1
    heat = np.linspace(0.1, 0.9, 8)
    got = frame_heat(heat, cubes)
    for n in range(8):
        values = [0.0 if cube == -2 else heat[cube] for cube in cubes[n].ravel() if cube != -1]
        want = np.mean(values) if values else np.nan
        assert got[n] == pytest.approx(want, nan_ok=True)
    assert np.isnan(got[6]) and not np.isnan(np.delete(got, 6)).any()


def test_the_most_attended_come_in_order_of_time() -> None:
    trace = make_trace(videos=[make_trace()["videos"][0]] * 2)
    trace["videos"][1] = trace["videos"][1] | {"offset": 704}
    trace["cube_starts"] = [OFFSET + SIZE * n for n in range(8)] + [
        704 + SIZE * n for n in range(8)
    ]
    heat = np.zeros(16)
    heat[4:8] = 0.5  # the later half of the first video
    heat[8:12] = 0.9  # the earlier half of the second
    places = [(video, n) for video in range(2) for n in range(8)]
    late, early = [(0, n) for n in range(4, 8)], [(1, n) for n in range(4)]
    assert most_attended(trace, heat, places, 4) == early
    assert most_attended(trace, heat, places, 6) == [*late[:2], *early]
    assert most_attended(trace, heat, places, 8) == [*late, *early]
    assert most_attended(trace, heat, places, 99) == places
    # Frames without a picture are not there to choose.
    assert most_attended(trace, heat, [(0, 1), (0, 5), (1, 7)], 1) == [(0, 5)]


def test_nothing_recorded_is_evenly_spread() -> None:
    assert most_attended(make_trace(), np.full(8, np.nan), [(0, n) for n in range(8)], 2) == [
        (0, 2),
        (0, 6),
    ]


@pytest.mark.parametrize(
    "number, wanted, expected",
    [(60, 6, [5, 15, 25, 35, 45, 55]), (3, 6, [0, 1, 2]), (1, 1, [0]), (10, 1, [5])],
)
def test_spread(number: int, wanted: int, expected: list[int]) -> None:
    assert spread(number, wanted) == expected


@pytest.mark.parametrize("fetched", [True, False], ids=["fetched", "without pictures"])
def test_the_picture_shows_the_frames_that_its_source_attended(
    tmp_path: Path, fetched: bool
) -> None:
    """Question and answer look at different halves, and each picture shows only its own."""
    early, late = ([0.9] * 4 + [0.1] * 4, [0.1] * 4 + [0.9] * 4)
    heat = {"question": {"heat": [early] * 3}, "answer": {"heat": [late] * 3}}
    trace = make_trace(heat=heat)
    if not fetched:
        trace["jpegs"] = {}
    for source in heat:
        path = save_heatmap(trace, tmp_path / "a.png", source=source, frames=4)
        pixels = np.array(Image.open(path)).astype(int)
        hot, cold = (gradient(np.array(share)) for share in (0.9, 0.1))
        if fetched:
            hot, cold = over_frame(hot), over_frame(cold)
        assert has_color(pixels, hot, 10_000) and not has_color(pixels, cold)


def test_the_reader_fetches_what_either_source_attended() -> None:
    heat = {
        "question": {"heat": [[0.9] * 4 + [0.1] * 4] * 3},
        "answer": {"heat": [[0.1] * 4 + [0.9] * 4] * 3},
    }
    asked = []

    def frame(video: int, n: int) -> bytes:
        asked.append((video, n))
        return jpeg()

    meta = {key: value for key, value in make_trace().items() if key not in ("heat", "jpegs")}
    whole = reader._whole(meta, heat.get, frame, frames=2)
    assert sorted(whole["jpegs"]) == asked == [(0, 0), (0, 1), (0, 4), (0, 5)]
    meta["videos"][0]["frames"] = 5  # pictures of its first places in time only
    few = reader._whole(meta, heat.get, frame, frames=2)["jpegs"]
    assert sorted(few) == [(0, 0), (0, 1), (0, 4)]


# -- what it needs -------------------------------------------------------------------------------


BAD = {
    "source": ({"source": "token:1"}, r"source='token:1': the trace has question, answer"),
    "layer": ({"layer": 3}, r"layer=3: the trace has \[0, 1, 2\]"),
    "frames": ({"frames": 0}, r"frames=0: must be at least 1"),
}


@pytest.mark.parametrize("how, message", BAD.values(), ids=BAD)
def test_bad_arguments(tmp_path: Path, how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_heatmap(make_trace(), tmp_path / "a.png", **how)
    assert not (tmp_path / "a.png").exists()


def test_needs_neither_torch_nor_vllm_nor_matplotlib() -> None:
    code = (
        "import sys, vllm_adaspark.traces.picture, vllm_adaspark.traces.reader; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "vllm", "matplotlib"} & set(done.stdout.split())
