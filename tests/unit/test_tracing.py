"""Traces without an engine: shares against a naive count, memory, ranks merged, frames."""

from __future__ import annotations

import io
import json
import tomllib
from fnmatch import fnmatch
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from vllm_adaspark.attention.planner import build_plan
from vllm_adaspark.attention.state import StepRows
from vllm_adaspark.config import AdaSparkConfig
from vllm_adaspark.cubes import cube_order
from vllm_adaspark.requests import Request
from vllm_adaspark.tracing import reader
from vllm_adaspark.tracing.frames import PatchShape, thumbnails, unpatchify
from vllm_adaspark.tracing.step import StepTrace, chunk_of
from vllm_adaspark.tracing.store import TraceStore, trace_id
from vllm_adaspark.tracing.trace import Trace, Video, pack_bits, parse_source, unpack_bits

SIZE = 64
LAYERS = range(2, 5)  # as on a second pipeline stage
KV_HEADS = 2
BEFORE, GRID, AFTER = 10, (8, 8, 9), 7  # text, video, question
VIDEO = Video(BEFORE, GRID, (4, 4, 4), "cube", 1.0)
PROMPT = BEFORE + VIDEO.length + AFTER
CONFIG = AdaSparkConfig(p_attn=0.5, p_ffn=0.5)


def new_trace(request_id: str = "r", layers: range = LAYERS, videos=(VIDEO,)) -> Trace:
    return Trace(
        id=trace_id(request_id),
        request_id=request_id,
        started=1.0,
        prompt_ids=np.arange(PROMPT, dtype=np.int32),
        videos=list(videos),
        settings={},
        block_size=SIZE,
        layers=layers,
    )


