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
    assert report["video_tokens"] == 24 * 30 * (1 - prune)


def test_two_videos_and_an_image_between(chunked, twin) -> None:
    image = clip(2, seed=5)[0][0]
    for prune in (0.5, 0.75):
        prompt = pruned_prompt(noisy(), noisy(30, 1, 112, 196), image=image, prune=prune, **HALF)
        assert twin.difference(prompt, one(chunked, prompt)[0]) < CLOSE
