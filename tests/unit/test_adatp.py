"""AdaTP's pure parts against the twin and by hand: settings, segments, counts, choice, schedule."""

import json
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch

from vllm_adaspark.accounts.flops import ModelShape
from vllm_adaspark.methods.adatp import reference
from vllm_adaspark.methods.adatp.flops import PromptCost, event_layers
from vllm_adaspark.methods.adatp.method import AdaTP
from vllm_adaspark.methods.adatp.prune import apportion, choose, kept_per_segment
from vllm_adaspark.methods.adatp.relevance import relevant_segments, segment_shares
from vllm_adaspark.methods.adatp.request import AdaTPRequest, Look
from vllm_adaspark.methods.adatp.score import text_scores
from vllm_adaspark.methods.adatp.segments import adjacent_similarity, frame_means, segment_frames
from vllm_adaspark.methods.adatp.settings import AdaTPSettings
from vllm_adaspark.requests import Prompt, Video
from vllm_adaspark.settings import SettingsError

SMALL = ModelShape(hidden=8, heads=2, kv_heads=1, head_size=4, intermediate=16)
ONEVISION_7B = ModelShape(hidden=3584, heads=28, kv_heads=4, head_size=128, intermediate=18944)
ONEVISION_05B = ModelShape(hidden=896, heads=14, kv_heads=2, head_size=64, intermediate=4864)


# -- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [3, 2]}, "layers=.*rising"),
        ({"layers": []}, "layers="),
        ({"layers": [0]}, "counted from 1"),
        ({"layers": [True]}, "layers="),
        ({"keep": 0}, "keep=0"),
        ({"keep": [0.5, 1.2]}, "keep="),
        ({"keep": 0.5, "flops": 0.5}, "leave one of them out"),
        ({"keep": [0.5, 0.5], "layers": [2]}, "2 shares for 1 layers"),
        ({"keep": None, "flops": None}, "set one of them"),
        ({"tau_s": 3}, "tau_s=3: expected a number from -1 to 2"),
        ({"alpha_boost": 0.5}, "alpha_boost=0.5"),
        ({"dedup": "some"}, "dedup='some'"),
        ({"order": "cube"}, "order='cube'"),
        ({"p_attn": 0.5}, "unknown key 'p_attn'"),
    ],
)
def test_settings_that_cannot_be_used(settings, message) -> None:
    with pytest.raises(SettingsError, match=message):
        AdaTPSettings().override(settings)


def test_a_request_cannot_name_an_encoder() -> None:
    with pytest.raises(SettingsError, match="server setting"):
        AdaTPSettings().override({"encoder": "/x"}, request=True)


def test_keep_and_flops_replace_each_other() -> None:
    kept = AdaTPSettings().override({"keep": 0.5})
    assert (kept.keep, kept.flops) == ((0.5,), None)
    again = kept.override({"flops": 0.4})
    assert (again.keep, again.flops) == (None, 0.4)
    for settings in (kept, again):
        assert AdaTPSettings().override(settings.to_dict()) == settings


def test_fastv_is_a_word_that_named_settings_outrank() -> None:
    fastv = AdaTPSettings().override("fastv")
    assert fastv.layers == (2,) and fastv.dedup == "off" and fastv.queries == "last"
    assert (fastv.keep, fastv.flops) == ((0.5,), None)
    budget = AdaTPSettings(keep=(0.5, 0.4), flops=None).override({"fastv": True, "flops": 0.4})
    assert (budget.keep, budget.flops, budget.layers) == (None, 0.4, (2,))
    assert AdaTPSettings().override({"fastv": True, "layers": [3], "keep": 0.5}).layers == (3,)


# -- segments and relevance ---------------------------------------------------------------------


def similarities(videos: list[torch.Tensor]) -> list[np.ndarray]:
    return [adjacent_similarity(video).numpy() for video in videos]


def test_segments_equal_the_twin_and_start_with_each_video() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        videos = [torch.randn(n, 3, generator=generator) for n in (7, 1, 5)]
        tau = float(torch.rand(1, generator=generator))
        found = segment_frames(similarities(videos), tau).tolist()
        assert found == reference.segments(videos, tau)
        assert found[7] == found[6] + 1 and found[8] == found[7] + 1


