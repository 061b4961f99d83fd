"""The books of one rank: from requests and steps to what is sent on request."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vllm_adaspark import ledger as ledger_module
from vllm_adaspark.accounting import ModelShape
from vllm_adaspark.attention.state import StepRows
from vllm_adaspark.config import AdaSparkConfig
from vllm_adaspark.ledger import EDGES, Histogram, Ledger, layer_groups
from vllm_adaspark.reports import told_settings
from vllm_adaspark.requests import Request

SHAPE = ModelShape(hidden=8, heads=4, kv_heads=2, head_size=2, intermediate=16)
SETTINGS = told_settings(Request(AdaSparkConfig(), np.ones(9, bool)))


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
    assert requests(ledger)[("dense", "few_cubes")] == 1
    assert sum(requests(ledger).values()) == 1, "b still runs"
    assert ledger.finish("a") is None, "it ended only once"
    total = ledger.report()["total"]
    assert (total["tokens"], total["cached_tokens"]) == (16, 32)
    assert [r["finished"] for r in ledger.report()["requests"]] == [True, False]


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
    assert sums == {"attention_density": [1, 0.6, 0.3, 0.04], "ffn_active_share": [1, 0.75, 0.5, 0]}
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
