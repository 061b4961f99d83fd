"""The books of one rank: from requests and steps to what is sent on request."""

from __future__ import annotations

import gc
import json
import weakref

import numpy as np
import pytest
import torch

from vllm_adaspark import observing as observing_module
from vllm_adaspark.accounts import ledger as ledger_module
from vllm_adaspark.accounts.account import count_step
from vllm_adaspark.accounts.flops import ModelShape
from vllm_adaspark.accounts.ledger import EDGES, Histogram, Ledger, keep_counts, layer_groups
from vllm_adaspark.accounts.reports import mode_of
from vllm_adaspark.accounts.request_ids import search_name, unnumbered
from vllm_adaspark.methods.adaspark.planner import build_plan
from vllm_adaspark.methods.adaspark.request import AdaSparkRequest
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.observing import observing
from vllm_adaspark.paged.plan import StepPlan
from vllm_adaspark.paged.state import StepRows
from vllm_adaspark.paged.tiles import DENSE
from vllm_adaspark.video.prune import VideoSpan, WholePrompt

SHAPE = ModelShape(hidden=8, heads=4, kv_heads=2, head_size=2, intermediate=16)
SETTINGS = {"p_attn": 0.5, "p_ffn": 0.5, "flops": None, "budget": None, "off": False}


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(SHAPE, range(4), 4)


def run(ledger: Ledger, *requests: tuple[str, int, int]) -> None:
    """A dense step: (request, tokens, tokens before them)."""
    names, tokens, before = zip(*requests)
    start = np.append(0, np.cumsum(tokens))
    lens = np.array(tokens) + np.array(before)
    ledger.add_step(list(names), StepRows(start, lens, np.zeros((len(names), 1), int)), None)


def requests(ledger: Ledger) -> dict[tuple, int]:
    return {(mode, why): number for mode, why, number in ledger.metrics()["requests"]}


def test_a_requests_life(ledger) -> None:
    ledger.admit("a", SETTINGS)
    run(ledger, ("a", 10, 32))
    run(ledger, ("a", 1, 42), ("b", 5, 0))
    (a, b) = ledger.report()["requests"]
    assert (a["request_id"], a["finished"]) == ("a", False)
    assert (a["counts"]["tokens"], a["counts"]["cached_tokens"]) == (11, 32)
    assert a["counts"]["settings"] == SETTINGS and b["counts"]["settings"] is None
    assert ledger.finish("a").tokens == 11
    assert requests(ledger)[("dense", "cached")] == 1
    assert sum(requests(ledger).values()) == 1, "b still runs"
    assert ledger.finish("a") is None, "it ended only once"
    total = ledger.report()["total"]
    assert (total["tokens"], total["cached_tokens"]) == (16, 32)
    assert [r["finished"] for r in ledger.report()["requests"]] == [True, False]


def test_a_request_whose_video_was_pruned(ledger) -> None:
    """It is sparse whatever else it asked, also where all that is left came from the cache."""
    told = SETTINGS | {"off": False, "prune": 0.5}
    ledger.admit("a", told, WholePrompt(42, [VideoSpan(0, 40, 80)]))
    ledger.admit("b", told, WholePrompt(42, [VideoSpan(0, 40, 80)]))
    run(ledger, ("a", 42, 0), ("b", 2, 40))
    a, b = (request["counts"] for request in ledger.report()["requests"])
    assert (a["tokens"], a["dropped_tokens"]) == (42, 40)
    assert (b["tokens"], b["dropped_tokens"], b["cached_tokens"]) == (2, 0, 40)
    assert b["dense_pairs"] == 81 + 82, "they would have attended to the whole video"
    assert mode_of(ledger.finish("a")) == mode_of(ledger.finish("b")) == ("sparse", None)
    run(ledger, ("a", 3, 0))  # the id comes again
    assert ledger.report()["requests"][-1]["counts"]["dropped_tokens"] == 0


def test_a_request_that_never_ran(ledger) -> None:
    ledger.admit("a", SETTINGS)
    assert ledger.finish("a") is None
    assert not any(requests(ledger).values())
    run(ledger, ("a", 3, 0))  # the id comes again, without a video
    assert ledger.report()["requests"][0]["counts"]["settings"] is None


def test_all_that_is_sent_is_plain(ledger) -> None:
    run(ledger, ("a", 10, 0))
    ledger.finish("a")
    for sent in (ledger.report(), ledger.usage("a"), ledger.metrics()):
        assert json.loads(json.dumps(sent)) == sent


def test_only_recent_requests_are_kept_but_all_are_counted(ledger, monkeypatch) -> None:
    for number in range(ledger_module.RECENT + 5):
        run(ledger, (f"request {number}", 2, 0))
        ledger.finish(f"request {number}")
    assert len(ledger.report()["requests"]) == ledger_module.RECENT
    assert ledger.usage("request 4") is None and ledger.usage("request 5")["tokens"] == 2
    assert requests(ledger)[("dense", "no_video")] == ledger_module.RECENT + 5
    assert ledger.metrics()["total"]["tokens"] == 2 * (ledger_module.RECENT + 5)