class Recorder:
    """Plays steps of one request and remembers, token by token, what each attended and ran."""

    def __init__(self, seed: int = 0, layers: range = LAYERS, dense_layer: int = 3) -> None:
        self.rng = np.random.default_rng(seed)
        self.trace = new_trace(layers=layers)
        self.layers, self.dense_layer = layers, dense_layer
        end = PROMPT + 20
        # [layers, heads, tokens, blocks], [layers, video tokens]
        self.attended = np.zeros((len(layers), KV_HEADS, end, -(-end // SIZE)), bool)
        self.ran = np.ones((len(layers), VIDEO.length), bool)
        self.recorded = np.zeros(end, bool)

    def step(self, start: int, end: int, row: int = 1, trace: bool = True) -> None:
        """Tokens ``start`` to ``end``, beside another request's decode in row 0."""
        others = 3
        rows = StepRows(
            query_start=np.array([0, 1, 1 + end - start]),
            seq_lens=np.array([others, end]),
            block_table=np.stack([np.full(32, 60), np.arange(32)]),
        )
        is_video = (np.arange(PROMPT) >= BEFORE) & (np.arange(PROMPT) < VIDEO.end)
        plan = build_plan(
            rows, [None, Request(CONFIG, is_video)], SIZE,
            dense_below=2, cube_queries=16, device=torch.device("cpu"),
        )  # fmt: skip
        step = StepTrace()
        chosen, active = self._choose(plan, step)
        bits = step.to_host(self.layers)
        if trace:
            self.trace.add(chunk_of(row, rows, plan, bits, SIZE))
            self._remember(plan, start, end, chosen, active)

    def _choose(self, plan, step: StepTrace):
        chosen, active = {}, {}
        for layer in self.layers:
            if layer == self.dense_layer:
                continue
            if plan is not None and plan.attention is not None:
                candidates = plan.attention.candidates
                pick = torch.from_numpy(
                    self.rng.random((len(candidates), KV_HEADS, candidates.shape[1])) < 0.4
                )
                chosen[layer] = pick & candidates[:, None]
                step.cubes(layer, chosen[layer])
            if plan is not None and plan.ffn is not None:
                active[layer] = torch.from_numpy(self.rng.random(plan.ffn.tokens.shape) < 0.5)
                step.tokens(layer, active[layer])
        return chosen, active

    def _remember(self, plan, start: int, end: int, chosen: dict, active: dict) -> None:
        self.recorded[start:end] = True
        self.ran[:, max(start - BEFORE, 0) : max(end - BEFORE, 0)] = True
        for nth, layer in enumerate(self.layers):
            for token in range(start, end):
                self.attended[nth, :, token] = np.arange(self.attended.shape[-1]) <= token // SIZE
            if layer in chosen:
                tiles = plan.attention.tiles
                for i, tile in enumerate(plan.attention.sparse_tiles.tolist()):
                    first = start + tiles.start[tile] - 1
                    for token in range(first, first + tiles.length[tile]):
                        left_out = plan.attention.candidates[i] & ~chosen[layer][i]  # [heads, n]
                        for head in range(KV_HEADS):
                            self.attended[nth, head, token, : left_out.shape[1]] &= ~(
                                left_out[head].numpy()
                            )
            if layer in active:
                tokens = plan.ffn.tokens.numpy() - 1 + start - BEFORE
                self.ran[nth][tokens] = active[layer].numpy()

    def naive_heat(self, tokens: np.ndarray) -> np.ndarray:
        """``[layers, cubes]`` by the definition; NaN where no token comes after the cube."""
        tokens = tokens[self.recorded[tokens]]
        blocks = self.trace.cube_blocks
        heat = np.full((len(self.layers), len(blocks)), np.nan)
        for nth, block in enumerate(blocks):
            seen = tokens[tokens // SIZE >= block]
            if len(seen):
                heat[:, nth] = self.attended[:, :, seen, block].mean((1, 2))
        return heat


@pytest.fixture(params=["at once", "in chunks", "preempted"])
def recorder(request) -> Recorder:
    recorder = Recorder()
    chunks = {
        "at once": [(0, PROMPT)],
        "in chunks": [(0, 128), (128, 300), (300, 301), (301, PROMPT)],
        # The second time, its first tokens come from the prefix cache.
        "preempted": [(0, 320), (320, 500), (192, 400), (400, PROMPT)],
    }
    for start, end in chunks[request.param]:
        recorder.step(start, end)
    for token in range(PROMPT, PROMPT + 5):
        recorder.step(token, token + 1)
    recorder.trace.answer_ids = [7] * 6
    return recorder


def as_array(rows) -> np.ndarray:
    return np.array(rows, dtype=float)


def test_heat_is_the_naive_count(recorder: Recorder) -> None:
    trace = recorder.trace
    assert len(trace.cube_blocks) == 8  # 10 + 576 tokens: blocks 1 to 8 are whole
    sources = {
        "question": np.arange(VIDEO.end, PROMPT),
        "answer": np.arange(PROMPT, PROMPT + 5),
        f"token:{PROMPT - 2}": np.array([PROMPT - 2]),
        "token:3": np.array([3]),
        "token:200": np.array([200]),
        "cube:5": np.arange(6 * SIZE, 7 * SIZE),
        "cube:0": np.arange(SIZE, 2 * SIZE),
    }
    for source, tokens in sources.items():
        got = trace.heat(source)
        np.testing.assert_allclose(
            as_array(got["heat"]), recorder.naive_heat(tokens), atol=1e-4, err_msg=source
        )
        assert got["tokens"] == got["wanted"] == len(tokens)
        assert got["layers"] == [2, 3, 4]
    answer = as_array(trace.heat("answer")["heat"])
    assert (answer[1] == 1).all(), "the dense layer attends to all"
    assert 0 < answer[0].mean() < 1


def test_density_is_the_naive_count(recorder: Recorder) -> None:
    blocks = recorder.trace.cube_blocks
    density = recorder.trace.meta()["density"]
    kinds = {
        "video": np.arange(BEFORE, VIDEO.end),
        "question": np.arange(VIDEO.end, PROMPT),
        "answer": np.arange(PROMPT, PROMPT + 5),
    }
    for kind, tokens in kinds.items():
        for nth in range(len(LAYERS)):
            seen = kept = 0.0
            for token in tokens[recorder.recorded[tokens]]:
                before = blocks[blocks < token // SIZE]
                seen += len(before)
                kept += recorder.attended[nth][:, token, before].mean(0).sum()
            assert density[kind][nth] == pytest.approx(kept / seen, abs=1e-4)


def test_ffn_is_what_ran(recorder: Recorder) -> None:
    ffn = recorder.trace.ffn()
    for nth, packed in enumerate(ffn["ran"]):
        got = unpack_bits(np.frombuffer(packed, np.uint8), VIDEO.length)
        assert (got == recorder.ran[nth]).all()
        assert ffn["share"][nth] == pytest.approx(recorder.ran[nth].mean(), abs=1e-4)
    assert unpack_bits(np.frombuffer(ffn["recorded"], np.uint8), VIDEO.length).all()
    assert ffn["share"][1] == 1.0 and ffn["share"][0] < 0.7


def test_cached_tokens_are_missing_and_said_to_be() -> None:
    recorder = Recorder()
    recorder.step(0, 256, trace=False)  # another request computed them
    recorder.step(256, PROMPT)
    trace = recorder.trace
    assert trace.heat("cube:0")["tokens"] == 0 and trace.heat("cube:0")["wanted"] == SIZE
    assert set(trace.heat("cube:0")["heat"][0]) == {None}
    assert trace.heat("question")["tokens"] == AFTER
    recorded = unpack_bits(np.frombuffer(trace.ffn()["recorded"], np.uint8), VIDEO.length)
    assert recorded.tolist() == [token + BEFORE >= 256 for token in range(VIDEO.length)]


def test_step_without_a_plan_is_attended_by_all() -> None:
    rows = StepRows(np.array([0, 4]), np.array([PROMPT + 4]), None)
    trace = new_trace()
    trace.add(chunk_of(0, rows, None, StepTrace().to_host(LAYERS), SIZE))
    assert as_array(trace.heat("answer")["heat"]).tolist() == [[1.0] * 8] * 3


def test_rank_whose_layers_are_all_dense() -> None:
    """As a first pipeline stage may be: there is a plan, but its layers left nothing."""
    recorder = Recorder(layers=range(3, 4), dense_layer=3)
    recorder.step(0, PROMPT)
    assert as_array(recorder.trace.heat("question")["heat"]).tolist() == [[1.0] * 8]
    assert recorder.trace.ffn()["share"] == [1.0]
    assert recorder.trace.meta()["density"]["question"] == [1.0]


def test_video_without_a_whole_cube() -> None:
    video = Video(BEFORE, (1, 4, 6), (4, 4, 4), "cube")
    trace = new_trace(videos=(video,))
    rows = StepRows(np.array([0, PROMPT]), np.array([PROMPT]), None)
    trace.add(chunk_of(0, rows, None, StepTrace().to_host(LAYERS), SIZE))
    assert trace.meta()["cube_starts"] == [] and trace.heat("question")["heat"] == [[]] * 3
    assert trace.meta()["density"]["question"] == [None] * 3
    assert trace.ffn()["share"] == [1.0] * 3


def test_answer_ends_where_it_stops() -> None:
    trace = new_trace()
    trace.stop_ids = frozenset([9])
    for tokens in ([5], [], [9], [4]):
        trace.add_answer(tokens)
    assert trace.answer_ids == [5, 9]


def test_bits() -> None:
    bits = np.random.default_rng(0).random((3, 4, 21)) < 0.5
    assert (unpack_bits(pack_bits(bits), 21) == bits).all()
    assert unpack_bits(pack_bits(bits), 40)[..., 21:].sum() == 0
    step = StepTrace()
    step.tokens(2, torch.from_numpy(bits[0]))
    step.tokens(4, torch.from_numpy(bits[1]))
    _, ran = step.to_host(LAYERS)
    assert (ran[0] == pack_bits(bits[0])).all() and (ran[2] == pack_bits(bits[1])).all()
    assert (ran[1] == 0xFF).all()


BAD_SOURCES = ["", "video", "token", "token:", "token:-1", "token:1.5", "cube:1 ", "token:1\n"]
BAD_SOURCES += ["question:1", "cube:123456789", "../../etc", "x" * 10_000]


@pytest.mark.parametrize("source", BAD_SOURCES)
def test_bad_sources(source: str) -> None:
    with pytest.raises(ValueError, match=r"source=.*question, answer, token:N or cube:N"):
        parse_source(source)


def test_sources_outside_the_request() -> None:
    trace = new_trace()
    with pytest.raises(ValueError, match=r"source='cube:8': the request has 8 cubes"):
        trace.heat("cube:8")
    with pytest.raises(ValueError, match=rf"source='token:{PROMPT}': the request has {PROMPT} "):
        trace.heat(f"token:{PROMPT}")


def test_spans_cover_every_token_once() -> None:
    second = Video(VIDEO.end + 3, (1, 1, 2), (4, 4, 4), "cube")
    trace = new_trace(videos=(VIDEO, second))
    trace.answer_ids = [5, 6]
    spans = trace.meta()["spans"]
    assert [span["kind"] for span in spans] == [
        "before", "video", "question", "video", "question", "answer",
    ]  # fmt: skip
    edges = [(span["start"], span["end"]) for span in spans]
    assert edges[0][0] == 0 and edges[-1][1] == PROMPT + 2
    assert all(a[1] == b[0] for a, b in pairwise(edges))
    assert spans[2]["ids"] == [VIDEO.end, VIDEO.end + 1, VIDEO.end + 2]
    json.dumps(trace.meta())


# -- memory ---------------------------------------------------------------------------------------


def filled(store: TraceStore, name: str, chunks: int = 1) -> Trace:
    trace = new_trace(name)
    store.running[name] = trace
    recorder = Recorder()
    recorder.step(0, PROMPT)
    for _ in range(chunks):
        chunk = recorder.trace.chunks[0]
        if store.make_room(trace, chunk.nbytes):
            trace.chunks.append(chunk)
            trace.nbytes += chunk.nbytes
    return trace


def test_oldest_finished_trace_makes_room() -> None:
    one = filled(TraceStore(1 << 30), "x").nbytes
    store = TraceStore(round(2.5 * one))
    traces = []
    for name in "abc":
        traces.append(filled(store, name))
        store.finish(name)
        traces[-1].started = float(ord(name))
    assert [trace.request_id for trace in store] == ["c", "b"]
    assert store[traces[0].id] is None and store[traces[2].id] is traces[2]
    assert all(trace.truncated is None for trace in traces)
    assert sum(trace.nbytes for trace in store) <= store.limit


def test_running_trace_that_finds_no_room_is_cut_and_says_so() -> None:
    probe = filled(TraceStore(1 << 30), "x")
    store = TraceStore(probe.prompt_ids.nbytes + round(3.5 * probe.chunks[0].nbytes))
    trace = filled(store, "long", chunks=10)
    assert len(trace.chunks) == 3
    assert "trace_mb=" in trace.truncated and trace.summary()["truncated"] == trace.truncated
    assert sum(trace.nbytes for trace in store) <= store.limit


def test_bytes_are_counted() -> None:
    recorder = Recorder()
    for start, end in [(0, 320), (320, 500), (192, 400), (400, PROMPT)]:
        recorder.step(start, end)
    trace = recorder.trace
    trace.add_frame(0, 0, b"x" * 1000)
    chunks = sum(chunk.nbytes for chunk in trace.chunks)
    assert trace.nbytes == chunks + 1000 + trace.prompt_ids.nbytes
    assert [(chunk.start, chunk.end) for chunk in trace.chunks] == [
        (0, 192), (192, 400), (400, PROMPT),
    ]  # fmt: skip


def test_delete() -> None:
    store = TraceStore(1 << 30)
    trace = filled(store, "a")
    assert store.delete(trace.id) and not store.delete(trace.id)
    assert list(store) == [] and store.running == {}


def test_trace_ids_are_safe_in_urls() -> None:
    ids = {trace_id(name) for name in ("a", "../../etc/passwd", "ü" * 1000, "")}
    assert len(ids) == 4
    assert all(len(each) == 16 and set(each) <= set("0123456789abcdef") for each in ids)


# -- ranks put together ---------------------------------------------------------------------------


def test_ranks_are_merged() -> None:
    """Two stages of two tensor-parallel ranks each, in no particular order."""
    ranks = {
        (stage, head): Recorder(seed=10 * stage + head, layers=layers)
        for stage, layers in enumerate((range(0, 2), range(2, 5)))
        for head in range(2)
    }
    for recorder in ranks.values():
        recorder.step(0, PROMPT)
        recorder.step(PROMPT, PROMPT + 1)
    speaker = ranks[1, 0].trace
    speaker.answer_ids = [3, 4]
    ranks[0, 0].trace.add_frame(0, 2, b"jpeg")
    traces = [ranks[key].trace for key in ((1, 1), (0, 0), (1, 0), (0, 1))]

    heat = reader.merge_heat([trace.heat("answer") for trace in traces])
    assert heat["layers"] == [0, 1, 2, 3, 4]
    for stage, rows in ((0, slice(0, 2)), (1, slice(2, 5))):
        both = [as_array(ranks[stage, head].trace.heat("answer")["heat"]) for head in range(2)]
        np.testing.assert_allclose(as_array(heat["heat"])[rows], np.mean(both, 0), atol=1e-4)
    early = reader.merge_heat([trace.heat("cube:2") for trace in traces])
    assert early["heat"][0][3:] == [None] * 5

    meta = reader.merge_meta([trace.meta() | {"usage": None} for trace in traces])
    assert meta["layers"] == [0, 1, 2, 3, 4] and len(meta["density"]["video"]) == 5
    assert meta["spans"][-1] == {
        "kind": "answer", "start": PROMPT, "end": PROMPT + 2, "ids": [3, 4],
    }  # fmt: skip
    assert meta["answer_tokens"] == 2 and meta["videos"][0]["frames"] == 1
    assert meta["bytes"] == sum(trace.nbytes for trace in traces)

    ffn = reader.merge_ffn([trace.ffn() for trace in traces])
    assert ffn["layers"] == [0, 1, 2, 3, 4] and len(ffn["ran"]) == len(ffn["share"]) == 5
    assert ffn["ran"][0] == ranks[0, 0].trace.ffn()["ran"][0]

    (summary,) = reader.merge_lists([[trace.summary()] for trace in traces])
    assert summary["answer_tokens"] == 2


def test_unknown_traces_merge_to_none() -> None:
    for merge in (reader.merge_meta, reader.merge_heat, reader.merge_ffn):
        assert merge([None, None]) is None
    assert reader.merge_lists([[], None]) == []
    assert reader.merge_heat([{"error": "no"}, {"error": "no"}]) == {"error": "no"}


def test_summaries_come_latest_first() -> None:
    summaries = []
    for name, started in (("a", 1.0), ("b", 3.0), ("c", 2.0)):
        trace = new_trace(name)
        trace.started = started
        summaries.append(trace.summary())
    assert [each["request_id"] for each in reader.merge_lists([summaries])] == ["b", "c", "a"]


def test_complete_adds_text_and_walk() -> None:
    class Tokenizer:
        def decode(self, ids) -> str:
            return "".join(f"<{token}>" for token in ids)

    meta = reader.complete(new_trace().meta(), Tokenizer())
    assert meta["spans"][0]["texts"][:2] == ["<0>", "<1>"]
    assert "texts" not in meta["spans"][1]
    walk = np.frombuffer(reader.base64.b64decode(meta["videos"][0]["walk"]), "<i4")
    assert (walk == cube_order(GRID, (4, 4, 4))).all()


@pytest.mark.parametrize(
    "number, wanted, expected",
    [(60, 6, [5, 15, 25, 35, 45, 55]), (3, 6, [0, 1, 2]), (1, 1, [0]), (10, 1, [5])],
)
def test_spread(number: int, wanted: int, expected: list[int]) -> None:
    assert reader.spread(number, wanted) == expected


# -- frames ---------------------------------------------------------------------------------------


def shape() -> PatchShape:
    return PatchShape(patch=14, frames=2, merge=2, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def patchify(frames: np.ndarray) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """As Qwen2-VL's processor cuts frames ``[n, h, w, 3]`` of 0 to 255, not yet normalised."""
    n, height, width, _ = frames.shape
    t, h, w = n // 2, height // 14, width // 14
    cut = torch.from_numpy(frames).permute(0, 3, 1, 2)
    cut = cut.reshape(t, 2, 3, h // 2, 2, 14, w // 2, 2, 14)
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1), (t, h, w)


def test_unpatchify_gives_the_frames_back() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 56, 84, 3), dtype=np.uint8)
    patches, grid = patchify(frames)
    assert (unpatchify(patches, grid, shape()) == frames[::2]).all()
    # Channels outermost in a patch: [3, frames, patch, patch].
    mean, std = (
        torch.tensor(values).repeat_interleave(2 * 14 * 14)
        for values in (shape().mean, shape().std)
    )
    normalised = (patches.float() / 255 - mean) / std
    assert (unpatchify(normalised, grid, shape()) == frames[::2]).all()


def test_unpatchify_undoes_the_real_processor() -> None:
    from transformers import Qwen2VLVideoProcessor

    frames = np.random.default_rng(1).integers(0, 256, (4, 56, 84, 3), dtype=np.uint8)
    processor = Qwen2VLVideoProcessor(
        size={"shortest_edge": 28 * 28, "longest_edge": 1 << 20}, cap_pixels_per_frame=False
    )
    made = processor(videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)], return_tensors="pt")
    real = PatchShape(14, 2, 2, processor.image_mean, processor.image_std)
    got = unpatchify(made["pixel_values_videos"], tuple(made["video_grid_thw"][0].tolist()), real)
    assert np.abs(got.astype(int) - frames[::2]).max() <= 1


def test_thumbnails_are_small_and_bounded() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 280, 560, 3), dtype=np.uint8)
    patches, grid = patchify(frames)
    made = thumbnails(patches, grid, shape(), limit=1 << 20)
    assert list(made) == [0, 1, 2]
    assert Image.open(io.BytesIO(made[1])).size == (320, 160)
    fewer = thumbnails(patches, grid, shape(), limit=len(made[0]) + 10)
    assert list(fewer) == [0]


# -- the page's files -----------------------------------------------------------------------------


def test_every_file_of_the_page_is_served_and_packaged() -> None:
    from vllm_adaspark.server.traces import FILES, PAGE

    assert {path.name for path in PAGE.iterdir()} == set(FILES)
    project = tomllib.loads((PAGE.parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["vllm_adaspark.server"]
    for name in FILES:
        assert any(fnmatch(f"viewer/{name}", pattern) for pattern in patterns), name
