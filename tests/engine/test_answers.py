"""Answers of the real engine: against stock vLLM, against the naive twin, and against itself."""

from __future__ import annotations

import pytest
import torch

from engine.engines import (
    RASTER_DENSE,
    SPARSE,
    VIDEO,
    Answer,
    ask,
    chat,
    clip,
    engine,
    five_prompts,
    last_reports,
    video_prompt,
)
from engine.twin import TwinModel
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig

pytestmark = pytest.mark.engine
CLOSE = 1e-3  # of log-probabilities in float32


@pytest.fixture(scope="module")
def stock(checkpoint) -> dict[str, Answer]:
    """Stock Qwen2.5-VL's answers, each prompt alone."""
    with engine(checkpoint, None) as llm:
        return {name: ask(llm, [prompt])[0] for name, prompt in five_prompts().items()}


def test_p1_in_raster_order_equals_stock(checkpoint, stock) -> None:
    with engine(checkpoint, RASTER_DENSE) as llm:
        for name, prompt in five_prompts().items():
            assert ask(llm, [prompt])[0].difference(stock[name]) < CLOSE, name


def test_sparse_engine(checkpoint, stock) -> None:
    """One engine, many questions: twin, batch mates, prefix cache, settings per request."""
    with engine(checkpoint, SPARSE) as llm:
        prompts = five_prompts()
        alone = {name: ask(llm, [prompt])[0] for name, prompt in prompts.items()}

        # Text and images are stock's; videos are not (else nothing was sparse).
        for name in ("text only", "image"):
            assert alone[name].difference(stock[name]) < CLOSE, name
        assert alone["long video"].difference(stock["long video"]) > CLOSE

        equals_twin(checkpoint, llm, AdaSparkConfig().override(SPARSE))
        mixed_batch_equals_alone(llm, prompts, alone)
        prefix_hit_equals_cold(llm)
        settings_never_share_video_blocks(llm)
        request_can_turn_it_off(llm)


def equals_twin(checkpoint, llm, config: AdaSparkConfig) -> None:
    """The whole model against the naive one, prompt and decode, at server and request settings."""
    video = clip(44, seed=7)
    for settings in ({}, {"p_attn": 1.0, "p_ffn": 1.0}, {"selection": "top_k", "keep": 0.3}):
        request = config.override(settings)
        prompt = video_prompt(video, question="Which digit?", **settings)
        answer = ask(llm, [prompt], max_tokens=4, logprobs=20)[0]
        twin = TwinModel(checkpoint, request)
        expected = twin.logprobs(chat(VIDEO, "Which digit?"), video, list(answer.ids))
        for step, (got, want) in enumerate(zip(answer.logprobs, expected, strict=True)):
            named = torch.tensor(list(got))
            difference = (want[named] - torch.tensor(list(got.values()))).abs().max()
            assert difference < CLOSE, f"{settings}, step {step}: {difference}"


def mixed_batch_equals_alone(llm, prompts: dict[str, dict], alone: dict[str, Answer]) -> None:
    together = ask(llm, list(prompts.values()))
    for (name, want), got in zip(alone.items(), together, strict=True):
        assert got.difference(want) < CLOSE, name


def prefix_hit_equals_cold(llm) -> None:
    prompt = video_prompt(clip(40, seed=11), question="What moves?")
    cold = ask(llm, [prompt])[0]
    (cold_report,) = last_reports(llm)
    hit = ask(llm, [prompt])[0]
    (hit_report,) = last_reports(llm)
    assert cold.cached_tokens == 0 and hit.cached_tokens >= 64 * 8
    assert hit_report["cached_tokens"] == hit.cached_tokens
    assert hit_report["tokens"] == cold_report["tokens"] - hit.cached_tokens
    assert hit.difference(cold) < CLOSE


def settings_never_share_video_blocks(llm) -> None:
    video = clip(40, seed=12)
    first = ask(llm, [video_prompt(video, p_attn=0.3)])[0]
    other = ask(llm, [video_prompt(video, p_attn=0.9)])[0]
    again = ask(llm, [video_prompt(video, p_attn=0.3)])[0]
    assert first.cached_tokens == other.cached_tokens == 0
    assert again.cached_tokens >= 64 * 8
    assert again.difference(first) < CLOSE
    sparser, denser = last_reports(llm, 3)[:2]
    assert sparser["attention_density"] < denser["attention_density"] < 1


def request_can_turn_it_off(llm) -> None:
    ask(llm, [video_prompt(clip(40, seed=13), enabled=False)])
    (report,) = last_reports(llm)
    assert report["flops_ratio"] == 1.0 and report["ffn_density"] == 1.0


@pytest.mark.parametrize(
    "server",
    [{"cube": [2, 4, 4]}, {"cube": [8, 4, 4]}, {"score": "bounds"}, {"tile_cubes": 2}],
    ids=["32", "128", "bounds", "two cubes"],
)
def test_settings_of_a_server_equal_twin(checkpoint, server) -> None:
    with engine(checkpoint, SPARSE | server) as llm:
        equals_twin(checkpoint, llm, AdaSparkConfig().override(SPARSE | server))