# -- the id that a client knows -----------------------------------------------------------------


@pytest.mark.parametrize("finished", [False, True])
def test_usage_by_the_clients_id(ledger, finished) -> None:
    names = ["chatcmpl-1-0123abcd", "chatcmpl-2-0123abcd", "chatcmpl-1.-0123abcd"]
    run(ledger, *((name, 3 + i, 0) for i, name in enumerate(names)))
    if finished:
        for name in names:
            ledger.finish(name)
    assert ledger.usage("chatcmpl-1")["tokens"] == 3
    assert ledger.usage("chatcmpl-2")["tokens"] == 4
    assert ledger.usage("chatcmpl-1.")["tokens"] == 5
    assert ledger.usage("chatcmpl-2-0123abcd")["tokens"] == 4, "the engine's own id"
    for unknown in ("chatcmpl", "chatcmpl-", "chatcmpl-3", "", ".*"):
        assert ledger.usage(unknown) is None


def test_usage_adds_up_n_answers(ledger) -> None:
    run(ledger, ("0_c-0123abcd", 10, 0), ("1_c-0123abcd", 2, 8), ("2_c-0123abcd", 3, 8))
    ledger.finish("1_c-0123abcd")
    usage = ledger.usage("c")
    assert (usage["tokens"], usage["cached_tokens"]) == (15, 16)


def test_an_id_used_again_means_the_newest(ledger) -> None:
    for tokens, suffix in ((10, "00000000"), (20, "11111111")):
        run(ledger, (f"c-{suffix}", tokens, 0))
        ledger.finish(f"c-{suffix}")
    assert ledger.usage("c")["tokens"] == 20
    run(ledger, ("c-22222222", 30, 0))
    assert ledger.usage("c")["tokens"] == 30


ODD_IDS = ["", "-", "0_", "0_1_x", "a-beam", "x" * 100_000, "ü\n\0", "[a-z]+(", "\ud800", "%s {}"]


@pytest.mark.parametrize("client", ODD_IDS, ids=range(len(ODD_IDS)))
def test_a_client_may_call_its_request_anything(ledger, client) -> None:
    for request in (f"{client}-0123abcd", f"1_{client}-0123abcd", f"another{client}-0123abcd"):
        run(ledger, (request, 2, 0))
    assert ledger.usage(client)["tokens"] == 4
    ledger.finish(f"1_{client}-0123abcd")
    assert ledger.usage(client)["tokens"] == 4
    assert ledger.usage(f"{client}?") is None


# -- beam search, which vLLM makes of many requests -----------------------------------------------


def beam(client: str, step: int, nth: int) -> str:
    return f"{client}-{step:016x}-beam-{nth}-0123abcd"


def test_a_beam_search_is_one_request_to_its_client(ledger) -> None:
    run(ledger, (beam("c", 0, 0), 100, 0))
    ledger.finish(beam("c", 0, 0))
    for step in range(1, ledger_module.RECENT):
        run(ledger, (beam("c", step, 0), 3, 64), (beam("c", step, 1), 3, 64))
        if step == 5:  # finished and running ones together
            assert ledger.usage("c")["tokens"] == 100 + 6 * 5
        for nth in range(2):
            ledger.finish(beam("c", step, nth))
    run(ledger, ("other-0123abcd", 5, 0))
    ledger.finish("other-0123abcd")
    usage = ledger.usage("c")
    assert usage["tokens"] == 100 + 6 * (ledger_module.RECENT - 1)
    assert usage["cached_tokens"] == 128 * (ledger_module.RECENT - 1)
    assert ledger.usage("other")["tokens"] == 5, "it does not push others out"
    names = [request["request_id"] for request in ledger.report()["requests"]]
    assert names == ["c-beam", "other-0123abcd"]
    assert ledger.usage(beam("c", 3, 1)) == usage, "asked by one of its requests"
    assert requests(ledger)[("dense", "no_video")] == 2 * ledger_module.RECENT


def test_names_of_requests() -> None:
    assert search_name(beam("chatcmpl-1", 7, 12)) == "chatcmpl-1-beam"
    for other in (
        "chatcmpl-1-0123abcd",
        "1-beam-0",
        f"x-{'0' * 31}-beam-0",
        f"x-{'g' * 32}-beam-0",
    ):
        assert search_name(other) is None
    assert unnumbered("c-beam", "c") == "c-beam"
    assert unnumbered("12_c-0123abcd", "c") == "c-0123abcd"
    for other in ("c-beams", "cc", "xc-0123abcd", "c-0123abcg", "x_c", "c-beam-0123abcd"):
        assert unnumbered(other, "c") is None


# -- a step that its device has not finished ------------------------------------------------------


