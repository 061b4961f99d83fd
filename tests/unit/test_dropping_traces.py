"""Traces of requests whose video tokens left between the layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_adaspark.traces import dropping
from vllm_adaspark.traces.dropping import Dropping
from vllm_adaspark.traces.step import StepTrace
from vllm_adaspark.traces.store import TraceStore, trace_id
from vllm_adaspark.traces.trace import Chunk, Trace, Video, unpack_bits

SIZE, LAYERS, BEFORE, AFTER = 8, 5, 3, 6
VIDEOS = [
    Video(BEFORE, (4, 2, 4), (2, 2, 2), "raster"),
    Video(BEFORE + 34, (3, 3, 3), (2, 2, 2), "raster"),
]
TOKENS = VIDEOS[-1].end + AFTER
VIDEO_TOKENS = 32 + 27
FACTS = {"layers": [0, 2], "segments": []}


def dense_chunk(start: int, end: int) -> Chunk:
    none = np.zeros((LAYERS, 0, 1, 0), np.uint8)
    nothing = np.zeros(0, np.int64), np.zeros((LAYERS, 0, 1), np.uint8)
    return Chunk(
        start, end, np.array([start]), np.array([end - start]), np.array([False]), none, *nothing
    )


@pytest.fixture
def lasted() -> np.ndarray:
    """Of each video token, how many of five layers saw it: 1, 3 or all."""
    return np.random.default_rng(0).choice([1, 3, LAYERS], VIDEO_TOKENS).astype(np.uint16)


@pytest.fixture
def trace(lasted) -> Trace:
    trace = Trace(
        id=trace_id("r"),
        request_id="r",
        started=1.0,
        prompt_ids=np.arange(TOKENS, dtype=np.int32),
        videos=VIDEOS,
        settings={},
        block_size=SIZE,
        layers=range(LAYERS),
        answer_ids=[1, 2, 3],
        dropping_bytes=dropping.most_bytes(VIDEO_TOKENS, 7, 2),
    )
    for start, end in ((0, TOKENS), (TOKENS, TOKENS + 1), (TOKENS + 1, TOKENS + 2)):
        trace.add(dense_chunk(start, end))
    trace.dropping = Dropping(lasted, FACTS)
    return trace


def alive_in(trace: Trace, lasted: np.ndarray, layer: int) -> list[bool]:
    alive = [True] * trace.end
    place = 0
    for video in VIDEOS:
        for token in range(video.offset, video.end):
            alive[token] = lasted[place] > layer
            place += 1
    return alive


@pytest.mark.parametrize(
    "source, tokens", [("question", 8), ("answer", 2), ("cube:1", 8), ("token:40", 1)]
)
def test_heat_is_the_naive_count(trace, lasted, source, tokens) -> None:
    found = trace.heat(source)
    ranges = trace._ranges(source)
    assert found["tokens"] == tokens
    for layer in range(LAYERS):
        alive = alive_in(trace, lasted, layer)
        for cube, start in enumerate(trace.meta()["cube_starts"]):
            left = np.mean(alive[start : start + SIZE])
            after = [
                t for low, high in ranges for t in range(low, min(high, TOKENS + 2)) if t >= start
            ]
            want = np.mean([alive[t] * left for t in after]) if after else None
            assert found["heat"][layer][cube] == (
                want if want is None else pytest.approx(want, abs=1e-4)
            )


def test_density_is_the_naive_count(trace, lasted) -> None:
    density = trace.meta()["density"]
    starts = trace.meta()["cube_starts"]
    for kind in ("video", "question", "answer"):
        for layer in range(LAYERS):
            alive = alive_in(trace, lasted, layer)
            pairs = [
                alive[token] * np.mean(alive[start : start + SIZE])
                for low, high in trace._kind(kind)
                for token in range(low, high)
                for start in starts
                if start + SIZE <= token // SIZE * SIZE
            ]
            assert density[kind][layer] == pytest.approx(np.mean(pairs), abs=1e-4)


def test_what_ran_is_what_was_alive(trace, lasted) -> None:
    found = trace.ffn()
    ran = np.stack(
        [unpack_bits(np.frombuffer(row, np.uint8), VIDEO_TOKENS) for row in found["ran"]]
    )
    assert (ran == (lasted > np.arange(LAYERS)[:, None])).all()
    assert found["share"] == pytest.approx(ran.mean(1), abs=1e-4)
    assert trace.meta()["dropping"] == FACTS


def test_survivors_of_each_event_say_how_long_tokens_lasted() -> None:
    step = StepTrace()
    step.survivors(0, 2, torch.tensor([1, 2, 5, 7]))
    step.survivors(3, 2, torch.tensor([2, 7]))
    step.survivors(0, 1, torch.tensor([0]))
    assert step.lasted(2, 8, 6).tolist() == [1, 4, 6, 1, 1, 4, 1, 6]
    assert step.lasted(0, 3, 6).tolist() == [6, 6, 6]


def test_bytes_are_counted_before_it_is_filled(trace, lasted) -> None:
    """Ranks must count alike, whenever each hears of it."""
    held = trace.nbytes
    trace.dropping = None
    assert held - trace.nbytes == trace.dropping_bytes >= lasted.nbytes
    facts = "a", "r", 1.0, trace.prompt_ids, VIDEOS, {}, SIZE, range(LAYERS)
    fresh = Trace(*facts, dropping_bytes=1000)
    assert fresh.counted == Trace(*facts).counted + 1000
    assert TraceStore(fresh.counted).start(fresh, expected=1 << 20) and fresh.truncated
