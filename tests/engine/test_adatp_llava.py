"""AdaTP on LLaVA-OneVision: one RoPE position a token, and a newline behind each video."""

from __future__ import annotations

import pytest
import tiny_llava

from engine.adatp_twin import PrunedTwin
from engine.engines import Answer, ask, chat, clip, engine, last_reports
from engine.twin import LlavaTwin
from vllm_adaspark.methods.adatp.settings import AdaTPSettings

pytestmark = pytest.mark.engine
CLOSE = 1e-3  # of log-probabilities in float32
SERVER = {"layers": [2, 4], "keep": [0.5, 0.4], "tau_s": 0.99}
TEXT = chat(tiny_llava.VIDEO, "Which digit is shown?")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiny_llava.build(tmp_path_factory.mktemp("llava"), layers=6)


@pytest.fixture(scope="module")
def twin(llava) -> PrunedTwin:
    return PrunedTwin(llava, LlavaTwin, pairs=1, newlines=1)


def prompt(video, **settings) -> dict:
    return {
        "prompt": TEXT,
        "multi_modal_data": {"video": [video]},
        "mm_processor_kwargs": {"adaspark": settings},
    }


def equals_twin(twin: PrunedTwin, answer: Answer, video, **settings) -> None:
    config = AdaTPSettings().override(SERVER).override(settings)
    layers = config.layers if config.enabled else ()
    shares = (config.keep[0], config.keep[0] * config.keep[-1])[: len(layers)]
    expected = twin.logprobs(TEXT, video, list(answer.ids), config, layers, shares)
    for want, step in zip(expected, answer.logprobs, strict=True):
        for token, got in step.items():
            assert abs(float(want[token]) - got) < CLOSE, settings


def preemptions(llm) -> int:
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def test_answers_equal_the_twin_alone_and_together(llava, twin, monkeypatch) -> None:
    """Decode steps are compiled, by Dynamo alone; steps that drop tokens run eagerly."""
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    asked = [
        (clip(24), {}),
        (clip(10, seed=2), {"dedup": "off"}),
        (clip(24), {"enabled": False}),
        (clip(36, seed=1), {"layers": [3], "keep": 0.3, "queries": "last", "tau_s": -1}),
    ]
    text = {"prompt": chat("Which number is shown on the card? " * 12)}
    prompts = [prompt(video, **settings) for video, settings in asked]
    # The first three prompts take 25 of 26 blocks, and a block more each while they are answered.
    tight = {"num_gpu_blocks_override": 27, "max_model_len": 1600, "disable_log_stats": False}
    tight |= {"max_num_batched_tokens": 1024, "enforce_eager": False}
    with engine(llava, SERVER, method="adatp", **tight) as llm:
        # First: without vLLM's warm-up, which this setting leaves out, the graph is that of the
        # first step that is compiled, and one of a single token would hold for no other number.
        spoken = ask(llm, [text], max_tokens=70)[0]
        alone = [ask(llm, [each], max_tokens=9)[0] for each in prompts]
        reports = last_reports(llm, len(prompts))
        assert preemptions(llm) == 0
        *together, said, again = ask(llm, [*prompts, *prompts, text, text], max_tokens=70)
        assert preemptions(llm) > 0
    for (video, settings), one, two, three in zip(
        asked, alone, together[:4], together[4:], strict=True
    ):
        equals_twin(twin, one, video, **settings)
        equals_twin(twin, two, video, **settings)
        assert three.difference(two) < CLOSE
    assert max(said.difference(spoken), again.difference(spoken)) < CLOSE
    assert [report["mode"] for report in reports] == ["sparse", "sparse", "dense", "sparse"]
    # 25 tokens a frame; the newline is none of them.
    assert [report["video_tokens"] for report in reports] == [600, 250, 600, 900]
    # One segment, so one token of each of its 25 places is left, though the share is 0.3.
    assert reports[3]["layers"][-1]["means"]["alive"] == pytest.approx(1 / 36)


def test_two_ranks_drop_what_one_does(llava, twin) -> None:
    """Each rank sees half of the heads; the score is the mean over all of them."""
    with engine(llava, SERVER, method="adatp", tensor_parallel_size=2) as ranks:
        settings = [{}, {"dedup": "off", "queries": "last"}]
        prompts = [prompt(clip(24), **each) for each in settings]
        for each, answer in zip(settings, ask(ranks, prompts, max_tokens=4), strict=True):
            equals_twin(twin, answer, clip(24), **each)
