"""Traces without an engine: shares against a naive count, memory, ranks merged, frames."""

from __future__ import annotations

import base64
import io
import json
import tomllib
from fnmatch import fnmatch
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from vllm_adaspark.methods.adaspark.planner import build_plan
from vllm_adaspark.methods.adaspark.request import AdaSparkRequest
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.models.qwen2_5_vl_layout import PatchShape, unpatchify
from vllm_adaspark.paged.state import StepRows
from vllm_adaspark.traces import reader
from vllm_adaspark.traces.frames import (
    MAX_WAITING,
    FrameMaker,
    Frames,
    frame_bytes,
)
from vllm_adaspark.traces.step import StepTrace, chunk_of, counted_bytes
from vllm_adaspark.traces.store import Sizes, TraceStore, trace_id
from vllm_adaspark.traces.trace import Trace, Video, pack_bits, parse_source, unpack_bits
from vllm_adaspark.video.order import cube_order

SIZE = 64
LAYERS = range(2, 5)  # as on a second pipeline stage
KV_HEADS = 2
BEFORE, GRID, AFTER = 10, (8, 8, 9), 7  # text, video, question
VIDEO = Video(BEFORE, GRID, (4, 4, 4), "cube", 1.0)
PROMPT = BEFORE + VIDEO.length + AFTER
CONFIG = AdaSparkConfig(p_attn=0.5, p_ffn=0.5)
SIZES = Sizes(layers=len(LAYERS), kv_heads=KV_HEADS, block_size=SIZE, step_tokens=PROMPT)


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

    def __init__(
        self,
        seed: int = 0,
        layers: range = LAYERS,
        dense_layer: int = 3,
        tile_cubes: int = 1,
    ) -> None:
        self.tile_cubes = tile_cubes
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
        chunk, *what = self.chunk(start, end, row)
        if trace:
            self.trace.add(chunk)
            self._remember(start, end, *what)

    def chunk(self, start: int, end: int, row: int = 1):
        """(the step's chunk, its plan, what its layers chose, what ran)."""
        others = 3
        rows = StepRows(
            query_start=np.array([0, 1, 1 + end - start]),
            seq_lens=np.array([others, end]),
            block_table=np.stack([np.full(32, 60), np.arange(32)]),
        )
        is_video = (np.arange(PROMPT) >= BEFORE) & (np.arange(PROMPT) < VIDEO.end)
        plan = build_plan(
            rows, [None, AdaSparkRequest(CONFIG, is_video)], SIZE,
            dense_below=2, cube_queries=16, tile_cubes=self.tile_cubes, device=torch.device("cpu"),
        )  # fmt: skip
        step = StepTrace()
        chosen, active = self._choose(plan, step)
        chunk = chunk_of(row, rows, plan, step.to_host(self.layers), SIZE)
        chunk.counted = counted_bytes(row, rows, plan, SIZES)
        return chunk, plan, chosen, active

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

    def _remember(self, start: int, end: int, plan, chosen: dict, active: dict) -> None:
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


