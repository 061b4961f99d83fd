"""Accounts of single ranks put together again, the mode and the settings they tell."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_adaspark.accounts.account import Account, StepCounts
from vllm_adaspark.accounts.flops import ModelShape
from vllm_adaspark.accounts.reports import (
    merge_engines,
    merge_ranks,
    merge_reports,
    mode_of,
    part_of_model,
    usage,
)
from vllm_adaspark.methods.adaspark.method import AdaSpark
from vllm_adaspark.methods.adaspark.request import AdaSparkRequest
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.requests import Prompt

SHAPE = ModelShape(hidden=8, heads=4, kv_heads=4, head_size=2, intermediate=16)
LAYERS = range(4)
HEADS = 4
PER_LAYER = ("pairs", "scored", "cubes_attended", "ffn_skipped")


TEXT = SimpleNamespace(
    num_attention_heads=4, num_key_value_heads=4, hidden_size=8, intermediate_size=16,
    num_hidden_layers=4,
)  # fmt: skip
METHOD = AdaSpark(AdaSparkConfig(), TEXT, "cpu")


def video(**settings) -> dict:
    """What a request with such settings tells; its budget, if any, can be kept."""
    config = AdaSparkConfig().override(settings)
    budget = (config.flops, 0.3) if config.flops and config.enabled else (None, None)
    return METHOD.told(AdaSparkRequest(config, np.ones(9, bool), *budget))


@pytest.mark.parametrize("asked", [{"p_attn": 0.5}, {"flops": 0.5}])
@pytest.mark.parametrize(("dense_layers", "off"), [(3, False), (4, True), (15, True)])
def test_a_request_all_of_whose_layers_are_dense_is_off(asked, dense_layers, off):
    config = AdaSparkConfig().override(asked | {"dense_layers": dense_layers})
    place = SimpleNamespace(offset=0, length=1280, is_embed=None)
    request = METHOD.describe(config, Prompt(1300, {"video": [place]}))
    assert METHOD.told(request)["off"] is off and request.leaves_out is not off


def rank_accounts(ranks: list[tuple[range, slice]], seed: int = 0) -> list[Account]:
    """One request as ranks see it, each with some layers and some KV heads; the work is random."""
    rng = np.random.default_rng(seed)
    kept = rng.integers(10, 60, (len(LAYERS), HEADS)).astype(float)
    skipped = rng.integers(0, 96, len(LAYERS)).astype(float)
    accounts = []
    for layers, heads in ranks:
        part = slice(layers.start, layers.stop)
        mine = kept[part, heads].mean(axis=1)
        counts = StepCounts(
            tokens=np.array([136]),
            dropped_tokens=np.array([24]),
            video_tokens=np.array([96]),
            summed_tokens=np.array([96]),
            dense_pairs=np.array([9316.0]),
            dropped_pairs=np.array([500.0]),
            pairs=80 * mine[:, None],
            scored=np.full((len(layers), 1), 120.0),
            cubes_seen=np.array([120]),
            cubes_attended=mine[:, None],
            ffn_skipped=skipped[part, None],
            choices=np.array([13]),
            told_tokens=np.array([0]),
            told_flops={"cmp": 3 * mine[:, None]},
            sums={"gate_cmp": mine[:, None]},
            fallback_tokens={"cut_cube": np.array([5])},
            selection_seconds=np.array([0.25 * len(layers)]),
            planning_seconds=np.array([0.5]),
        )
        account = Account(SHAPE, layers, video(p_attn=0.5))
        account.cached_tokens = 64
        account.add(counts, 0)
        accounts.append(account)
    return accounts


WHOLE = [(LAYERS, slice(0, 4))]
TP = [(LAYERS, slice(0, 2)), (LAYERS, slice(2, 4))]
PP = [(range(0, 1), slice(0, 4)), (range(1, 4), slice(0, 4))]
TP_PP = [(layers, heads) for (layers, _), (_, heads) in itertools.product(PP, TP)]


@pytest.mark.parametrize("ranks", [WHOLE, TP, PP, TP_PP, TP_PP[::-1]])
def test_ranks_together_are_the_whole(ranks) -> None:
    (whole,) = rank_accounts(WHOLE)
    parts = [account.to_counts() for account in rank_accounts(ranks)]
    merged = merge_ranks(json.loads(json.dumps(parts)))
    assert merged.layers == LAYERS and merged.settings == whole.settings
    for name in PER_LAYER:
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name))
    got, want = merged.report(), whole.report()
    # Stages plan one after the other, ranks of a stage at the same time.
    stages = len({layers for layers, _ in ranks})
    assert got.pop("planning_seconds") == pytest.approx(0.5 * stages)
    assert want.pop("planning_seconds") == 0.5
    assert got["selection_seconds"] == pytest.approx(1.0)
    for part in ("dense", "executed", "dropped"):
        assert got["flops"][part] == pytest.approx(want["flops"][part])
    counted = ("tokens", "dropped_tokens", "video_tokens", "cached_tokens", "fallback_tokens")
    for key in (*counted, "flops_ratio"):
        assert got[key] == pytest.approx(want[key])
    assert got["means"] == pytest.approx(want["means"])
    for mine, theirs in zip(got["layers"], want["layers"], strict=True):
        assert mine.pop("means") == pytest.approx(theirs.pop("means"))
        assert mine == pytest.approx(theirs)


def test_a_missing_stage_is_an_error() -> None:
    first, _, last = rank_accounts([(range(i, i + 1), slice(0, 4)) for i in range(3)])
    with pytest.raises(ValueError, match=r"range\(0, 1\) and range\(2, 3\) do not join"):
        merge_ranks([first.to_counts(), last.to_counts()])
    with pytest.raises(ValueError, match="no accounts"):
        merge_ranks([])


def test_engines_are_added() -> None:
    one, two = rank_accounts(WHOLE, seed=1), rank_accounts(WHOLE, seed=2)
    total = merge_engines([*one, *two])
    assert total.tokens == 272 and total.fallback_tokens["cut_cube"] == 10
    np.testing.assert_allclose(total.pairs, one[0].pairs + two[0].pairs)
    assert one[0].tokens == 136, "merging changes no source"


def test_what_the_account_of_one_rank_counts() -> None:
    assert part_of_model(range(28), 28, ranks=1) is None
    assert part_of_model(range(14, 28), 28, ranks=1) == "layers 14 to 27 of 28"
    assert part_of_model(range(1), 2, ranks=4) == (
        "layers 0 to 0 of 2 and the choices of tensor-parallel rank 0 of 4"
    )


def rank_report(account: Account, *names: str) -> dict:
    entries = [
        {"request_id": name, "finished": True, "counts": account.to_counts()} for name in names
    ]
    return {"total": account.to_counts(), "requests": entries}


def test_reports_of_all_ranks() -> None:
    left, right = rank_accounts(TP)
    got = merge_reports([rank_report(left, "a", "b"), None, rank_report(right, "a", "b")])
    (whole,) = rank_accounts(WHOLE)
    assert [request["request_id"] for request in got["requests"]] == ["a", "b"]
    for report in (got["total"], *got["requests"]):
        assert report["attention_density"] == pytest.approx(whole.report()["attention_density"])
        assert report["layers"][-1]["layer"] == 3
    request = got["requests"][0]
    assert request["finished"] and request["mode"] == "sparse"
    assert request["settings"]["p_attn"] == 0.5
    assert json.loads(json.dumps(got)) == got


def test_no_rank_with_accounts_is_an_error() -> None:
    with pytest.raises(ValueError, match="leave --worker-cls out"):
        merge_reports([None, None])


def test_usage_leaves_the_layers_out() -> None:
    (account,) = rank_accounts(WHOLE)
    assert "layers" not in usage(account) and "layers" in usage(account, layers=True)


# -- mode ---------------------------------------------------------------------------------------


def account(video: dict | None, choices: int = 0, **fallback_tokens: int) -> Account:
    made = Account(SHAPE, LAYERS, video)
    made.choices = choices
    made.fallback_tokens |= fallback_tokens
    return made


@pytest.mark.parametrize(
    "request_account, mode",
    [
        (account(video(), choices=1), ("sparse", None)),
        (account(video(flops=0.5), choices=1), ("sparse", None)),
        (account(None), ("dense", "no_video")),
        (account(video(p_attn=1, p_ffn=1)), ("dense", "off")),
        (account(video(enabled=False)), ("dense", "off")),
        (account(video(off=True)), ("dense", "off")),
        (account(video(selection="top_k", keep=1, p_ffn=1)), ("dense", "off")),
        (account(video(flops=1)), ("dense", "off")),
        (account(video()), ("dense", "few_cubes")),
        (account(video(), mixed_block=20), ("dense", "few_cubes")),
        (account(video(), cut_cube=20), ("dense", "fallback")),
        (account(video(), long_text=2000), ("dense", "fallback")),
    ],
)
def test_mode(request_account, mode) -> None:
    assert mode_of(request_account) == mode
    told = usage(request_account)
    assert (told["mode"], told["reason"]) == mode


# -- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"p_attn": 0.123, "p_ffn": 0.987},
        {"selection": "top_k", "keep": 0.3},
        {"selection": "uniform", "keep": 0.3, "compensation": "bypass"},
        {"flops": 0.4},
        {"text_queries": "dense", "min_cubes": 16, "dense_layers": 15},
        {"cube": [16, 2, 2], "order": "raster", "trace": True},
    ],
)
def test_settings_are_those_of_the_request(settings) -> None:
    told = video(**settings)
    budget = told.pop("budget")
    assert told.pop("off") in (True, False)
    want = AdaSparkConfig().override(settings)
    for key, value in told.items():
        assert value == (list(want.cube) if key == "cube" else getattr(want, key)), key
    assert settings.keys() <= told.keys()
    assert ("p_attn" in told) == (want.flops is None and want.selection == "top_p")
    assert ("keep" in told) == (want.selection != "top_p")
    assert (budget is None) == (want.flops is None)


def test_an_account_says_whether_its_budget_is_kept() -> None:
    config = AdaSparkConfig(flops=0.4)
    for least, kept in ((0.3, True), (0.4, True), (0.41, False)):
        told = METHOD.told(AdaSparkRequest(config, np.ones(9, bool), 0.2, least))
        answer = usage(account(told, choices=1))
        assert answer["budget"] == {"flops": 0.4, "smallest": least, "kept": kept}
        assert answer["settings"]["flops"] == 0.4 and "budget" not in answer["settings"]
    assert usage(account(video(), choices=1))["budget"] is None
    no_video = usage(account(None))
    assert no_video["settings"] is None and no_video["budget"] is None