def test_a_threshold_above_one_makes_every_frame_a_segment() -> None:
    same = torch.ones(6, 4)
    assert segment_frames(similarities([same]), 1.01).tolist() == list(range(6))
    assert segment_frames(similarities([same]), 0.95).tolist() == [0] * 6


def test_frames_are_compared_by_the_mean_of_their_tokens() -> None:
    tokens = torch.tensor([[1.0, 0], [3, 0], [0, 2], [0, 4]])
    assert frame_means(tokens, 2).tolist() == [[2, 0], [0, 3]]


def test_relevance_is_relative_and_a_segments_best_frame_counts() -> None:
    segment = np.array([0, 0, 1, 2])
    relevance = np.array([0.02, 0.10, 0.03, 0.05])
    assert relevant_segments(relevance, segment, 0.5).tolist() == [True, False, False]
    assert relevant_segments(relevance, segment, 0.2).tolist() == [True, False, True]
    assert not relevant_segments(None, segment, 0.0).any()
    assert not relevant_segments(relevance, np.zeros(4, int), 0.0).any(), "one segment: no boost"
    assert not relevant_segments(np.full(4, 0.1), segment, 0.0).any(), "all alike"


def test_boost() -> None:
    shares, sizes = np.array([0.8, 0.4]), np.array([10, 30])
    relevant = np.array([True, False])
    rule = dict(alpha_boost=1.5, gamma_cap=1.0, keep_budget=True)
    boosted = segment_shares(shares, sizes, relevant, **rule)
    assert boosted[:, 0].tolist() == pytest.approx([1.0, 0.6])
    assert (boosted @ sizes).tolist() == pytest.approx((shares * 40).tolist())
    more = segment_shares(shares, sizes, relevant, **rule | {"keep_budget": False})
    assert more[:, 1].tolist() == shares.tolist() and (more @ sizes > shares * 40).all()
    capped = segment_shares(shares, sizes, relevant, **rule | {"gamma_cap": 0.5})
    assert capped[:, 0].tolist() == pytest.approx([0.8, 0.5]), "a cap on the boost alone"
    for nothing in (rule | {"alpha_boost": 1.0}, rule | {"gamma_cap": 0.1}):
        assert np.allclose(segment_shares(shares, sizes, relevant, **nothing), shares[:, None])


def test_boosted_shares_never_rise_and_stay_shares() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        shares = np.cumprod(rng.uniform(0.2, 1, 4))
        sizes = rng.integers(1, 50, 6)
        relevant = rng.random(6) < 0.5
        rule = dict(alpha_boost=rng.uniform(1, 4), gamma_cap=1.0, keep_budget=True)
        boosted = segment_shares(shares, sizes, relevant, **rule)
        assert (np.diff(boosted, axis=0) <= 1e-12).all()
        assert (boosted >= 0).all() and (boosted <= 1 + 1e-12).all()
        assert boosted @ sizes == pytest.approx(shares * sizes.sum())


# -- how many, and which ------------------------------------------------------------------------


def test_apportioned_tokens_are_the_budget() -> None:
    assert apportion(np.array([2.5, 2.5, 0.4])).tolist() == [2, 2, 1]
    assert apportion(np.array([2.6, 0.4, 0.3])).tolist() == [2, 1, 0]
    assert apportion(np.array([0.1, 0.3])).tolist() == [0, 1], "never nothing at all"
    rng = np.random.default_rng(0)
    for _ in range(200):
        targets = rng.uniform(0, 6, rng.integers(1, 9))
        kept = apportion(targets)
        assert kept.sum() == max(1, int(targets.sum()))
        assert kept.tolist() == reference.quotas(targets.tolist())


@pytest.mark.parametrize(
    ("sizes", "shares", "kept"),
    [
        # The smaller segment, which has no token left, is the first that rounding would give one.
        ([20, 9], [[0.1, 0.1], [0.096, 0.096]], [[2, 0], [2, 0]]),
        # It is the only one: its boost has a cap that the first event reaches and the second not.
        ([28, 18], [[0.001, 0.001], [0.0002, 0.001]], [[1, 0], [1, 0]]),
    ],
)
def test_a_segment_without_tokens_takes_none_from_the_others(sizes, shares, kept) -> None:
    places, settings = np.full(len(sizes), 1), AdaTPSettings(dedup="off")
    got, _ = kept_per_segment(np.array(shares), np.array(sizes), places, settings)
    assert got.tolist() == kept