@pytest.fixture(params=["at once", "in pairs", "in chunks", "preempted"])
def recorder(request) -> Recorder:
    recorder = Recorder(tile_cubes=2 if request.param == "in pairs" else 1)
    chunks = {
        "at once": [(0, PROMPT)],
        "in pairs": [(0, 384), (384, PROMPT)],
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
    assert list(trace.answer_ids) == [5, 9]


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


def recorded() -> Recorder:
    recorder = Recorder()
    recorder.step(0, PROMPT)
    return recorder


CHUNK = recorded().trace.chunks[0]
EXPECTED = SIZES.prompt(new_trace(), computed=0)


def start(store: TraceStore, name: str, expected: int = EXPECTED) -> Trace:
    trace = new_trace(name)
    trace.started = float(len(list(store)))
    store.start(trace, expected)
    return trace


def record(store: TraceStore, trace: Trace, chunks: int = 1) -> Trace:
    for _ in range(chunks):
        if not trace.truncated and store.grow(trace, CHUNK.counted):
            trace.chunks.append(CHUNK)
            trace.counted += CHUNK.counted
    return trace


def names(store: TraceStore) -> set[str]:
    return {trace.request_id for trace in store}


def within(store: TraceStore) -> bool:
    return sum(trace.counted for trace in store) <= store.limit


def test_a_prompt_takes_no_more_than_expected() -> None:
    assert CHUNK.nbytes < CHUNK.counted <= EXPECTED < 2 * CHUNK.counted
    half = SIZES.prompt(new_trace(), computed=5 * SIZE)
    assert SIZES.prompt(new_trace(), computed=VIDEO.end) < half < EXPECTED
    assert SIZES.prompt(new_trace(videos=(Video(BEFORE, (1, 1, 2), (4, 4, 4), "cube"),)), 0) < 2000


def test_oldest_finished_trace_makes_room() -> None:
    one = start(TraceStore(1 << 30), "x").prompt_ids.nbytes + EXPECTED
    store = TraceStore(round(2.5 * one))
    traces = [start(store, name) for name in "ab"]
    for trace in traces:
        record(store, trace)
        store.finish(trace.request_id)
    assert names(store) == {"a", "b"}
    traces += [record(store, start(store, "c"))]
    assert names(store) == {"b", "c"}
    traces += [record(store, start(store, "d"))]
    assert names(store) == {"c", "d"}
    assert store[traces[0].id] is None and store[traces[3].id] is traces[3]
    assert all(trace.truncated is None for trace in traces) and within(store)


def test_a_trace_that_is_too_large_throws_nothing_out() -> None:
    """Neither as a whole, when its prompt is known, nor step by step, while its answer grows."""
    store = TraceStore(6 * (CHUNK.counted + 4 * PROMPT))
    for name in "abc":
        record(store, start(store, name))
        store.finish(name)
    large = record(store, start(store, "large", expected=store.limit))
    assert names(store) == {"a", "b", "c", "large"}
    assert large.chunks == [] and "nothing was recorded" in large.truncated
    assert "trace_mb=" in large.summary()["truncated"] and within(store)

    whole = start(TraceStore(1 << 30), "x").prompt_ids.nbytes + EXPECTED
    store = TraceStore(whole + 3000)
    first = record(store, start(store, "first"))
    second = record(store, start(store, "second"))
    assert first.chunks and not second.chunks, "the first one's request still runs"
    assert "running requests" in second.truncated and within(store)


def test_running_trace_that_finds_no_room_is_cut_and_says_so() -> None:
    store = TraceStore(4 * PROMPT + round(3.5 * CHUNK.counted))
    trace = record(store, start(store, "long"), chunks=10)
    assert len(trace.chunks) == 3
    assert trace.truncated == f"the traces reached trace_mb={store.limit >> 20}"
    assert trace.summary()["truncated"] == trace.truncated and within(store)


def test_a_trace_without_room_for_its_tokens_is_not_taken_in() -> None:
    store = TraceStore(PROMPT)
    assert not store.start(new_trace(), EXPECTED) and names(store) == set()


class Rank:
    """One rank's store beside its own layers, frames or none; counts as all ranks do."""

    def __init__(self, layers: range, dense_layer: int, has_frames: bool, limit: int) -> None:
        self.layers, self.dense_layer, self.has_frames = layers, dense_layer, has_frames
        self.store = TraceStore(limit)
        self.recorders: dict[str, Recorder] = {}

    def begin(self, name: str) -> None:
        recorder = self.recorders[name] = Recorder(layers=self.layers, dense_layer=self.dense_layer)
        frames = Frames([(torch.zeros(16, 1176, dtype=torch.uint8), (4, 1, 1))], shape(), 1 << 20)
        if not self.has_frames:
            frames.forget()
        trace = new_trace(name, layers=self.layers)
        trace.frames = frames
        trace.counted += frames.reserved
        recorder.trace = trace
        self.store.start(trace, SIZES.prompt(trace, 0))

    def step(self, name: str, start: int, end: int) -> None:
        recorder = self.recorders[name]
        chunk, *_ = recorder.chunk(start, end)
        if not recorder.trace.truncated and self.store.grow(recorder.trace, chunk.counted):
            recorder.trace.add(chunk)


def test_ranks_that_hold_different_amounts_keep_the_same_traces() -> None:
    """A stage with more layers, one whose layers are dense, one with the frames, one without."""
    limit = round(3.2 * (EXPECTED + 4 * PROMPT + 4 * frame_bytes((4, 1, 1), shape())))
    ranks = [
        Rank(range(0, 3), 1, True, limit),
        Rank(range(0, 3), 1, False, limit),
        Rank(range(3, 4), 3, False, limit),
    ]
    rng = np.random.default_rng(0)
    running, seen, truncated = [], set(), 0
    for number in range(40):
        name = f"request {number}"
        for rank in ranks:
            rank.begin(name)
            rank.step(name, 0, PROMPT)
        running.append(name)
        for token in range(rng.integers(0, 10)):
            for rank in ranks:
                rank.step(name, PROMPT + token, PROMPT + token + 1)
        for name in [each for each in running if rng.random() < 0.4]:
            running.remove(name)
            for rank in ranks:
                if name in rank.store.running:
                    rank.store.finish(name)
        assert len({frozenset(names(rank.store)) for rank in ranks}) == 1
        cut = {(t.request_id, t.truncated) for rank in ranks for t in rank.store}
        assert len(cut) == len(names(ranks[0].store)), "cut on one rank is cut on all"
        assert all(within(rank.store) for rank in ranks)
        seen |= names(ranks[0].store)
        truncated += any(why for _, why in cut)
    assert len(seen) > len(names(ranks[0].store)), "some made room"
    assert truncated, "and some found none"
    held = [sum(trace.nbytes for trace in rank.store) for rank in ranks]
    assert held[0] > held[2], "though they hold different amounts"


def test_bytes_are_counted() -> None:
    recorder = Recorder()
    for start, end in [(0, 320), (320, 500), (192, 400), (400, PROMPT)]:
        recorder.step(start, end)
    trace = recorder.trace
    trace.frames = Frames([patched(1)], shape(), 1 << 20)
    made = len(trace.frames.get(0, 0))
    chunks = sum(chunk.nbytes for chunk in trace.chunks)
    assert trace.nbytes == chunks + made + trace.prompt_ids.nbytes
    named = trace.prompt_ids.nbytes + 4 * len(trace.request_id)
    assert trace.counted == sum(c.counted for c in trace.chunks) + named
    assert [(chunk.start, chunk.end) for chunk in trace.chunks] == [
        (0, 192), (192, 400), (400, PROMPT),
    ]  # fmt: skip


def test_delete() -> None:
    store = TraceStore(1 << 30)
    trace = record(store, start(store, "a"))
    assert store.delete(trace.id) and not store.delete(trace.id)
    assert list(store) == [] and store.running == {}


def test_trace_ids_are_safe_in_urls() -> None:
    ids = {trace_id(name) for name in ("a", "../../etc/passwd", "ü" * 1000, "", "\ud800")}
    assert len(ids) == 5
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
    ranks[0, 0].trace.frames = Frames([patched(1)], shape(), 1 << 20)
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


def test_a_part_never_passes_for_the_whole() -> None:
    """One rank of four has lost its part: the trace is gone, whoever is asked for it."""
    ranks = [Recorder(seed=n, layers=layers) for n, layers in enumerate([LAYERS] * 4)]
    for recorder in ranks:
        recorder.step(0, PROMPT)
    traces = [recorder.trace for recorder in ranks]
    for lost in range(4):
        have = [None if n == lost else trace for n, trace in enumerate(traces)]
        assert reader.merge_meta([t and t.meta() | {"usage": None} for t in have]) is None
        assert reader.merge_heat([t and t.heat("question") for t in have]) is None
        assert reader.merge_ffn([t and t.ffn() for t in have]) is None
        assert reader.merge_lists([[t.summary()] if t else [] for t in have]) == []
        assert reader.merge_lists([[t.summary()] if t else None for t in have]) == []
    assert reader.merge_meta([t.meta() | {"usage": None} for t in traces]) is not None
    # A source that only the rank that samples knows: no answer from the others, so none at all.
    said = [traces[0].heat("question"), {"error": "no such token"}]
    assert reader.merge_heat(said) == {"error": "no such token"}


def test_usage_that_a_rank_does_not_know_is_none() -> None:
    metas = [recorded().trace.meta() | {"usage": usage} for usage in (None, {"tokens": 3})]
    assert reader.merge_meta(metas)["usage"] is None


def test_a_trace_that_goes_while_it_is_read() -> None:
    class Engine:
        def collective_rpc(self, method: str, args: tuple) -> list:
            return [recorded().trace.meta() | {"usage": None} if args[1] == "meta" else None]

        def get_tokenizer(self) -> None:
            return None

    with pytest.raises(LookupError, match="made room for later ones"):
        reader.read_offline(Engine(), trace_id("r"))


@pytest.mark.parametrize(
    "name", ["chatcmpl-1", "chatcmpl-1-0123abcd", "2_chatcmpl-1-0123abcd",
             f"chatcmpl-1-{'ab' * 8}-beam-0-0123abcd"],
)  # fmt: skip
def test_the_trace_of_a_clients_request(name: str) -> None:
    summaries = [new_trace(n).summary() for n in ("chatcmpl-12-0123abcd", name)]
    assert reader._latest(summaries, "chatcmpl-1")["request_id"] == name
    with pytest.raises(LookupError, match="no trace of request"):
        reader._latest(summaries, "chatcmpl")


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


def test_complete_adds_text_and_token_order() -> None:
    class Tokenizer:
        def decode(self, ids) -> str:
            return "".join(f"<{token}>" for token in ids)

    meta = reader.complete(new_trace().meta(), Tokenizer())
    assert meta["spans"][0]["texts"][:2] == ["<0>", "<1>"]
    assert "texts" not in meta["spans"][1]
    token_order = np.frombuffer(base64.b64decode(meta["videos"][0]["token_order"]), "<i4")
    assert (token_order == cube_order(GRID, (4, 4, 4))).all()


# -- frames ---------------------------------------------------------------------------------------


def shape() -> PatchShape:
    return PatchShape(patch=14, frames=2, merge=2, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def patchify(frames: np.ndarray) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """As Qwen2-VL's processor cuts frames ``[n, h, w, 3]`` of 0 to 255, not yet normalised."""
    n, height, width, _ = frames.shape
    t, h, w = n // 2, height // 14, width // 14
    cut = torch.from_numpy(frames).permute(0, 3, 1, 2)
    cut = cut.reshape(t, 2, 3, h // 2, 2, 14, w // 2, 2, 14)
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1), (t, h // 2, w // 2)


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
    t, h, w = made["video_grid_thw"][0].tolist()
    got = unpatchify(made["pixel_values_videos"], (t, h // 2, w // 2), real)
    assert np.abs(got.astype(int) - frames[::2]).max() <= 1


def patched(pairs: int, height: int = 280, width: int = 560):
    """(patches, grid) of a video of noise, the worst there is for a JPEG."""
    rng = np.random.default_rng(0)
    return patchify(rng.integers(0, 256, (2 * pairs, height, width, 3), dtype=np.uint8))


def test_frames_are_small_and_keep_to_their_room() -> None:
    frames = Frames([patched(3), None, patched(2, 28, 28)], shape(), limit=1 << 20)
    assert [frames.number(video) for video in range(4)] == [3, 0, 2, 0]
    assert Image.open(io.BytesIO(frames.get(0, 1))).size == (320, 160)
    assert Image.open(io.BytesIO(frames.get(2, 1))).size == (28, 28)
    for outside in ((0, 3), (0, -1), (1, 0), (3, 0)):
        assert frames.get(*outside) is None
    frames.make_all()
    assert 0 < frames.nbytes <= frames.reserved
    assert frames.reserved == 3 * (320 * 160 // 4) + 2 * 2048
    fewer = Frames([patched(3)], shape(), limit=2 * frame_bytes(patched(3)[1], shape()) + 10)
    assert fewer.number(0) == 2 and fewer.get(0, 2) is None


def test_frames_show_the_video() -> None:
    rows = np.linspace(0, 255, 280).astype(np.uint8)
    clip = np.broadcast_to(rows[None, :, None, None], (4, 280, 560, 3)).copy()
    clip[2:] = 255 - clip[2:]
    frames = Frames([patchify(clip)], shape(), 1 << 20)
    for frame, got in ((0, clip[0]), (1, clip[2])):
        jpeg = np.array(Image.open(io.BytesIO(frames.get(0, frame))))
        sent = np.array(Image.fromarray(got).resize((320, 160)))
        assert np.abs(jpeg.astype(int) - sent).mean() < 3


def test_a_thread_makes_the_frames(monkeypatch) -> None:
    """Whoever asks before it is done gets theirs at once, and a full queue is no harm."""
    import threading

    go, begun, asked = threading.Event(), threading.Event(), []
    real = Frames._make

    def slow(self, *arguments):
        asked.append(threading.current_thread().name)
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go.wait(120)
        return real(self, *arguments)

    monkeypatch.setattr(Frames, "_make", slow)
    maker = FrameMaker()
    all_frames = [Frames([patched(2, 28, 28)], shape(), 1 << 20) for _ in range(MAX_WAITING + 3)]
    maker.submit(all_frames[0])
    assert begun.wait(120), "the thread has the first trace, and the queue is empty"
    for frames in all_frames[1:]:
        maker.submit(frames)
    assert all_frames[0].get(0, 1) and "MainThread" in asked
    assert [f.number(0) for f in all_frames[-2:]] == [0, 0], "no room in the queue: without"
    assert all(f.number(0) for f in all_frames[:-2])
    dropped = all_frames.pop(3)
    del dropped, frames  # as an evicted trace: its pictures are not made
    go.set()
    deadline = 2400
    while not all(not f._sources for f in all_frames) and deadline:
        deadline -= 1
        threading.Event().wait(0.05)
    assert all(f.nbytes > 0 for f in all_frames if f.number(0))


# -- the page's files -----------------------------------------------------------------------------


def test_every_file_of_the_page_is_served_and_packaged() -> None:
    from vllm_adaspark.server.traces import FILES, PAGE

    assert {path.name for path in PAGE.iterdir()} == set(FILES)
    project = tomllib.loads((PAGE.parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["vllm_adaspark.server"]
    for name in FILES:
        assert any(fnmatch(f"viewer/{name}", pattern) for pattern in patterns), name


# -- routes, over workers that do not answer as they should -------------------------------------


def answers(ask, path: str, accounts: bool = True, tokenizer: object = None):
    from types import SimpleNamespace

    from fastapi import FastAPI
    from starlette.testclient import TestClient

    from vllm_adaspark.server import traces

    def get_tokenizer():
        if tokenizer is None:
            raise ValueError("Tokenizer not available when `skip_tokenizer_init=True`")
        return tokenizer

    app = FastAPI()
    traces.attach(app)
    app.state.adaspark_accounts = accounts
    core = SimpleNamespace(call_utility_all_async=ask, engine_ranks_managed=[0])
    app.state.engine_client = SimpleNamespace(engine_core=core, get_tokenizer=get_tokenizer)
    return TestClient(app, raise_server_exceptions=False).get(f"/v1/adaspark/traces{path}")


PATHS = ["", "/0123456789abcdef", "/0123456789abcdef/heat", "/0123456789abcdef/ffn"]
PATHS += ["/0123456789abcdef/frames/0/0.jpg"]


@pytest.mark.parametrize("path", PATHS)
def test_workers_that_fail_are_no_internal_error(path: str) -> None:
    async def fails(*args):
        raise RuntimeError("the engine is dead")

    async def lost(*args):
        said = recorded().trace.summary() if "traces" in args[1] else {"frame": 1}
        return [[[said], []] if args[1] == "adaspark_traces" else [said, None]]

    assert answers(fails, path).status_code == 503
    assert answers(fails, path, accounts=False).status_code == 503
    if not path:
        assert answers(lost, path).json() == {"traces": []}
    elif "frames" not in path:
        assert answers(lost, path).status_code == 404, "one of two ranks has lost its part"


def test_tokens_are_decoded_off_the_event_loop() -> None:
    import threading

    threads = set()

    class Tokenizer:
        def decode(self, ids) -> str:
            threads.add(threading.current_thread().name)
            return "x"

    async def ask(*args):
        return [[recorded().trace.meta() | {"usage": None}]]

    reply = answers(ask, "/0123456789abcdef", tokenizer=Tokenizer())
    assert reply.status_code == 200 and reply.json()["spans"][0]["texts"] == ["x"] * BEFORE
    assert threads and all("asyncio" in name for name in threads), threads
    without = answers(ask, "/0123456789abcdef").json()
    assert "texts" not in without["spans"][0] and without["spans"][0]["ids"]
