"""Dropping video tokens before the language model (``prune``), in the real engine.

The naive twin drops them by loops.  Its clips are noisy, so that no two tokens are nearly as novel:
the engine and the twin must then keep the same ones.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from engine.engines import (
    IMAGE,
    SPARSE,
    VIDEO,
    ask,
    chat,
    clip,
    engine,
    last_reports,
    video_prompt,
)
from engine.twin import TwinModel
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.traces import reader
from vllm_adaspark.video.order import cube_order, decode_order

pytestmark = pytest.mark.engine
CLOSE = 1e-3  # of log-probabilities in float32
ALL = {"p_attn": 1.0, "p_ffn": 1.0}
HALF = {"p_attn": 0.5, "p_ffn": 0.5}


@cache
def noisy(frames: int = 48, seed: int = 0, width: int = 168, height: int = 140):
    """A clip whose every place changes from frame to frame, some more than others."""
    still, metadata = clip(frames, width, height, seed=seed)
    rng = np.random.default_rng(seed)
    strength = rng.uniform(4, 60, (1, height // 28, width // 28, 1)).repeat(28, 1).repeat(28, 2)
    moved = still + strength * rng.normal(size=still.shape)
    return moved.clip(0, 255).astype(np.uint8), metadata


def pruned_prompt(*videos, image=None, question: str = "Which digit?", **settings) -> dict:
    """As video_prompt; ``image`` stands before the last of several videos."""
    prompt = video_prompt(*videos, question=question, **settings)
    if image is not None:
        media = [VIDEO] * len(videos)
        prompt["prompt"] = chat(*media[:-1], "and", IMAGE, "then", media[-1], question)
        prompt["multi_modal_data"]["image"] = [image]
    return prompt


class Twin:
    """Asks the naive twin what the engine was asked."""

    def __init__(self, checkpoint) -> None:
        self.model = TwinModel(checkpoint, AdaSparkConfig())

    def difference(self, prompt: dict, answer) -> float:
        """Largest difference of a log-probability that the engine named."""
        settings = prompt.get("mm_processor_kwargs", {}).get("adaspark", {})
        self.model.config = AdaSparkConfig().override(SPARSE).override(settings)
        media = prompt["multi_modal_data"]
        expected = self.model.logprobs(
            prompt["prompt"], media["video"], list(answer.ids), media.get("image", ())
        )
        assert all(margin > 1e-5 for margin in self.model.margins), "too near to tell"
        return max(
            float((want[list(got)] - torch.tensor(list(got.values()))).abs().max())
            for got, want in zip(answer.logprobs, expected, strict=True)
        )


@pytest.fixture(scope="module")
def twin(checkpoint) -> Twin:
    return Twin(checkpoint)


@pytest.fixture(scope="module")
def chunked(checkpoint):
    """Prefix caching, and chunks whose edges cut videos: four KV blocks."""
    with engine(checkpoint, SPARSE, max_num_scheduled_tokens=256) as llm:
        yield llm


def one(llm, prompt: dict, **how):
    """An answer with its account."""
    (answer,) = ask(llm, [prompt], **{"max_tokens": 4, "logprobs": 20} | how)
    (report,) = last_reports(llm)
    return answer, report


@pytest.mark.parametrize("rules", [ALL, HALF], ids=["all", "half"])
@pytest.mark.parametrize("prune", [0.0, 0.5, 0.75])
def test_equals_the_twin(chunked, twin, prune, rules) -> None:
    prompt = pruned_prompt(noisy(), prune=prune, **rules)
    answer, report = one(chunked, prompt)
    assert answer.cached_tokens == 0
    assert twin.difference(prompt, answer) < CLOSE
    left = 24 * 30 * (1 - prune)
    assert (report["video_tokens"], report["dropped_tokens"]) == (left, 720 - left)
    assert report["mode"] == ("sparse" if prune or rules is HALF else "dense")
    assert report["settings"]["prune"] == prune


def test_flops_are_those_of_the_whole_video(chunked) -> None:
    """Asked before with all its tokens, the same video cost what dense is now."""
    whole, pruned, both = (
        one(chunked, pruned_prompt(noisy(seed=3), **settings))[1]
        for settings in (ALL | {"prune": 0.0}, ALL | {"prune": 0.5}, HALF | {"prune": 0.5})
    )
    dense = whole["flops"]["dense"]
    assert whole["flops"]["executed"] == pytest.approx(dense | {"selection": 0})
    for report in (pruned, both):
        flops = report["flops"]
        assert flops["dense"] == pytest.approx(dense)
        assert report["flops_ratio"] == flops["executed"]["total"] / flops["dense"]["total"]
    left = {part: dense[part] - dropped for part, dropped in pruned["flops"]["dropped"].items()}
    assert pruned["flops"]["executed"] == pytest.approx(left | {"selection": 0})
    assert 0.25 < pruned["flops_ratio"] < 0.6 and both["flops_ratio"] < pruned["flops_ratio"]
    assert pruned["attention_density"] == 1 > both["attention_density"]


def test_two_videos_and_an_image_between(chunked, twin) -> None:
    image = clip(2, seed=5)[0][0]
    for prune in (0.5, 0.75):
        prompt = pruned_prompt(noisy(), noisy(30, 1, 112, 196), image=image, prune=prune, **HALF)
        assert twin.difference(prompt, one(chunked, prompt)[0]) < CLOSE


def test_a_prefix_hit_inside_a_pruned_video(chunked, twin) -> None:
    settings = HALF | {"prune": 0.5}
    video = noisy(seed=6)
    one(chunked, pruned_prompt(video, question="What moves?", **settings))
    again = pruned_prompt(video, **settings)
    for gone in (False, True):
        if gone:  # what is not in the prefix cache is encoded once more
            chunked.llm_engine.reset_encoder_cache()
        answer, report = one(chunked, again)
        assert answer.cached_tokens >= 256 and report["dropped_tokens"] < 360
        assert twin.difference(again, answer) < CLOSE
        again = pruned_prompt(video, noisy(30, 1), **settings)  # a second one behind it


def batch_of_rates(llm, twin, rules) -> None:
    """One batch: rates, whole videos, text; each answers as the twin does alone."""
    video = noisy(seed=7)
    prompts = [pruned_prompt(video, prune=rate, **rules) for rate in (0.5, 0.0, 0.75, 0.5)]
    prompts.append(pruned_prompt(video, noisy(30, 1), prune=0.25, **rules))
    text = {"prompt": chat("Which number? " * 5)}
    (alone,) = ask(llm, [text], max_tokens=4)
    answers = ask(llm, [*prompts, text], max_tokens=4, logprobs=20)
    for prompt, answer in zip(prompts, answers, strict=False):
        assert twin.difference(prompt, answer) < CLOSE
    assert answers[-1].difference(alone) < CLOSE


def test_requests_share_chunks_but_not_their_rates(chunked, twin) -> None:
    """Chunk edges cut cubes anywhere here, and those run dense: so does everything."""
    batch_of_rates(chunked, twin, ALL)


def test_a_request_of_one_frame_pair_loses_nothing(chunked, twin) -> None:
    """The first frame stays whole, so there is nothing to drop; its places travel all the same."""
    prompt = pruned_prompt(noisy(2, seed=8), prune=0.9, **ALL)
    answer, report = one(chunked, prompt)
    assert twin.difference(prompt, answer) < CLOSE and report["dropped_tokens"] == 0


@pytest.mark.parametrize("wrong", [1, -0.5, "half", None, True])
def test_a_wrong_share_is_refused(chunked, wrong) -> None:
    with pytest.raises(ValueError, match=r"prune=.*expected a number from 0 to below 1"):
        ask(chunked, [pruned_prompt(noisy(), prune=wrong)])


def test_few_cubes_left_are_attended_by_all(chunked, twin) -> None:
    """``dense_below`` counts the cubes that are left; the FFN is as sparse as ever."""
    video = noisy(20, seed=9)  # three cubes; pruned, one
    whole, pruned = (
        one(chunked, pruned_prompt(video, prune=prune, **HALF))[1] for prune in (0.0, 0.5)
    )
    assert whole["attention_density"] < 1 == pruned["attention_density"]
    assert pruned["ffn_density"] < 1


def test_a_budget_is_one_of_the_whole_video(chunked) -> None:
    video = noisy(96, seed=10)
    least = "the smallest budget that can is ([0-9.]+)"
    with pytest.raises(ValueError, match=least) as refused:
        ask(chunked, [pruned_prompt(video, flops=0.05)])
    smallest = float(str(refused.value).rsplit(" ", 1)[1])
    for budget in (0.25, 0.9):
        _, report = one(chunked, pruned_prompt(video, flops=budget, prune=0.5), max_tokens=1)
        assert report["budget"]["kept"] and report["budget"]["smallest"] < 0.7 * smallest
        assert report["flops_ratio"] <= budget + 0.005
    assert report["flops_ratio"] < 0.6, "dropping alone keeps a budget of 0.9"
    assert report["attention_density"] == report["ffn_density"] == 1


def test_a_trace_says_which_tokens_were_dropped(chunked, twin) -> None:
    settings = HALF | {"prune": 0.5, "trace": True}
    for question, cached in (("Which digit?", False), ("What moves?", True)):
        prompt = pruned_prompt(noisy(seed=11), noisy(30, 12), question=question, **settings)
        answer, _ = one(chunked, prompt)
        assert (answer.cached_tokens > 360) == cached
        assert twin.difference(prompt, answer) < CLOSE
        chunked.llm_engine.reset_encoder_cache()
        trace = reader.read_offline(chunked, frames=1)
        assert trace["spans"][-1]["ids"] == list(answer.ids)
        for video, kept in zip(trace["videos"], twin.model.kept, strict=True):
            tokens = decode_order(video["token_order"]).tolist()
            order = cube_order(tuple(video["grid"]), (4, 4, 4)).tolist()
            assert tokens == [token for token in order if token in kept]
            assert video["tokens"] == len(kept) == len(order) // 2
        assert (trace["usage"]["dropped_tokens"] < 360 + 225) == cached


def test_server_wide_share_and_off(checkpoint, twin) -> None:
    """In one chunk: the server's share, a request's own, and dense requests that are stock's."""
    prompt = pruned_prompt(noisy())
    with engine(checkpoint, None) as llm:
        (stock,) = ask(llm, [prompt])
    server = SPARSE | {"prune": 0.5}
    with engine(checkpoint, server) as llm:
        for settings, left in (({}, 360), ({"prune": 0.75}, 180), ({"prune": 0.0}, 720)):
            asked = pruned_prompt(noisy(), **settings)
            answer, report = one(llm, asked)
            assert report["video_tokens"] == left
            asked["mm_processor_kwargs"] = {"adaspark": {"prune": 0.5} | settings}
            assert twin.difference(asked, answer) < CLOSE
        for settings in ({"off": True}, {"prune": 0.0, "order": "raster"} | ALL):
            assert ask(llm, [pruned_prompt(noisy(), **settings)])[0].difference(stock) < CLOSE
            (report,) = last_reports(llm)
            assert report["dropped_tokens"] == 0 and report["flops_ratio"] == 1
        batch_of_rates(llm, twin, HALF)