def sparse_plan() -> tuple[StepRows, StepPlan]:
    """A step over 12 cubes and a question, after its layers have run."""
    video, text = 12 * 64, 20
    rows = StepRows(np.array([0, video + text]), np.array([video + text]), np.arange(16)[None])
    request = AdaSparkRequest(AdaSparkConfig(), np.repeat([True, False], [video, text]))
    plan = build_plan(
        rows, [request], 64, dense_below=2, cube_queries=8, device=torch.device("cpu")
    )
    tiles = len(plan.attention.tiles)
    plan.attention.scratch.take("room", (1000,), torch.float32, torch.device("cpu"))
    plan.attention.shared = torch.zeros(100)
    for layer in range(4):
        plan.kept_blocks[layer] = torch.randint(1, 5, (2, tiles))
        plan.ffn_active[layer] = torch.randint(1, 60, (12,))
    return rows, plan


def test_a_plans_counts_outlive_its_memory() -> None:
    rows, plan = sparse_plan()
    kept = keep_counts(plan)
    before, after = (count_step(rows, each, range(4)) for each in (plan, kept))
    for name, value in vars(before).items():
        np.testing.assert_equal(getattr(after, name), value, err_msg=name)
    assert (plan.attention.tiles.kind != DENSE).any() and before.choices.sum() > 12

    attention, ffn = plan.attention, plan.ffn
    large = [attention.scratch, attention.candidates, attention.always, attention.blocks,
             attention.shared, attention.row_blocks, attention.jobs[0], ffn.tokens,
             plan.summary_writes, attention, ffn]  # fmt: skip
    gone = [weakref.ref(each) for each in large]
    del plan, attention, ffn, large, before
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    assert count_step(rows, kept, range(4)).choices.sum() > 12


def test_a_dense_step_has_nothing_to_keep() -> None:
    assert keep_counts(None) is None


def test_what_only_observes_fails_without_harm_and_says_so_once(monkeypatch) -> None:
    told = []
    monkeypatch.setattr(observing_module, "_told", set())
    monkeypatch.setattr(observing_module.logger, "exception", lambda *said: told.append(said[1]))
    for what in ("a count", "a count", "a trace", "a count"):
        with observing(what):
            raise KeyError("request")
    with observing("what does not fail"):
        pass
    assert told == ["a count", "a trace"]
    for stops in (KeyboardInterrupt, SystemExit):
        with pytest.raises(stops), observing("a count"):
            raise stops


# -- metrics ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layers, labels",
    [
        (28, ["0-6", "7-13", "14-20", "21-27"]),
        (36, ["0-8", "9-17", "18-26", "27-35"]),
        (80, ["0-19", "20-39", "40-59", "60-79"]),
        (4, ["0", "1", "2", "3"]),
        (2, ["0", "1"]),
        (1, ["0"]),
    ],
)
def test_layer_groups(layers, labels) -> None:
    groups = layer_groups(layers)
    assert list(groups) == labels
    assert [layer for group in groups.values() for layer in group] == list(range(layers))


def test_histogram() -> None:
    histogram = Histogram(layers=1)
    for share in (0.01, 0.05, 0.051, 0.95, 1.0, 1 + 1e-12):
        histogram.observe(share)
    by_edge = dict(zip(EDGES, histogram.counts.tolist()))
    assert {edge: n for edge, n in by_edge.items() if n} == {0.05: 2, 0.1: 1, 1.0: 3}
    assert histogram.sum == pytest.approx(3.061)


def test_densities_of_a_finished_request(ledger) -> None:
    ledger.admit("a", SETTINGS)
    run(ledger, ("a", 96, 0), ("text", 10, 0))
    account = ledger._running["a"]
    account.cubes_seen, account.video_tokens = 100.0, 96
    account.cubes_attended[:] = [100, 60, 30, 4]
    account.ffn_skipped[:] = [0, 24, 48, 96]
    before = ledger.metrics()["attention_density"]
    assert not any(sum(group["counts"]) for group in before.values())
    ledger.finish("a")
    ledger.finish("text")  # has no cubes, so no density
    metrics = ledger.metrics()
    sums = {
        name: [g["sum"] for g in metrics[name].values()]
        for name in metrics
        if name != "total" and name != "requests"
    }
    assert sums == {"attention_density": [1, 0.6, 0.3, 0.04], "ffn_density": [1, 0.75, 0.5, 0]}
    assert all(sum(g["counts"]) == 1 for g in metrics["attention_density"].values())


def test_a_pipeline_stage_has_its_part_of_the_groups() -> None:
    stage = Ledger(SHAPE, range(5, 14), 28)
    run(stage, ("a", 96, 0))
    account = stage._running["a"]
    account.cubes_seen = 10.0
    account.cubes_attended[:] = [10, 10] + 7 * [5]
    stage.finish("a")
    groups = stage.metrics()["attention_density"]
    assert {label: (g["layers"], g["sum"]) for label, g in groups.items()} == {
        "0-6": (2, 1.0),
        "7-13": (7, 0.5),
    }
