"""Settings of one request on the real engine: budgets, off, and different settings in one batch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from engine.engines import (
    SPARSE,
    VIDEO,
    Answer,
    ask,
    chat,
    clip,
    engine,
    last_reports,
    video_prompt,
)
from engine.twin import TwinModel
from vllm_adaspark.accounts.flops import ModelShape
from vllm_adaspark.methods.adaspark.budget import prompt_cost
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig

pytestmark = pytest.mark.engine
CLOSE = 1e-3  # of log-probabilities in float32
BUDGET_SPARED = 0.01  # of the dense FLOPs, that a budget may leave unspent
LONG = (112, 224, 168)  # frames, width, height: 56 * 8 * 6 = 2688 video tokens, 42 cubes


def long_video(seed: int = 31):
    return clip(*LONG, seed=seed)


@pytest.fixture(scope="class")
def sparse(checkpoint):
    with engine(checkpoint, SPARSE, enable_prefix_caching=False) as llm:
        yield llm


class TestOneEngine:
    def test_requests_of_one_batch_have_their_own_settings(self, sparse) -> None:
        """Three settings in one batch: three densities, and the answers that each gives alone."""
        settings = [{"p_attn": 0.9, "p_ffn": 0.8}, {"p_attn": 0.3, "p_ffn": 0.3}, {"flops": 0.5}]
        prompts = [video_prompt(long_video(), **each) for each in settings]
        alone = [ask(sparse, [prompt])[0] for prompt in prompts]
        separate = last_reports(sparse, 3)
        together = ask(sparse, prompts)
        reports = last_reports(sparse, 3)
        for got, want in zip(together, alone, strict=True):
            assert got.difference(want) < CLOSE
        by_ratio = [sorted(r["flops_ratio"] for r in some) for some in (reports, separate)]
        assert by_ratio[0] == pytest.approx(by_ratio[1], abs=1e-3)
        densities = sorted(report["attention_density"] for report in reports)
        assert all(high - low > 0.05 for low, high in pairwise(densities))

    def test_a_budget_equals_the_twin(self, sparse, checkpoint) -> None:
        video, question, flops = clip(44, seed=7), "Which digit?", 0.6
        prompt = video_prompt(video, question=question, flops=flops)
        (answer,) = ask(sparse, [prompt], 4, 20)
        share = share_of(sparse, checkpoint, prompt, flops, **SPARSE)
        # The twin takes the share of cubes and tokens, not of FLOPs.
        twin = TwinModel(checkpoint, AdaSparkConfig().override(SPARSE | {"flops": None}))
        kept = {key: SPARSE[key] for key in ("min_cubes", "dense_below")}
        twin.config = AdaSparkConfig(flops=share, **kept)
        assert agrees_with(answer, twin.logprobs(chat(VIDEO, question), video, list(answer.ids)))


def test_off_is_the_stock_model(checkpoint) -> None:
    prompt = video_prompt(clip(60, seed=1), question="Which digit is shown?")
    with engine(checkpoint, None) as llm:
        (stock,) = ask(llm, [prompt])
    with engine(checkpoint, {"dense_below": 2, "flops": 0.5}) as llm:
        for settings in ({"off": True}, "off"):
            (answer,) = ask(llm, [prompt | {"mm_processor_kwargs": {"adaspark": settings}}])
            (report,) = last_reports(llm)
            assert answer.difference(stock) < CLOSE
            assert report["flops_ratio"] == 1.0
        (answer,) = ask(llm, [prompt])
        assert answer.difference(stock) > CLOSE  # else the test shows nothing


@pytest.mark.parametrize("chunk", [500, 8192])
def test_a_budget_is_kept(checkpoint, chunk) -> None:
    """With every floor on the cubes kept, also in chunks, which end at the edges of cubes."""
    options = {"max_num_scheduled_tokens": chunk, "enable_prefix_caching": False}
    with engine(checkpoint, {"dense_below": 2}, **options) as llm:
        for flops, min_cubes in ((0.4, 1), (0.5, 8), (0.8, 1), (0.8, 16)):
            ask(llm, [video_prompt(long_video(), flops=flops, min_cubes=min_cubes)], max_tokens=1)
            (report,) = last_reports(llm)
            assert flops - BUDGET_SPARED < report["flops_ratio"] <= flops
            assert report["budget"]["kept"] and report["budget"]["flops"] == flops
            layers = [layer["attention_density"] for layer in report["layers"]]
            assert max(layers) - min(layers) < 0.02  # each layer finds the p that keeps its share


def test_the_smallest_budget_that_an_error_names_is_kept(checkpoint) -> None:
    """Prompts so short that min_cubes (8 by default) weighs: the 400 names what can be kept."""
    with engine(checkpoint, {}, enable_prefix_caching=False) as llm:
        for frames, min_cubes in ((44, 8), (60, 8), (80, 16), (110, 1)):
            prompt = video_prompt(clip(frames, seed=3), flops=0.05, min_cubes=min_cubes)
            with pytest.raises(ValueError, match=r"flops=0\.05 cannot be met.*smallest") as refused:
                ask(llm, [prompt])
            smallest = float(str(refused.value).rsplit(" ", 1)[1])
            prompt = video_prompt(clip(frames, seed=3), flops=smallest, min_cubes=min_cubes)
            ask(llm, [prompt], max_tokens=1)  # the video that was refused is sent once more
            (report,) = last_reports(llm)
            assert report["flops_ratio"] <= smallest, (frames, min_cubes)
            assert smallest - 0.02 < report["budget"]["smallest"] <= smallest


def test_a_budget_follows_from_the_requests_own_prompt(checkpoint) -> None:
    """A longer question about a cached video gets its own share, not that of who computed it."""
    short, long = (
        video_prompt(long_video(), question="word " * words, flops=0.5) for words in (3, 100)
    )
    with engine(checkpoint, {"dense_below": 2}) as llm:
        shares = [share_of(llm, checkpoint, prompt, 0.5) for prompt in (short, long)]
        assert shares[0] - shares[1] > 0.03, "else the test shows nothing"
        ask(llm, [short], max_tokens=1)
        (answer,) = ask(llm, [long], max_tokens=1)
        assert answer.cached_tokens > 2600
        (report,) = last_reports(llm)
        # What it computed is the question, each of whose tokens keeps its share of 42 cubes.
        assert report["attention_density"] == pytest.approx(shares[1], abs=0.02)


def test_a_budget_of_the_server_and_one_that_cannot_be_met(checkpoint) -> None:
    config = {"dense_below": 2, "flops": 0.45}
    with engine(checkpoint, config, enable_prefix_caching=False) as llm:
        ask(llm, [video_prompt(long_video())], max_tokens=1)
        (report,) = last_reports(llm)
        assert 0.45 - BUDGET_SPARED < report["flops_ratio"] <= 0.45

        ask(llm, [video_prompt(long_video(), p_attn=1.0, p_ffn=1.0)])  # the request decides
        (report,) = last_reports(llm)
        assert report["flops_ratio"] == 1.0 and report["budget"] is None

        with pytest.raises(ValueError, match=r"flops=0\.05 cannot be met.*smallest budget.* 0\.\d"):
            ask(llm, [video_prompt(long_video(), flops=0.05)])
        # The server's own budget never refuses a request: a clip too short for it just runs.
        ask(llm, [video_prompt(clip(4), question="word " * 200)])
        (report,) = last_reports(llm)
        assert report["flops_ratio"] > 0.45
        assert not report["budget"]["kept"] and report["budget"]["smallest"] > 0.45


def share_of(llm, checkpoint, prompt: dict, flops: float, **settings) -> float:
    """The share that a budget leaves a prompt about one video."""
    prompt_ids = llm.get_tokenizer().encode(prompt["prompt"])
    text = llm.llm_engine.model_config.hf_text_config
    ((frames, _),) = prompt["multi_modal_data"]["video"]
    height, width = (side // 28 for side in frames.shape[1:3])
    tokens = len(frames) // 2 * height * width
    start = prompt_ids.index(llm_video_token(prompt_ids, checkpoint))
    is_video = np.zeros(len(prompt_ids) - 1 + tokens, bool)
    is_video[start : start + tokens] = True
    config = AdaSparkConfig().override({"dense_below": 2} | settings | {"flops": None})
    config = config.override({"flops": flops})
    return prompt_cost(ModelShape.of(text), text.num_hidden_layers, is_video, config).share(flops)


def llm_video_token(prompt_ids: list[int], checkpoint) -> int:
    from transformers import AutoConfig

    token = AutoConfig.from_pretrained(checkpoint).video_token_id
    assert prompt_ids.count(token) == 1
    return token


def agrees_with(answer: Answer, expected: list[torch.Tensor]) -> bool:
    for got, want in zip(answer.logprobs, expected, strict=True):
        named = torch.tensor(list(got))
        difference = (want[named] - torch.tensor(list(got.values()))).abs().max()
        assert difference < CLOSE, difference
    return True