def test_preemption(checkpoint) -> None:
    """Requests that are preempted compute their pruned videos again, and answer alike."""
    batch = [pruned_prompt(noisy(96, seed=20 + i), prune=0.5 + 0.05 * i, **HALF) for i in range(4)]
    options = {"enable_prefix_caching": False, "disable_log_stats": False}
    options |= {"max_model_len": 2048, "max_num_batched_tokens": 2048}
    with engine(checkpoint, SPARSE, **options) as llm:
        alone = ask(llm, batch, max_tokens=100)
    with engine(checkpoint, SPARSE, num_gpu_blocks_override=43, **options) as llm:
        together = ask(llm, batch, max_tokens=100)
        preempted = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
        assert sum(preempted) > 0
        tokens = [report["dropped_tokens"] for report in last_reports(llm, 4)]
        assert all(dropped >= 720 for dropped in tokens)
    for got, want in zip(together, alone, strict=True):
        assert got.difference(want) < CLOSE


def test_compiled(checkpoint, twin, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # Dynamo's graph; test_scheduling.py has Inductor's
    prompt = pruned_prompt(noisy(), noisy(30, 1), prune=0.5, **HALF)
    with engine(checkpoint, SPARSE, enforce_eager=False) as llm:
        assert twin.difference(prompt, one(llm, prompt)[0]) < CLOSE
        assert twin.difference(prompt, one(llm, prompt)[0]) < CLOSE  # from the prefix cache


def test_two_ranks_keep_the_same_tokens(checkpoint, twin) -> None:
    """Also where rounding makes them disagree: the second rank's choice does not count."""
    prompt = pruned_prompt(noisy(), prune=0.5, **HALF)
    with engine(checkpoint, SPARSE, tensor_parallel_size=2, enable_prefix_caching=False) as llm:
        llm.collective_rpc(disturb_other_ranks)
        answer, report = one(llm, prompt)
    assert twin.difference(prompt, answer) < CLOSE
    assert report["dropped_tokens"] == 360


def disturb_other_ranks(worker) -> None:
    """Have ranks other than the first choose otherwise; runs in the worker."""
    from vllm_adaspark.models import pruned

    if worker.rank:
        chosen = pruned.survivors
        pruned.survivors = lambda *args: chosen(*args).flip(0)
