"""Traces of the real engine: they agree with the accounts, and change no answer."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from engine.engines import SPARSE, ask, clip, engine, last_reports, video_prompt
from vllm_adaspark import observing
from vllm_adaspark.traces import reader
from vllm_adaspark.traces.picture import save_heatmap
from vllm_adaspark.traces.trace import unpack_bits

pytestmark = pytest.mark.engine
CLOSE = 1e-3  # of log-probabilities in float32
FRAMES, WIDTH, HEIGHT = 44, 168, 140  # 22 frame pairs of 5 x 6 tokens


def traced_prompt(seed: int, salt: str = "", **settings) -> dict:
    prompt = video_prompt(clip(FRAMES, seed=seed), question="Which digit?", **settings)
    return prompt | {"cache_salt": salt} if salt else prompt


def traces(llm) -> list[dict]:
    return reader.merge_lists(llm.collective_rpc("adaspark_traces"))


def ask_trace(llm, trace_id: str, what: str, *arguments) -> list:
    return llm.collective_rpc("adaspark_trace", args=(trace_id, what, *arguments))


def heat_of(llm, trace_id: str, source: str) -> dict:
    return reader.merge_heat(ask_trace(llm, trace_id, "heat", source))


def density_over_all(meta: dict) -> np.ndarray:
    """Per layer, the trace's densities of all kinds of token together, as accounts count them."""
    starts, size = np.array(meta["cube_starts"]), meta["block_size"]
    seen = dict.fromkeys(meta["density"], 0)
    for span in meta["spans"]:
        # The answer's last token is never read.
        end = span["end"] - (span["kind"] == "answer")
        for token in range(span["start"], end):
            if span["kind"] in seen:
                seen[span["kind"]] += int((starts < token // size * size).sum())
    total = sum(seen.values())
    return sum(np.array(meta["density"][kind], float) * n / total for kind, n in seen.items() if n)


def agrees_with_account(llm, trace_id: str, report: dict) -> None:
    meta = reader.merge_meta(ask_trace(llm, trace_id, "meta"))
    layers = report["layers"]
    expected = [layer["attention_density"] for layer in layers]
    np.testing.assert_allclose(density_over_all(meta), expected, atol=5e-4)
    ffn = reader.merge_ffn(ask_trace(llm, trace_id, "ffn"))
    # The account counts a cube's centroid as an evaluation, the trace the tokens that ran.
    centroids = np.array([x["ffn_density"] for x in layers]) - ffn["share"]
    assert (centroids > -5e-4).all() and (centroids < 1 / 64 + 5e-4).all(), centroids
    assert meta["usage"]["flops_ratio"] == pytest.approx(report["flops_ratio"])


def step_trace(worker):
    """Whether the worker's last step was recorded; runs in the worker."""
    return worker.model_runner.model.runtime.plan.trace is not None


def test_traces(checkpoint, tmp_path) -> None:
    """One engine, many questions."""
    with engine(checkpoint, SPARSE) as llm:
        changes_no_answer_and_agrees(llm)
        only_those_who_ask_are_traced(llm)
        frames_are_what_the_model_saw(llm)
        cached_tokens_are_missing(llm)
        dense_request_attends_to_all(llm)
        two_videos(llm, tmp_path)
        aborted_requests_leave_ended_traces_and_nothing_else(llm)
        a_trace_without_room_takes_nobodys_place(llm)
        what_fails_beside_the_model_ends_nothing(llm)


def changes_no_answer_and_agrees(llm) -> None:
    (plain,) = ask(llm, [traced_prompt(7)])
    (traced,) = ask(llm, [traced_prompt(7, trace=True)])
    assert traced.cached_tokens == 0 and traced.difference(plain) == 0
    (trace,) = traces(llm)
    assert trace["prompt_tokens"] + trace["answer_tokens"] > 22 * 30
    (report,) = last_reports(llm)
    assert trace["request_id"] == report["request_id"]
    agrees_with_account(llm, trace["id"], report)

    meta = reader.complete(reader.merge_meta(ask_trace(llm, trace["id"], "meta")))
    assert tuple(meta["spans"][-1]["ids"]) == traced.ids
    assert meta["videos"][0]["grid"] == [22, 5, 6] and meta["settings"]["p_attn"] == 0.6
    for source in ("question", "answer", "token:600", "cube:8"):
        heat = heat_of(llm, trace["id"], source)
        assert heat["tokens"] == heat["wanted"] > 0
        values = np.array(heat["heat"], float)
        assert 0 <= np.nanmin(values) < np.nanmax(values) <= 1
    cut = np.array(heat_of(llm, trace["id"], "token:650")["heat"])
    assert (cut == 1).all(), "the last block is no whole cube, so its tokens attend to all"
    (error,) = ask_trace(llm, trace["id"], "heat", "cube:9")
    assert error == {"error": "source='cube:9': the request has 9 cubes"}


def only_those_who_ask_are_traced(llm) -> None:
    known = len(traces(llm))
    alone = [ask(llm, [traced_prompt(seed, "alone")])[0] for seed in (8, 9)]
    assert llm.collective_rpc(step_trace) == [False]
    assert len(traces(llm)) == known
    together = ask(llm, [traced_prompt(8, "both"), traced_prompt(9, "both", trace=True)])
    assert llm.collective_rpc(step_trace) == [True]
    for got, want in zip(together, alone, strict=True):
        assert got.difference(want) < CLOSE
    assert len(traces(llm)) == known + 1
    by_id = {report["request_id"]: report for report in last_reports(llm, 2)}
    latest = traces(llm)[0]
    agrees_with_account(llm, latest["id"], by_id[latest["request_id"]])


def frames_are_what_the_model_saw(llm) -> None:
    ask(llm, [traced_prompt(10, trace=True)])
    trace_id = traces(llm)[0]["id"]
    sent, _ = clip(FRAMES, seed=10)
    for n in (0, 13, 21):
        (jpeg,) = ask_trace(llm, trace_id, "frame", 0, n)
        got = np.array(Image.open(io.BytesIO(jpeg))).astype(int)
        assert got.shape == (HEIGHT, WIDTH, 3)
        assert np.abs(got - sent[2 * n]).mean() < 6  # JPEG is not exact
        assert np.abs(got - sent[(2 * n + 20) % FRAMES]).mean() > 8
    assert ask_trace(llm, trace_id, "frame", 0, 22) == [None]
    assert ask_trace(llm, trace_id, "frame", 1, 0) == [None]
    assert ask_trace(llm, "0" * 16, "meta") == [None]


def cached_tokens_are_missing(llm) -> None:
    prompt = traced_prompt(11, trace=True)
    ask(llm, [prompt])
    (hit,) = ask(llm, [prompt])
    trace = traces(llm)[0]
    assert trace["cached_tokens"] == hit.cached_tokens >= 8 * 64
    meta = reader.merge_meta(ask_trace(llm, trace["id"], "meta"))
    assert meta["videos"][0]["frames"] in (0, 22)  # vLLM drops pixels it will not encode again
    cube = heat_of(llm, trace["id"], "cube:2")
    assert cube["tokens"] == 0 and cube["wanted"] == 64 and set(cube["heat"][0]) == {None}
    question = heat_of(llm, trace["id"], "question")
    assert question["tokens"] == question["wanted"]
    recorded = reader.merge_ffn(ask_trace(llm, trace["id"], "ffn"))["recorded"]
    known = unpack_bits(np.frombuffer(recorded, np.uint8), 660)
    assert 0 < known.sum() == 660 - (hit.cached_tokens - meta["videos"][0]["offset"])
    salted = {"cache_salt": "mine"}
    (cold,) = ask(llm, [prompt | salted])
    assert cold.cached_tokens == 0 and traces(llm)[0]["cached_tokens"] == 0


def dense_request_attends_to_all(llm) -> None:
    ask(llm, [traced_prompt(12, off=True, trace=True)])
    trace_id = traces(llm)[0]["id"]
    meta = reader.merge_meta(ask_trace(llm, trace_id, "meta"))
    assert meta["videos"][0]["order"] == "raster"
    for source in ("question", "answer"):
        assert np.min(heat_of(llm, trace_id, source)["heat"]) == 1.0
    assert reader.merge_ffn(ask_trace(llm, trace_id, "ffn"))["share"] == [1.0] * 4


def two_videos(llm, tmp_path) -> None:
    videos = [clip(16, seed=2), clip(20, 112, 196, seed=3)]
    ask(llm, [video_prompt(*videos, question="Which digit is shown?", trace=True)])
    trace = reader.read_offline(llm, frames=3)
    assert len(trace["videos"]) == 2 and 3 <= len(trace["jpegs"]) <= 6  # three of each source
    assert [span["kind"] for span in trace["spans"]].count("video") == 2
    picture = save_heatmap(trace, tmp_path / "two.png")
    assert Image.open(picture).size[0] > 1000
    with pytest.raises(LookupError, match="no trace '0000000000000000'"):
        reader.read_offline(llm, "0" * 16)


def set_limit(limit: int, layers: int = 4):
    """Sets the limit of a rank's traces, and of how many layers they count; runs in the worker."""

    def run(worker) -> None:
        tracer = worker._tracer
        tracer.store.limit, tracer._sizes = limit, replace(tracer._sizes, layers=layers)

    return run


def names_kept(worker) -> set[str]:
    """The ids of requests by which a worker keeps anything but a finished trace or account."""
    ledger, tracer = worker._accounts.ledger, worker._tracer
    kept = (worker._runtime.requests._known, worker.model_runner.requests, tracer.store.running)
    kept += (ledger._settings, ledger._whole, ledger._running, tracer._survivors._awaited)
    return {name for names in kept for name in names}


def aborted_requests_leave_ended_traces_and_nothing_else(llm) -> None:
    """Whose client goes away before, in and after the prompt, alone or beside others."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)
    known = {trace["id"] for trace in traces(llm)}
    for steps in (0, 1, 2, 5):
        for nth, settings in enumerate(({}, {"prune": 0.5})):
            prompt = traced_prompt(nth, f"left {steps}", trace=True, **settings)
            llm.llm_engine.add_request(f"left {steps} {nth}", prompt, sampling)
        for _ in range(steps):
            llm.llm_engine.step()
        assert any(name.startswith("left") for name in names_kept_in(llm)) == (steps > 0)
        llm.llm_engine.abort_request([f"left {steps} {nth}" for nth in range(2)])
        ask(llm, [video_prompt(clip(8))], max_tokens=2)  # workers learn of it in the next step
        assert not any(name.startswith("left") for name in names_kept_in(llm))
    left = [trace for trace in traces(llm) if trace["id"] not in known]
    assert len(left) == 6, "those that ran"
    for trace in left:
        assert trace["finished"] and not trace["truncated"], "it makes room for later ones"
        meta = reader.merge_meta(ask_trace(llm, trace["id"], "meta"))
        assert meta["usage"]["tokens"] >= 300 and heat_of(llm, trace["id"], "question")["tokens"]
        assert len(reader.merge_ffn(ask_trace(llm, trace["id"], "ffn"))["ran"]) == 4


def names_kept_in(llm) -> set[str]:
    (kept,) = llm.collective_rpc(names_kept)
    return kept


def a_trace_without_room_takes_nobodys_place(llm) -> None:
    for trace in traces(llm):
        assert ask_trace(llm, trace["id"], "delete") == [True]
    (plain,) = ask(llm, [traced_prompt(13, "no room")])
    for seed in range(3):
        ask(llm, [video_prompt(clip(16, seed=seed), trace=True)])
    ((small, counted, _),) = llm.collective_rpc(held)
    llm.collective_rpc(set_limit(counted + 4096, layers=4000))  # as of a larger model
    (traced,) = ask(llm, [traced_prompt(13, "no room, traced", trace=True)])
    assert traced.difference(plain) < CLOSE
    latest = traces(llm)[0]
    assert {trace["id"] for trace in traces(llm)} == {*small, latest["id"]}
    assert "nothing was recorded" in latest["truncated"] and "trace_mb=" in latest["truncated"]
    meta = reader.merge_meta(ask_trace(llm, latest["id"], "meta"))
    assert meta["density"]["question"] == [None] * 4 and meta["usage"]["flops_ratio"] < 1
    assert meta["videos"][0]["frames"] == 0
    assert heat_of(llm, latest["id"], "question")["tokens"] == 0
    llm.collective_rpc(set_limit(64 << 20))
    ask(llm, [traced_prompt(13, "room again", trace=True)])
    assert traces(llm)[0]["truncated"] is None


BREAK = {
    "starting a trace": "vllm_adaspark.traces.worker.settings_of",
    "recording what a layer chose": "vllm_adaspark.traces.step._pack",
    "filing a step's traces": "vllm_adaspark.traces.worker.chunk_of",
    "keeping a traced answer": "vllm_adaspark.traces.trace.Trace.add_answer",
    "traces before a step": "vllm_adaspark.traces.worker.Tracer.before_step",
    "traces after a step": "vllm_adaspark.traces.worker.Tracer.after_step",
    "listing traces": "vllm_adaspark.traces.trace.Trace.summary",
    "reading a trace": "vllm_adaspark.traces.trace.Trace.meta",
    "making a trace's frames": "vllm_adaspark.models.qwen2_5_vl_layout.unpatchify",
    "the account of a step": "vllm_adaspark.accounts.ledger.count_step",
    "the account of a request": "vllm_adaspark.worker.request_report",
    "accounts": "vllm_adaspark.worker.RequestAccounts.settle",
    "the settings in accounts": "vllm_adaspark.accounts.ledger.Ledger.admit",
    "reading accounts": "vllm_adaspark.accounts.ledger.Ledger.report",
}


def what_fails_beside_the_model_ends_nothing(llm) -> None:
    """Each observer in turn: the answer is the same, it is told, and the next trace is whole."""
    (plain,) = ask(llm, [traced_prompt(14, "plain")])
    for what, function in BREAK.items():
        told = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(observing, "_told", set())
            patch.setattr(observing.logger, "exception", lambda *said, told=told: told.append(said))
            patch.setattr(function, fails)
            (traced,) = ask(llm, [traced_prompt(14, what, trace=True)])
            assert traced.difference(plain) < CLOSE, what
            for method in ("adaspark_traces", "adaspark_report", "adaspark_metrics"):
                llm.collective_rpc(method)
            shown = traces(llm)
            for trace in shown[:1]:
                for args in (("meta",), ("heat", "answer"), ("ffn",), ("frame", 0, 0)):
                    ask_trace(llm, trace["id"], *args)
            ask(llm, [traced_prompt(14, what, trace=True)])
        assert any(what in said for said in told), (what, told)
        (after,) = ask(llm, [traced_prompt(14, f"after {what}", trace=True)])
        assert after.difference(plain) < CLOSE
        agrees_with_account(llm, traces(llm)[0]["id"], last_reports(llm)[0])
    assert llm.collective_rpc("adaspark_trace", args=(traces(llm)[0]["id"], "nonsense")) == [
        {"error": "what='nonsense': expected 'meta', 'heat', 'ffn', 'frame' or 'delete'"}
    ]


def fails(*arguments, **options):
    raise RuntimeError("as if something were wrong")


def test_chunked_prefill(checkpoint) -> None:
    """A trace recorded in pieces is whole, and agrees with what was computed."""
    options = {"max_num_batched_tokens": 256, "enable_prefix_caching": False}
    with engine(checkpoint, SPARSE, **options) as llm:
        ask(llm, [traced_prompt(7, trace=True), traced_prompt(8, trace=True)])
        reports = {report["request_id"]: report for report in last_reports(llm, 2)}
        both = traces(llm)
        assert len(both) == 2
        for trace in both:
            agrees_with_account(llm, trace["id"], reports[trace["request_id"]])
            heat = heat_of(llm, trace["id"], "question")
            assert heat["tokens"] == heat["wanted"]
            assert trace["cached_tokens"] == 0 and trace["truncated"] is None


def test_preemption(checkpoint) -> None:
    """Tokens that are computed again count once."""
    options = {"enable_prefix_caching": False, "disable_log_stats": False}
    # Four prompts of 11 blocks each fit, their answers of up to two blocks more do not.
    options |= {"num_gpu_blocks_override": 47, "max_model_len": 2048}
    with engine(checkpoint, SPARSE, **options) as llm:
        answers = ask(llm, [traced_prompt(20 + i, trace=True) for i in range(4)], max_tokens=100)
        preempted = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
        assert sum(preempted) > 0
        by_ids = {answer.ids for answer in answers}
        for trace in traces(llm):
            meta = reader.merge_meta(ask_trace(llm, trace["id"], "meta"))
            assert tuple(meta["spans"][-1]["ids"]) in by_ids
            for source in ("question", "answer"):
                heat = heat_of(llm, trace["id"], source)
                assert heat["tokens"] == heat["wanted"] > 0
            ffn = reader.merge_ffn(ask_trace(llm, trace["id"], "ffn"))
            recorded = unpack_bits(np.frombuffer(ffn["recorded"], np.uint8), 660)
            assert recorded.all()


def test_no_memory_means_no_traces(checkpoint) -> None:
    with engine(checkpoint, SPARSE | {"trace_mb": 0}) as llm:
        ask(llm, [traced_prompt(7, trace=True)])
        assert traces(llm) == []
        with pytest.raises(LookupError, match="no trace: ask with"):
            reader.read_offline(llm)


def test_tensor_parallel_ranks_are_merged(checkpoint) -> None:
    """Each rank records its own KV head; together they are what one rank would have recorded."""
    with engine(checkpoint, SPARSE, enable_prefix_caching=False) as llm:
        (one,) = ask(llm, [traced_prompt(7, trace=True)])
        whole = reader.read_offline(llm)
    with engine(checkpoint, SPARSE, tensor_parallel_size=2, enable_prefix_caching=False) as llm:
        (two,) = ask(llm, [traced_prompt(7, trace=True)])
        answers = llm.collective_rpc("adaspark_traces")
        assert len(answers) == 2 and answers[0][0]["id"] == answers[1][0]["id"]
        parts = llm.collective_rpc("adaspark_trace", args=(answers[0][0]["id"], "heat", "question"))
        merged = reader.read_offline(llm)
        ranks_keep_the_same_traces(llm)
        a_trace_that_one_rank_lost_is_gone(llm)
    assert two.difference(one) < CLOSE
    assert parts[0]["heat"] != parts[1]["heat"]
    for source in ("question", "answer"):
        # Summed in another order, a few choices near a tie may fall otherwise.
        difference = np.array(merged["heat"][source]["heat"]) - whole["heat"][source]["heat"]
        assert np.abs(difference).mean() < 0.01
    assert merged["jpegs"] == whole["jpegs"] and merged["density"].keys() == whole["density"].keys()
    assert merged["spans"] == whole["spans"]


def held(worker) -> tuple[list[str], int, int]:
    """(a rank's traces, what they count, what they take); runs in the worker."""
    worker._tracer.settle()
    store = worker._tracer.store
    each = sorted(store, key=lambda trace: trace.id)
    return [t.id for t in each], sum(t.counted for t in each), sum(t.nbytes for t in each)


def ranks_keep_the_same_traces(llm) -> None:
    """Though the first one alone holds the frames."""
    ((_, one, _), _) = llm.collective_rpc(held)
    llm.collective_rpc(set_limit(round(2.6 * one)))
    seen = {traces(llm)[0]["id"]}
    for seed in range(5):
        pair = [traced_prompt(20 + 2 * seed + i, trace=True) for i in range(2)]
        ask(llm, pair, max_tokens=2 + seed)
        first, second = llm.collective_rpc(held)
        assert first[:2] == second[:2], "the same traces, counted alike"
        assert first[2] > second[2], "though one holds more"
        assert len(traces(llm)) == len(first[0])
        seen |= set(first[0])
    assert len(seen) > len(first[0])


def lose_the_latest(worker) -> None:
    if worker.rank == 1:
        store = worker._tracer.store
        store.delete(next(iter(store)).id)


def a_trace_that_one_rank_lost_is_gone(llm) -> None:
    trace_id = traces(llm)[0]["id"]
    llm.collective_rpc(lose_the_latest)
    assert trace_id not in {trace["id"] for trace in traces(llm)}
    assert [part is None for part in ask_trace(llm, trace_id, "meta")] == [False, True]
    with pytest.raises(LookupError, match="no trace"):
        reader.read_offline(llm, trace_id)
