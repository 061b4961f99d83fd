"""Traces of requests some of whose video tokens were dropped: which, and how they are shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_adaspark.traces import reader
from vllm_adaspark.traces.attended import GONE, cubes_of
from vllm_adaspark.traces.picture import DROPPED, colors
from vllm_adaspark.traces.store import TraceStore, trace_id
from vllm_adaspark.traces.survivors import Survivors
from vllm_adaspark.traces.trace import Trace, Video
from vllm_adaspark.video.order import cube_order, decode_order
from vllm_adaspark.video.prune import COLUMNS, survivors, with_places

GRID, HIDDEN, SIZE = (8, 6, 6), 16, 64
BEFORE, AFTER = 10, 7  # text, question


def entry_of(seed: int = 0, prune: float = 0.5, dtype=torch.bfloat16):
    """(the encoder cache's entry of a pruned video, the raster tokens that it keeps)."""
    video = torch.randn(288, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)
    kept = survivors(video, GRID, prune, cube_order(GRID, (4, 4, 4)))
    return with_places(video, kept, GRID, 1.0), kept.numpy()


def new_trace(kept: np.ndarray | None) -> Trace:
    video = Video(BEFORE, GRID, (4, 4, 4), "cube", 1.0, 144, "v")
    whole = Video(BEFORE + 144 + 5, (4, 4, 4), (4, 4, 4), "cube", 1.0)
    return Trace(
        id=trace_id("r"),
        request_id="r",
        started=1.0,
        prompt_ids=np.arange(whole.end + AFTER, dtype=np.int32),
        videos=[video, whole],
        settings={},
        block_size=SIZE,
        layers=range(2),
        survivors={} if kept is None else {0: kept},
    )


def test_a_pruned_video_takes_what_is_left_of_it() -> None:
    _, kept = entry_of()
    trace = new_trace(kept)
    assert [span["end"] - span["start"] for span in trace.meta()["spans"]] == [10, 144, 5, 64, 7]
    assert trace.cube_blocks.tolist() == [1], "blocks 0, 2 and 3 hold text, too"
    first, second = reader.complete(trace.meta())["videos"]
    assert (first["tokens"], second["tokens"]) == (144, 64)
    assert decode_order(first["token_order"]).tolist() == kept.tolist()
    assert decode_order(second["token_order"]).tolist() == cube_order((4, 4, 4), (4, 4, 4)).tolist()


def test_the_picture_shows_what_was_dropped() -> None:
    _, kept = entry_of()
    trace = reader.complete(new_trace(kept).meta())
    cubes = cubes_of(trace, 0)
    dropped = np.setdiff1d(np.arange(288), kept)
    assert (np.flatnonzero(cubes.ravel() == GONE) == dropped).all()
    # Tokens 54 to 117 of the video are the prompt's second block.
    assert (np.flatnonzero(cubes.ravel() == 0) == np.sort(kept[54:118])).all()
    rgb = colors(np.array([0.3]), cubes)
    assert (rgb.reshape(-1, 3)[dropped] == DROPPED).all()
    assert not (rgb.reshape(-1, 3)[kept] == DROPPED).all(-1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_survivors_are_read_off_the_encoder_cache(dtype) -> None:
    cache, known = {}, Survivors()
    known.expect("r", ["v", "w"])
    known.note(cache)
    assert known.get("v") is None
    entry, kept = entry_of(dtype=dtype)
    cache["v"] = entry
    cache["other"] = torch.zeros(4, HIDDEN + COLUMNS)
    known.note(cache)
    cache.clear()
    assert known.get("v").tolist() == kept.tolist()
    assert known.get("w") is None and known.get("other") is None, "nobody asked for it"
    cache["w"], other = entry_of(1, dtype=dtype)
    known.note(cache)
    assert known.get("w").tolist() == other.tolist()
    known.expect("s", ["v"])
    cache["v"] = cache.pop("w")
    known.note(cache)
    assert known.get("v").tolist() == kept.tolist(), "it is known already"


def test_survivors_of_videos_long_past_are_forgotten() -> None:
    known = Survivors(limit=3 * 144 * 3)
    for number in range(5):
        known.expect(f"r{number}", [f"v{number}"])
        known.note({f"v{number}": entry_of(number)[0]})
    assert [known.get(f"v{number}") is not None for number in range(5)] == [False, False] + 3 * [
        True
    ]
    known.expect("ended", ["x"])
    known.forget("ended")
    known.note({"x": entry_of()[0]})
    assert known.get("x") is None


def test_survivors_count_before_they_are_known() -> None:
    """Ranks must count alike, whenever each hears of them."""
    before, after = new_trace(None), new_trace(entry_of()[1].astype(np.int32))
    named = before.prompt_ids.nbytes + 4 * len(before.request_id)
    assert before.counted == after.counted == named + 4 * 144
    assert after.nbytes == before.nbytes + 4 * 144
    store = TraceStore(before.counted)
    assert store.start(before, expected=1 << 20) and before.truncated
    assert before.counted == after.counted