def scene(generator, frames: int, places: int):
    """Tokens of a video: segment and place of each, the segments' sizes."""
    cuts = torch.rand(frames, generator=generator) < 0.4
    cuts[0] = True
    of_frame = cuts.long().cumsum(0) - 1
    segment = of_frame.repeat_interleave(places)
    place = torch.arange(places).repeat(frames)
    return segment, place, torch.bincount(segment).numpy()


def run(settings: AdaTPSettings, shares: np.ndarray, segment, place, sizes, scores):
    """All events by the fast path: the alive tokens after each."""
    places = np.full(len(sizes), int(place.max()) + 1)
    by_segment = np.repeat(shares[:, None], len(sizes), axis=1)
    kept, dedups = kept_per_segment(by_segment, sizes, places, settings)
    alive, counts, result = torch.arange(len(segment)), torch.from_numpy(sizes), []
    for event, dedup in enumerate(dedups):
        keep = torch.from_numpy(kept[event])
        chosen = choose(
            scores[event][alive], segment[alive], place[alive] if dedup else None, counts, keep,
            int(keep.sum()),
        )  # fmt: skip
        alive, counts = alive[chosen], keep
        result.append(alive)
    return result


@pytest.mark.parametrize("dedup", ["first", "all", "off"])
@pytest.mark.parametrize("refill", [False, True])
def test_survivors_equal_the_twin(dedup, refill) -> None:
    generator = torch.Generator().manual_seed(2)
    settings = AdaTPSettings(dedup=dedup, refill=refill)
    for _ in range(60):
        frames, places = (int(torch.randint(1, 9, (1,), generator=generator)) for _ in range(2))
        segment, place, sizes = scene(generator, frames, places)
        shares = np.cumprod(torch.rand(3, generator=generator).numpy() * 0.8 + 0.2)
        # few values, so that ties are common
        scores = torch.randint(0, 6, (3, len(segment)), generator=generator).float()
        found = run(settings, shares, segment, place, sizes, scores)
        alive = list(range(len(segment)))
        for event, got in enumerate(found):
            alive = reference.survivors(
                scores[event][alive].tolist(), alive, segment.tolist(), place.tolist(),
                [float(shares[event])] * len(sizes), event == 0, settings,
            )  # fmt: skip
            assert got.tolist() == alive
            budget = max(1, int(shares[event] * len(segment) + 1e-9))
            assert len(alive) <= budget
            if refill or dedup == "off":
                assert len(alive) == budget


def test_keeping_all_without_deduplication_keeps_all() -> None:
    generator = torch.Generator().manual_seed(3)
    segment, place, sizes = scene(generator, 6, 4)
    scores = torch.rand(2, 24, generator=generator)
    settings = AdaTPSettings(dedup="off", flops=None, keep=(1.0,))
    for alive in run(settings, np.ones(2), segment, place, sizes, scores):
        assert alive.tolist() == list(range(24))


def test_identical_frames_leave_one_token_of_each_place() -> None:
    segment, place = torch.zeros(30, dtype=torch.long), torch.arange(6).repeat(5)
    scores = torch.rand(1, 30, generator=torch.Generator().manual_seed(4))
    (alive,) = run(AdaTPSettings(), np.ones(1), segment, place, np.array([30]), scores)
    assert sorted(place[alive].tolist()) == list(range(6))
    best = scores[0].view(5, 6).argmax(0) * 6 + torch.arange(6)
    assert alive.tolist() == sorted(best.tolist())


def test_a_segment_of_one_frame_has_nothing_twice() -> None:
    segment, place = torch.arange(4).repeat_interleave(5), torch.arange(5).repeat(4)
    scores = torch.rand(1, 20, generator=torch.Generator().manual_seed(5))
    (alive,) = run(AdaTPSettings(), np.ones(1), segment, place, np.full(4, 5), scores)
    assert alive.tolist() == list(range(20))


