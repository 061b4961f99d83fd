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


def test_answers_equal_the_twin_alone_and_together(llava, twin) -> None:
    asked = [
        (clip(24), {}),
        (clip(10, seed=2), {"dedup": "off"}),
        (clip(24), {"enabled": False}),
        (clip(36, seed=1), {"layers": [3], "keep": 0.3, "queries": "last", "tau_s": -1}),
    ]
    text = {"prompt": chat("Which number is shown on the card? " * 12)}
    prompts = [prompt(video, **settings) for video, settings in asked]
    with engine(llava, SERVER, method="adatp", max_num_batched_tokens=1024) as llm:
        alone = [ask(llm, [each], max_tokens=9)[0] for each in prompts]
        reports = last_reports(llm, len(prompts))
        together = ask(llm, [*prompts, text], max_tokens=9)
        spoken = ask(llm, [text], max_tokens=9)[0]
    for (video, settings), one, other in zip(asked, alone, together[:-1], strict=True):
        equals_twin(twin, one, video, **settings)
        equals_twin(twin, other, video, **settings)
    assert together[-1].difference(spoken) < CLOSE
    assert [report["mode"] for report in reports] == ["sparse", "sparse", "dense", "sparse"]
    # 25 tokens a frame; the newline is none of them.
    assert [report["video_tokens"] for report in reports] == [600, 250, 600, 900]
    # One segment, so one token of each of its 25 places is left, though the share is 0.3.
    assert reports[3]["layers"][-1]["means"]["alive"] == pytest.approx(1 / 36)
