"""FLOPs and densities against numbers worked out by hand.

The hand-made request, in KV blocks of 32 tokens: one block of text, three cubes, a question of
eight tokens (136 tokens, blocks 0 to 4).  With ``dense_below`` 1 its tiles are::

    tile     kind    tokens     own block   candidates
    0        DENSE   0 .. 63    1           none (text, and the first cube has none before it)
    1        VIDEO   64 .. 95   2           block 1
    2        VIDEO   96 .. 127  3           blocks 1, 2
    3 .. 10  TEXT    128 .. 135 4           blocks 1, 2, 3

Causal pairs of n tokens at the end of c tokens: n * (c - n) + n * (n + 1) / 2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from vllm_adaspark.accounts.account import Account, count_step
from vllm_adaspark.accounts.flops import ModelShape
from vllm_adaspark.accounts.reports import means_by_layer
from vllm_adaspark.methods.adaspark import planner, request
from vllm_adaspark.methods.adaspark.budget import prompt_cost
from vllm_adaspark.methods.adaspark.ffn import sparse_ffn
from vllm_adaspark.methods.adaspark.planner import build_plan
from vllm_adaspark.methods.adaspark.request import AdaSparkRequest
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.paged.plan import StepPlan, Told
from vllm_adaspark.paged.state import StepRows
from vllm_adaspark.paged.tiles import DENSE, TEXT, VIDEO
from vllm_adaspark.video.prune import VideoSpan, WholePrompt

BLOCK = 32
LAYERS = range(2)
CONFIG = AdaSparkConfig(cube=(2, 4, 4))
IS_VIDEO = np.arange(136) // BLOCK % 4 != 0  # blocks 1, 2, 3
TINY = ModelShape(hidden=8, heads=4, kv_heads=2, head_size=2, intermediate=16)
QWEN_7B = ModelShape(hidden=3584, heads=28, kv_heads=4, head_size=128, intermediate=18944)

# Layer 0 runs dense attention, and 16, 20 and 32 tokens of the three cubes run its FFN.  In layer 1
# the tiles keep so many blocks per KV head (DENSE: all), and ten tokens of each cube run.
KEPT = {1: torch.tensor([[2, 3, 3] + 8 * [3], [2, 3, 4] + 8 * [4]])}
ACTIVE = {0: torch.tensor([16, 20, 32]), 1: torch.tensor([10, 10, 10])}


def plan_of(
    rows: StepRows, *requests: AdaSparkRequest | None, tile_cubes: int = 1
) -> StepPlan | None:
    return build_plan(
        rows, requests, BLOCK, dense_below=1, cube_queries=16, tile_cubes=tile_cubes,
        device=torch.device("cpu"),
    )  # fmt: skip


def step(*requests: tuple[int, int, int]) -> tuple:
    """(rows, plan) of a step; each request is (first token, tokens, first physical block).

    Every request is the hand-made one.
    """
    done, count, block = np.array(requests).T
    rows = StepRows(
        query_start=np.append(0, np.cumsum(count)),
        seq_lens=done + count,
        block_table=block[:, None] + np.arange(8),
    )
    return rows, plan_of(rows, *[AdaSparkRequest(CONFIG, IS_VIDEO)] * len(requests))


def keep_everything(plan: StepPlan) -> None:
    """Leave the counts that dense layers would leave, had they counted."""
    everything = torch.as_tensor(plan.attention.tiles.block + 1)
    plan.kept_blocks = {layer: everything.expand(2, -1) for layer in LAYERS}
    if plan.ffn is not None:
        cubes = len(plan.ffn.tokens)
        plan.ffn_active = {layer: torch.full((cubes,), BLOCK) for layer in LAYERS}


@pytest.fixture
def whole():
    """The hand-made request in one step, layers run."""
    rows, plan = step((0, 136, 5))
    plan.kept_blocks, plan.ffn_active = dict(KEPT), dict(ACTIVE)
    return rows, plan


def account_of(rows: StepRows, plan: StepPlan | None, row: int = 0) -> Account:
    account = Account(TINY, LAYERS)
    account.add(count_step(rows, plan, LAYERS), row)
    return account


# -- shapes -------------------------------------------------------------------------------------


def test_flops_of_qwen_7b() -> None:
    # Q and O: 3584 x 3584 each; K and V: 3584 x 512 each; a multiply-add is two FLOPs.
    assert QWEN_7B.qkvo_flops_per_token == 2 * (2 * 12_845_056 + 2 * 1_835_008) == 58_720_256
    # Gate, up, down: 3584 x 18944 each.
    assert QWEN_7B.ffn_flops_per_token == 2 * 3 * 67_895_296 == 407_371_776
    # QK and PV: 28 heads of 128 numbers each.
    assert QWEN_7B.attention_flops_per_pair == 2 * 2 * 3584
    assert QWEN_7B.score_flops_per_pair == 2 * 3584
    # All layers: the 6.5 billion weights of a 7B model's layers, twice per token.
    per_token = QWEN_7B.qkvo_flops_per_token + QWEN_7B.ffn_flops_per_token
    assert 28 * per_token == 13_050_576_896


def test_flops_of_the_tiny_shape() -> None:
    assert TINY.qkvo_flops_per_token == 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8) == 384
    assert TINY.attention_flops_per_pair == 32
    assert TINY.score_flops_per_pair == 16
    assert TINY.ffn_flops_per_token == 768


# -- one step by hand ---------------------------------------------------------------------------


def test_counts_of_two_cubes_that_choose_together() -> None:
    """Blocks 2 and 3 are one tile, which may leave out block 1 and does so for one head of two."""
    rows = StepRows(np.array([0, 128]), np.array([128]), np.arange(4)[None])
    plan = plan_of(rows, AdaSparkRequest(CONFIG, IS_VIDEO[:128]), tile_cubes=2)
    tiles = plan.attention.tiles
    assert tiles.kind.tolist() == [DENSE, VIDEO] and tiles.length.tolist() == [64, 64]
    assert tiles.block.tolist() == [1, 3] and tiles.scored.tolist() == [0, 2 * 16]
    plan.kept_blocks = {1: torch.tensor([[2, 3], [2, 4]])}
    counts = count_step(rows, plan, LAYERS)
    dense = 128 * 129 / 2
    assert counts.cubes_seen.tolist() == [32 * 1 + 32 * 2]  # of block 2, and of block 3
    assert counts.pairs[:, 0].tolist() == [dense, dense - 64 * 32 / 2]
    assert counts.cubes_attended[:, 0].tolist() == [96, 96 - 64 / 2]
    assert counts.scored[:, 0].tolist() == [0, 2 * 16 * 1]


def test_the_tiles_are_those_of_the_table_above(whole) -> None:
    tiles = whole[1].attention.tiles
    assert tiles.kind.tolist() == [DENSE, VIDEO, VIDEO] + 8 * [TEXT]
    assert tiles.length.tolist() == [64, 32, 32] + 8 * [1]
    assert tiles.block.tolist() == [1, 2, 3] + 8 * [4]
    assert tiles.candidates.sum(axis=1).tolist() == [0, 1, 2] + 8 * [3]


def test_counts_of_the_hand_made_step(whole) -> None:
    counts = count_step(*whole, LAYERS)
    assert counts.tokens.tolist() == [136] and counts.video_tokens.tolist() == [96]
    assert counts.dense_pairs.tolist() == [136 * 137 / 2]
    # Second cube: 32 tokens see one cube, third: 32 see two, question: 8 see three.
    assert counts.cubes_seen.tolist() == [32 + 64 + 24]
    # Layer 1.  Tile 2 keeps 3.5 blocks on average, 112 tokens: 32 * 80 + 528 pairs.  Question token
    # i keeps 3.5 blocks but 31 - i slots of the last one are not there yet: 81 + i pairs.
    tile_pairs = [64 * 65 / 2, 32 * 64 + 528, 32 * 80 + 528, 8 * 81 + 28]
    assert counts.pairs[:, 0].tolist() == [9316, sum(tile_pairs)] == [9316, 8420]
    # Half a block left out for 32 tokens, 1.5 blocks for 8.
    assert counts.cubes_attended[:, 0].tolist() == [120, 120 - 16 - 12]
    assert counts.scored[:, 0].tolist() == [0, 16 + 32 + 24]  # 16 tokens of a cube are scored
    assert counts.ffn_skipped[:, 0].tolist() == [15 + 11 + 0, 3 * 21]


def test_report_of_the_hand_made_step(whole) -> None:
    report = account_of(*whole).report()
    assert (report["tokens"], report["video_tokens"], report["cached_tokens"]) == (136, 96, 0)
    dense, executed = report["flops"]["dense"], report["flops"]["executed"]
    assert dense == {
        "qkvo": 136 * 2 * 384,
        "attention": 2 * 9316 * 32,
        "ffn": 136 * 2 * 768,
        "total": 104_448 + 596_224 + 208_896,
    }
    assert executed == {
        "qkvo": 104_448,
        "attention": (9316 + 8420) * 32,
        "selection": 72 * 16,
        "ffn": 208_896 - (26 + 63) * 768,  # a centroid for each cube that skips
        "total": 104_448 + 567_552 + 1_152 + 140_544,
    }
    assert report["flops_ratio"] == pytest.approx(813_696 / 909_568)
    assert report["attention_density"] == pytest.approx((1 + 92 / 120) / 2)
    assert report["ffn_density"] == pytest.approx(1 - (26 + 63) / (2 * 96))
    assert report["layers"] == [
        {
            "layer": 0,
            "cubes_seen": 120,
            "cubes_attended": 120,
            "attention_density": 1.0,
            "ffn_tokens": 96,
            "ffn_active": 70,
            "ffn_density": pytest.approx(70 / 96),
        },
        {
            "layer": 1,
            "cubes_seen": 120,
            "cubes_attended": 92,
            "attention_density": pytest.approx(92 / 120),
            "ffn_tokens": 96,
            "ffn_active": 33,
            "ffn_density": pytest.approx(33 / 96),
        },
    ]
    assert json.loads(json.dumps(report)) == report


def test_a_later_pipeline_stage_counts_its_own_layers(whole) -> None:
    rows, plan = whole
    plan.kept_blocks, plan.ffn_active = {3: KEPT[1]}, {2: ACTIVE[0], 3: ACTIVE[1]}
    account = Account(TINY, range(2, 4))
    account.add(count_step(rows, plan, range(2, 4)), 0)
    report = account.report()
    assert [entry["layer"] for entry in report["layers"]] == [2, 3]
    assert [entry["cubes_attended"] for entry in report["layers"]] == [120, 92]
    assert [entry["ffn_active"] for entry in report["layers"]] == [70, 33]


def test_dense_step() -> None:
    """Text only: nothing to leave out, in decode as in prefill."""
    rows = StepRows(np.array([0, 1, 11]), np.array([50, 10]), np.zeros((2, 2), int))
    counts = count_step(rows, None, LAYERS)
    assert counts.dense_pairs.tolist() == [50, 55]
    assert counts.pairs.tolist() == [[50, 55], [50, 55]]
    report = account_of(rows, None, row=1).report()
    assert report["attention_density"] == report["ffn_density"] == report["flops_ratio"] == 1.0
    assert report["flops"]["executed"] == report["flops"]["dense"] | {"selection": 0.0}
    assert report["flops"]["dense"]["attention"] == 2 * 55 * 32


def test_account_of_nothing() -> None:
    report = Account(TINY, LAYERS).report()
    assert report["flops"]["dense"]["total"] == 0
    assert report["attention_density"] == report["ffn_density"] == report["flops_ratio"] == 1.0


def test_decode_step() -> None:
    """One answer token, at position 136: it sees 137 tokens and three cubes."""
    rows = StepRows(np.array([0, 1]), np.array([137]), 5 + np.arange(8)[None])
    plan = plan_of(rows, AdaSparkRequest(CONFIG, IS_VIDEO))
    plan.kept_blocks = {1: torch.tensor([[3], [4]])}
    counts = count_step(rows, plan, LAYERS)
    assert counts.dense_pairs.tolist() == [137]
    assert counts.pairs[:, 0].tolist() == [137, 137 - 1.5 * BLOCK]
    assert counts.cubes_seen.tolist() == [3] and counts.scored[:, 0].tolist() == [0, 3]
    assert counts.cubes_attended[:, 0].tolist() == [3, 1.5]
    assert counts.video_tokens.tolist() == [0] and not counts.ffn_skipped.any()


# -- what is charged is what runs ---------------------------------------------------------------


@pytest.mark.parametrize("compensations", [["centroid"], ["mean"], ["centroid", "bypass", "mean"]])
@pytest.mark.parametrize("seed", range(3))
def test_every_ffn_evaluation_is_charged(compensations, seed) -> None:
    """Cubes of which no token, one, some or all but one skip, of requests with other settings."""
    rng = np.random.default_rng(seed)
    rows, _ = step(*((0, 136, 5 + 8 * i) for i in range(len(compensations))))
    plan = plan_of(
        rows, *(AdaSparkRequest(replace(CONFIG, compensation=c), IS_VIDEO) for c in compensations)
    )
    number = rng.choice([1, 7, BLOCK - 1, BLOCK], len(plan.ffn.tokens))
    number[0] = BLOCK  # always one whose tokens all run
    active = torch.from_numpy(np.arange(BLOCK) < number[:, None])
    plan.ffn_active = {0: active.sum(1)}
    ran = []

    def ffn(x: torch.Tensor) -> torch.Tensor:
        ran.append(len(x))
        return 2 * x

    x = torch.from_numpy(rng.normal(size=(len(rows.token_row), 4)).astype(np.float32))
    out = sparse_ffn(x, ffn, active, plan.ffn)
    assert ran == [rows.query_lens.sum() - count_step(rows, plan, range(1)).ffn_skipped.sum()]
    assert torch.equal(out[plan.ffn.tokens][active], 2 * x[plan.ffn.tokens][active])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compensation", ["centroid", "mean"])
def test_means_of_large_numbers_are_finite(dtype, compensation) -> None:
    """The sum over a cube would not fit in float16."""
    rows, _ = step((0, 136, 5))
    plan = plan_of(rows, AdaSparkRequest(replace(CONFIG, compensation=compensation), IS_VIDEO))
    active = (torch.arange(BLOCK) % 2 == 0).expand(len(plan.ffn.tokens), -1)
    out = sparse_ffn(torch.full((136, 4), 30_000, dtype=dtype), lambda x: x, active, plan.ffn)
    assert torch.allclose(out.float(), torch.tensor(30_000.0), rtol=2**-7)


def test_nothing_is_charged_for_the_centroid_of_nobody(whole) -> None:
    rows, plan = whole
    plan.ffn_active = {0: torch.tensor([32, 31, 1]), 1: torch.tensor([32, 32, 32])}
    # All but one: the centroid is the one that skips, and costs as much.
    assert count_step(rows, plan, LAYERS).ffn_skipped[:, 0].tolist() == [0 + 0 + 30, 0]


def test_scores_that_are_computed_twice_are_charged_twice(whole) -> None:
    once, twice = TINY, replace(TINY, score_products=2)
    assert twice.score_flops_per_pair == 2 * once.score_flops_per_pair
    account = Account(twice, LAYERS)
    account.add(count_step(*whole, LAYERS), 0)
    executed = Account.from_counts(account.to_counts()).report()["flops"]["executed"]
    assert (
        executed["selection"] == 2 * account_of(*whole).report()["flops"]["executed"]["selection"]
    )


def test_uniform_scores_nothing() -> None:
    config = replace(CONFIG, selection="uniform", keep=0.5)
    rows, _ = step((0, 136, 5))
    plan = plan_of(rows, AdaSparkRequest(config, IS_VIDEO))
    with plan.selection.running(torch.device("cpu")):
        sum(range(10_000))
    keep_everything(plan)
    counts = count_step(rows, plan, LAYERS)
    assert not plan.attention.jobs and not counts.scored.any()
    assert counts.selection_seconds.sum() > 0, "choosing takes time all the same"
    assert prompt_cost(TINY, 2, IS_VIDEO, config).scores == 0


# -- what was not chosen, and how long choosing took --------------------------------------------


def fallbacks(*steps) -> dict[str, int]:
    account = Account(TINY, LAYERS)
    for rows, plan in steps:
        account.add(count_step(rows, plan, LAYERS), 0)
    return account.fallback_tokens


def test_no_token_falls_back_in_whole_cubes(whole) -> None:
    assert fallbacks(whole) == {"cut_cube": 0, "mixed_block": 0, "long_text": 0}
    # Two tiles of video and eight of text could choose, and three cubes could skip the FFN.
    assert account_of(*whole).choices == 10 + 3


@pytest.mark.parametrize("edge, cut", [(32, 0), (64, 0), (70, 32), (96, 0), (127, 32), (130, 0)])
def test_a_chunk_edge_in_a_cube_makes_its_tokens_fall_back(edge, cut) -> None:
    steps = [step((first, count, 5)) for first, count in ((0, edge), (edge, 136 - edge))]
    assert fallbacks(*steps) == {"cut_cube": cut, "mixed_block": 0, "long_text": 0}


@pytest.mark.parametrize("edges", [(0, 136), (0, 32, 64, 136), (0, 100, 136)])
def test_video_in_a_block_with_text_falls_back(edges, monkeypatch) -> None:
    """A video of tokens 40 .. 129: 24 share a block with the text before it, 2 with that after."""
    tokens = np.arange(136)
    monkeypatch.setitem(globals(), "IS_VIDEO", (tokens >= 40) & (tokens < 130))
    chunks = zip(edges, np.diff(edges).tolist())
    got = fallbacks(*(step((first, count, 5)) for first, count in chunks))
    # A chunk edge at 100 cuts the cube of tokens 96 .. 127 too, none of which is mixed.
    assert got == {"cut_cube": 32 * (100 in edges), "mixed_block": 24 + 2, "long_text": 0}


@pytest.mark.parametrize("edges", [(0, 136), (0, 128, 130, 136)])
def test_too_much_text_falls_back(edges, monkeypatch) -> None:
    """However the prompt is cut into chunks."""
    monkeypatch.setitem(globals(), "CONFIG", AdaSparkConfig(cube=(2, 4, 4), dense_below=1))
    steps = [(first, count, 5) for first, count in zip(edges, np.diff(edges).tolist())]
    for most, fell_back in ((7, 8), (8, 0)):
        monkeypatch.setattr(request, "MAX_TEXT_TILES", most)
        assert fallbacks(*map(step, steps))["long_text"] == fell_back


def test_an_answer_chooses_unless_much_of_it_is_computed_again(monkeypatch) -> None:
    monkeypatch.setattr(planner, "MAX_TEXT_TILES", 7)
    for count, fell_back in ((1, 0), (7, 0), (8, 8)):
        assert fallbacks(step((136, count, 5)))["long_text"] == fell_back


@pytest.mark.parametrize("config", [{"p_attn": 1.0, "p_ffn": 1.0}, {"enabled": False}])
def test_dense_settings_have_no_fallbacks(config, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "CONFIG", AdaSparkConfig(cube=(2, 4, 4), **config))
    rows, plan = step((0, 70, 5))
    assert not any(fallbacks((rows, plan)).values())
    assert account_of(rows, plan).choices == 0


def test_a_steps_time_is_divided_among_its_requests() -> None:
    rows, plan = step((0, 136, 5), (0, 136, 13))
    plan.planning_seconds = 0.5
    with plan.selection.running(torch.device("cpu")):
        sum(range(10_000))
    keep_everything(plan)
    one, two = account_of(rows, plan, 0), account_of(rows, plan, 1)
    assert one.planning_seconds == two.planning_seconds == 0.25
    assert one.selection_seconds == two.selection_seconds > 0
    assert 2 * one.selection_seconds == pytest.approx(plan.selection.seconds())


def test_an_account_travels_as_counts(whole) -> None:
    account = account_of(*whole)
    account.settings, account.cached_tokens = {"p_attn": 0.5}, 4
    counts = json.loads(json.dumps(account.to_counts()))
    copy = Account.from_counts(counts)
    assert copy.to_counts() == account.to_counts()
    assert copy.report() == account.report()
    counts["fallback_tokens"]["cut_cube"] = 99  # what was sent is no part of the account
    assert account.fallback_tokens["cut_cube"] == 0


# -- requests, steps, sums ----------------------------------------------------------------------


def test_requests_of_a_batch_are_counted_apart(whole) -> None:
    """The hand-made request between a text-only one and one that has nothing to do."""
    rows = StepRows(
        query_start=np.array([0, 20, 156, 156]),
        seq_lens=np.array([20, 136, 0]),
        block_table=np.stack([np.arange(8) + 40, np.arange(8) + 5, np.zeros(8, int)]),
    )
    plan = plan_of(rows, None, AdaSparkRequest(CONFIG, IS_VIDEO), None)
    own = {1: torch.cat([torch.tensor([[1], [1]]), KEPT[1]], dim=1)}  # the text request is a tile
    plan.kept_blocks, plan.ffn_active = own, dict(ACTIVE)
    alone = account_of(*whole).report()
    assert account_of(rows, plan, row=1).report() == alone
    text = account_of(rows, plan, row=0).report()
    assert text["flops_ratio"] == 1.0 and text["flops"]["dense"]["attention"] == 2 * 210 * 32
    assert account_of(rows, plan, row=2).report()["flops"]["dense"]["total"] == 0


@pytest.mark.parametrize("edge", [32, 64, 70, 128, 135])
def test_two_chunks_cost_what_one_does_dense(whole, edge) -> None:
    chunked = Account(TINY, LAYERS)
    for first, count in ((0, edge), (edge, 136 - edge)):
        rows, plan = step((first, count, 5))
        chunked.add(count_step(rows, plan, LAYERS), 0)
    got, want = chunked.report()["flops"]["dense"], account_of(*whole).report()["flops"]["dense"]
    assert got == want
    assert chunked.dense_pairs == 9316
    assert chunked.video_tokens == 96


@pytest.mark.parametrize("edges", [[136], [50, 70, 101, 136], [136, 139]])
def test_dropped_tokens_count_as_dense(edges) -> None:
    """Of 300 video tokens 96 are in the prompt: dense is the cost of all, in chunks and answer."""
    prompt = WholePrompt(136, [VideoSpan(32, 96, 300)])
    account, kept, begin = Account(TINY, LAYERS), Account(TINY, LAYERS), 0
    for end in edges:
        rows, plan = step((begin, end - begin, 5))
        for each, whole in ((account, [prompt]), (kept, [None])):
            each.add(count_step(rows, plan, LAYERS, whole=whole), 0)
        begin = end
    tokens = edges[-1] + 204
    dense = 2 * (tokens * (384 + 768) + tokens * (tokens + 1) / 2 * 32)
    report, of_the_kept = account.report(), kept.report()
    assert (report["tokens"], report["dropped_tokens"]) == (edges[-1], 204)
    assert report["flops"]["dense"]["total"] == dense
    assert report["flops"]["executed"] == of_the_kept["flops"]["executed"]
    for part, flops in report["flops"]["dropped"].items():
        assert report["flops"]["dense"][part] - flops == of_the_kept["flops"]["dense"][part]
    assert report["flops_ratio"] == of_the_kept["flops"]["executed"]["total"] / dense
    assert of_the_kept["dropped_tokens"] == of_the_kept["flops"]["dropped"]["total"] == 0
    for density in ("attention_density", "ffn_density", "video_tokens"):
        assert report[density] == of_the_kept[density], "of the tokens that are left"
    assert Account.from_counts(account.to_counts()).report() == report


@pytest.mark.parametrize("edge", [32, 64, 128])
def test_chunks_at_block_edges_see_the_same_cubes(whole, edge) -> None:
    seen = 0
    for first, count in ((0, edge), (edge, 136 - edge)):
        rows, plan = step((first, count, 5))
        seen += count_step(rows, plan, LAYERS).cubes_seen[0]
    assert seen == 120


def test_merge_adds_everything(whole) -> None:
    total = Account(TINY, LAYERS)
    one, two = account_of(*whole), account_of(*whole)
    one.cached_tokens, two.cached_tokens = 7, 30
    dense = account_of(StepRows(np.array([0, 10]), np.array([10]), np.zeros((1, 1), int)), None)
    for account in (one, two, dense):
        total.merge(account)
    report, alone = total.report(), one.report()
    assert report["tokens"] == 2 * 136 + 10 and report["cached_tokens"] == 37
    for kind in ("dense", "executed"):
        for part, flops in report["flops"][kind].items():
            expected = 2 * alone["flops"][kind][part] + dense.report()["flops"][kind][part]
            assert flops == pytest.approx(expected)
    # The dense request has no cubes and no video: it does not water the densities down.
    assert report["attention_density"] == pytest.approx(alone["attention_density"])
    assert report["ffn_density"] == pytest.approx(alone["ffn_density"])
    assert alone == account_of(*whole).report() | {"cached_tokens": 7}  # merging changed no source


# -- what holds for every step ------------------------------------------------------------------


def random_step(rng: np.random.Generator) -> tuple[StepRows, StepPlan]:
    """One to three copies of the hand-made request, each with a random chunk of it in the step.

    The first chunk reaches into the question, so there is always a tile that chooses.
    """
    chunks = [sorted(rng.choice(137, 2, replace=False)) for _ in range(rng.integers(0, 3))]
    chunks.insert(0, [rng.integers(0, 129), rng.integers(129, 137)])
    blocks = [1 + 8 * number for number in range(len(chunks))]
    now = [(first, last - first, block) for (first, last), block in zip(chunks, blocks)]
    return step(*now)


@pytest.mark.parametrize("seed", range(20))
def test_keeping_everything_is_dense(seed) -> None:
    rows, plan = random_step(np.random.default_rng(seed))
    keep_everything(plan)
    counts = count_step(rows, plan, LAYERS)
    np.testing.assert_allclose(counts.pairs, np.tile(counts.dense_pairs, (2, 1)))
    np.testing.assert_allclose(counts.cubes_attended, np.tile(counts.cubes_seen, (2, 1)))
    assert not counts.ffn_skipped.any()


@pytest.mark.parametrize("seed", range(20))
def test_executed_is_at_most_dense(seed) -> None:
    rng = np.random.default_rng(seed)
    rows, plan = random_step(rng)
    tiles = plan.attention.tiles
    least = tiles.block + 1 - np.maximum(tiles.candidates.sum(axis=1) - 1, 0)
    for layer in LAYERS:
        kept = rng.integers(least, tiles.block + 2, (2, len(tiles)))
        plan.kept_blocks[layer] = torch.as_tensor(kept)
        if plan.ffn is not None:
            active = rng.integers(1, BLOCK + 1, len(plan.ffn.tokens))
            plan.ffn_active[layer] = torch.as_tensor(active)
    for row in range(len(rows.seq_lens)):
        report = account_of(rows, plan, row).report()
        dense, executed = report["flops"]["dense"], report["flops"]["executed"]
        for part in ("qkvo", "attention", "ffn"):
            assert 0 <= executed[part] <= dense[part]
        assert executed["selection"] >= 0
        assert executed["total"] == pytest.approx(
            sum(executed[part] for part in ("qkvo", "attention", "selection", "ffn"))
        )
        assert 0 < report["attention_density"] <= 1 and 0 <= report["ffn_density"] <= 1


@dataclass
class Telling(StepPlan):
    """A plan that knows of the first of two requests only."""

    def tell(self, shape, layers):
        gates = np.tile([32.0, 0.0], (len(layers), 1))
        return Told({}, np.array([64, 0]), np.zeros_like(gates), {"gate": gates})


def test_video_that_a_plan_does_not_know_of_is_counted_and_in_no_mean():
    rows = StepRows(np.array([0, 70, 180]), np.array([70, 110]), None)
    plan = Telling(None, None, None, np.array([64, 0]), np.zeros(2), 64)
    counts = count_step(rows, plan, LAYERS, TINY, video=np.array([64, 100]))
    together, other = Account(TINY, LAYERS), Account(TINY, LAYERS)
    together.add(counts)
    other.add(counts, 1)
    assert (together.video_tokens, other.video_tokens, other.choices) == (164, 100, 0)
    assert together.report()["means"] == {"gate": 0.5}
    dense = count_step(rows, None, LAYERS, TINY, video=np.array([64, 100]))
    assert dense.video_tokens.tolist() == [64, 100]
    together.add(dense)
    assert together.report()["means"] == {"gate": 0.5}
    assert means_by_layer(together) == {"gate": [0.5, 0.5]}