# -- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("slab", [1, 1 << 24])
def test_scores_are_the_models_own_probabilities(slab, monkeypatch) -> None:
    monkeypatch.setattr("vllm_adaspark.methods.adatp.score.SLAB", slab)
    generator = torch.Generator().manual_seed(6)
    query = torch.randn(20, 4, 8, generator=generator)
    key = torch.randn(20, 2, 8, generator=generator)
    columns = torch.tensor([2, 3, 5, 8])
    want = torch.zeros(4)
    for token in range(13, 17):
        for head in range(4):
            logits = key[: token + 1, head // 2] @ query[token, head] * 0.3
            want += logits.softmax(0)[columns]
    got = text_scores(query, key, slice(13, 17), columns, 0.3)
    assert torch.allclose(got, want / 16, atol=1e-6)


# -- the schedule -------------------------------------------------------------------------------


def test_events_lie_where_the_paper_prunes() -> None:
    assert event_layers(AdaTPSettings(), 28) == (1, 5, 10, 15)
    assert event_layers(AdaTPSettings(), 24) == (1, 4, 7, 11)
    assert event_layers(AdaTPSettings(), 6) == (1,)
    with pytest.raises(ValueError, match="this model has 6 layers"):
        event_layers(AdaTPSettings(layers=(2, 6)), 6)
    with pytest.raises(ValueError, match="3 shares for the 1 layers"):
        event_layers(AdaTPSettings(keep=(0.5, 0.5, 0.5), flops=None), 6)


def test_flops_by_hand() -> None:
    cost = PromptCost(SMALL, num_layers=4, events=(1,), text=2, video=4, queries=2)
    # A token's projections take 384 FLOPs and its FFN 768, a pair 32, a scored pair 16.
    full, rest, scores = 6 * 1152 + 36 * 32, 4 * 1152 + 16 * 32, 2 * 6 * 16
    assert cost.spent(np.array([0.5]), causal=False) == 2 * full + 2 * rest + scores
    causal = 2 * (6 * 1152 + 21 * 32) + 2 * (4 * 1152 + 10 * 32) + scores
    assert cost.spent(np.array([0.5])) == causal
    assert cost.dense == 4 * (6 * 1152 + 21 * 32)


@pytest.mark.parametrize(
    ("shape", "layers"), [(ONEVISION_7B, 28), (ONEVISION_05B, 24)], ids=["7B", "0.5B"]
)
def test_the_default_schedule_is_the_papers_budget(shape, layers) -> None:
    """32 frames of 196 tokens, no text; a budget counts as accounts do, causally."""
    events = event_layers(AdaTPSettings(), layers)
    cost = PromptCost(shape, layers, events, text=0, video=32 * 196, queries=0)
    shares = cost.shares(AdaTPSettings())
    assert cost.spent(shares) / cost.dense == pytest.approx(0.273, abs=1e-6)
    keep = shares[1:] / shares[:-1]
    assert keep == pytest.approx(np.full(3, shares[0])), "each event keeps the same share"


@pytest.mark.parametrize(
    ("layers", "keep"), [(range(2, 17), 0.852), ((2, 6, 11, 16), 0.579), ((2,), 0.247)]
)
def test_named_schedules_cost_what_the_paper_says(layers, keep) -> None:
    """27.3 % on the 7B model, every query counted with every key, as papers do."""
    settings = AdaTPSettings(layers=tuple(layers), keep=(keep,), flops=None)
    cost = PromptCost(ONEVISION_7B, 28, event_layers(settings, 28), 0, 32 * 196, 0)
    dense = 28 * float(ONEVISION_7B.layer_flops(32 * 196, causal=False))
    spent = cost.spent(cost.shares(settings), causal=False)
    assert spent / dense == pytest.approx(0.273, abs=0.003)


def test_a_budget_that_cannot_be_kept() -> None:
    cost = PromptCost(SMALL, num_layers=4, events=(1,), text=50, video=50, queries=50)
    assert 0.5 < cost.least < 1
    assert cost.shares_for(0.1).tolist() == pytest.approx([0.1])
    kept = cost.spent(cost.shares_for(cost.least + 0.05)) / cost.dense
    assert kept == pytest.approx(cost.least + 0.05, abs=1e-6)
    assert cost.shares_for(1.0).tolist() == [1.0]


# -- a request ----------------------------------------------------------------------------------


def test_a_request_settles_how_many_tokens_go_on() -> None:
    is_video = np.zeros(40, bool)
    is_video[3:15] = is_video[20:35] = True  # 3 frames of 4, then 5 of 3
    config = AdaTPSettings(keep=(0.5,), flops=None, layers=(2, 3), tau_s=0.9)
    cost = PromptCost(SMALL, 4, event_layers(config, 4), text=13, video=27, queries=5)
    videos = tuple(Video(grid, lambda: torch.ones(0)) for grid in ((3, 2, 2), (5, 1, 3)))
    seen = Look([np.array([0.95, 0.5]), np.array([1.0, 1.0, 0.1, 1.0])])
    request = AdaTPRequest(config, is_video, videos, 35, cost)
    assert request.asks == slice(35, 40)
    assert request.token_place.tolist() == [0, 1, 2, 3] * 3 + [0, 1, 2] * 5
    request.start(40, lambda _: seen)
    pruning = request.progress.pruning
    assert pruning.segment.tolist() == [0, 0, 1, 2, 2, 2, 3, 3]
    assert pruning.sizes.tolist() == [8, 4, 9, 6]
    # Half of each, and no more than a frame's places; then a quarter.
    assert pruning.kept.tolist() == [[4, 2, 3, 3], [2, 1, 2, 1]]
    assert pruning.dropped.tolist() == [0, 15, 21]
    request.start(39, lambda _: seen)
    assert (request.progress.pruning, request.progress.reason) == (None, "one_step")


def test_what_is_told_travels_as_json() -> None:
    text = SimpleNamespace(
        num_attention_heads=2, hidden_size=8, num_key_value_heads=1, intermediate_size=16,
        num_hidden_layers=6,
    )  # fmt: skip
    place = SimpleNamespace(offset=3, length=20, is_embed=None)
    videos = [Video((4, 1, 5), lambda: torch.ones(20, 1))]
    prompt = Prompt(30, {"video": [place]}, videos=videos)
    method = AdaTP(AdaTPSettings(), text, "cpu")
    told = {}
    asked = {"budget": {}, "all": {"keep": 1, "dedup": "off"}, "off": {"off": True, "layers": [9]}}
    for name, settings in asked.items():
        request = method.describe(AdaTPSettings().override(settings), prompt)
        told[name] = json.loads(json.dumps(method.told(request)))
        msgspec.msgpack.encode(method.told(request))  # takes no NumPy scalar, as vLLM's does not
    assert told["budget"]["budget"]["flops"] == 0.273 and told["budget"]["layers"] == [2]
    assert [each["off"] for each in told.values()] == [False, True, True]
    assert told["off"]["budget"] is None and told["off"]["flops"] is None
    # A prompt that runs dense for another reason keeps no budget below 1.
    for left_out in ({"tokens": 23}, {"wants_all": True}):
        request = method.describe(AdaTPSettings(flops=0.9), replace(prompt, **left_out))
        assert method.told(request)["budget"] == {"flops": 0.9, "smallest": 1.0, "kept": False}
    request = method.describe(AdaTPSettings(flops=0.9), prompt)
    assert method.told(request)["budget"]["kept"]


def test_shares_are_never_rounded_to_all() -> None:
    kept = AdaTPSettings().override({"layers": [1, 2, 3], "keep": [0.9997, 0.00001, 1]}).keep
    assert kept == (0.999, 0.001, 1.0)


def test_a_prompt_without_text_after_its_video_asks_nothing() -> None:
    is_video = np.array([False, True, True])
    config = AdaTPSettings()
    cost = PromptCost(SMALL, 4, event_layers(config, 4), text=1, video=2, queries=0)
    request = AdaTPRequest(config, is_video, (Video((2, 1, 1), lambda: torch.ones(2, 1)),), 3, cost)
    request.start(3, lambda _: Look([np.ones(1)]))
    assert (request.progress.pruning, request.progress.reason) == (None, "no_text")
