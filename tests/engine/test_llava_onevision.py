"""LLaVA-OneVision in the real engine: against stock vLLM, its naive twin, and itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_llava
import torch
import video as demo_video  # examples/demo
from vllm import EngineArgs

from engine.engines import (
    IMAGE,
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
from engine.test_scheduling import preemptions
from engine.twin import LlavaTwin
from vllm_adaspark import ARCHITECTURE, LLAVA_ARCHITECTURE
from vllm_adaspark.cli import main
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig

pytestmark = pytest.mark.engine
CLOSE = 1e-3  # of log-probabilities in float32
FRAME = 25  # tokens
DENSE = {"p_attn": 1.0, "p_ffn": 1.0}


def as_llava(prompt: dict, settings: dict | str | None = None) -> dict:
    """A prompt with the model's own placeholders; ``settings`` are the request's."""
    text = prompt["prompt"].replace(VIDEO, tiny_llava.VIDEO).replace(IMAGE, tiny_llava.IMAGE)
    asked = {"mm_processor_kwargs": {"adaspark": settings}} if settings is not None else {}
    return prompt | {"prompt": text} | asked


def prompts(settings: dict | str | None = None) -> dict[str, dict]:
    """As the other model's, but of the two videos one has as many frames as the other.

    vLLM 0.32.0's own model ends the engine where they differ; ours takes them (``uneven``).
    """
    asked = {name: as_llava(prompt, settings) for name, prompt in five_prompts().items()}
    asked["two videos"]["multi_modal_data"] = {
        "video": [clip(18, seed=2), clip(18, 112, 196, seed=3)]
    }
    return asked


def uneven() -> dict:
    return as_llava(five_prompts()["two videos"])


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiny_llava.build(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def stock(llava) -> dict[str, Answer]:
    """Stock LLaVA-OneVision's answers, each prompt alone."""
    with engine(llava, None) as llm:
        return {name: ask(llm, [prompt])[0] for name, prompt in prompts().items()}


@pytest.fixture(scope="module")
def alone(llava, stock) -> dict[str, Answer]:
    """One sparse engine, asked about all that needs no other; its answers to each prompt alone."""
    with engine(llava, SPARSE) as llm:
        asked = prompts() | {"uneven": uneven()}
        alone = {name: ask(llm, [prompt])[0] for name, prompt in asked.items()}
        (report,) = last_reports(llm)
        assert report["video_tokens"] == (16 + 20) * FRAME
        off_equals_stock(llm, stock)
        equals_twin(llava, llm)
        together = ask(llm, list(asked.values()))
        for (name, want), got in zip(alone.items(), together, strict=True):
            assert got.difference(want) < CLOSE, name
        prefix_hit_equals_cold(llm)
        vision_in_pieces_equals_stock(llm)
        frames_are_shown_as_sent(llm)
    return alone


def off_equals_stock(llm, stock) -> None:
    """Off, and p = 1 in raster order, which goes through our layers and positions."""
    for settings in ("off", DENSE | {"order": "raster"}):
        for name, prompt in prompts(settings).items():
            assert ask(llm, [prompt])[0].difference(stock[name]) < CLOSE, (settings, name)


def equals_twin(llava, llm) -> None:
    """Prompt and decode; at p = 1 in cube order what is compared is where the tokens stand."""
    video = clip(44, seed=7)
    for settings in ({}, DENSE, {"selection": "top_k", "keep": 0.3}):
        prompt = as_llava(video_prompt(video, question="Which digit?"), settings)
        answer = ask(llm, [prompt], max_tokens=4, logprobs=20)[0]
        (report,) = last_reports(llm)
        assert report["video_tokens"] == 44 * FRAME, "the newline is no video"
        twin = LlavaTwin(llava, AdaSparkConfig().override(SPARSE).override(settings))
        text = chat(tiny_llava.VIDEO, "Which digit?")
        expected = twin.logprobs(text, video, list(answer.ids))
        for step, (got, want) in enumerate(zip(answer.logprobs, expected, strict=True)):
            named = torch.tensor(list(got))
            difference = (want[named] - torch.tensor(list(got.values()))).abs().max()
            assert difference < CLOSE, f"{settings}, step {step}: {difference}"


def prefix_hit_equals_cold(llm) -> None:
    prompt = as_llava(video_prompt(clip(40, seed=11), question="What moves?"))
    cold, hit = ask(llm, [prompt])[0], ask(llm, [prompt])[0]
    assert cold.cached_tokens == 0 and hit.cached_tokens >= 64 * 8
    assert hit.difference(cold) < CLOSE


def vision_in_pieces_equals_stock(llm) -> None:
    ((stock, pieces, sizes),) = llm.apply_model(encode_whole_and_in_pieces)
    torch.testing.assert_close(pieces, stock, rtol=1e-4, atol=1e-5)
    assert len(sizes) > 2 and max(sizes) <= 300 // 81, "memory is bounded by the piece"


def encode_whole_and_in_pieces(model) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """A video through stock's vision path and ours; frames of each of our pieces."""
    from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration

    frames = torch.randn(7, 3, 126, 126, generator=torch.Generator().manual_seed(0))
    stock_path = LlavaOnevisionForConditionalGeneration._process_video_pixels
    method, sizes = model.runtime.method, []
    hook = model.vision_tower.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    settings = method.settings
    with torch.inference_mode():
        (whole,) = stock_path(model, {"pixel_values_videos": frames[None]})
        sizes.clear()
        method.settings = settings.override({"encoder_patches": 300})
        pieces = model._encode_in_pieces(frames)
    method.settings = settings
    hook.remove()
    return whole, pieces, sizes


def frames_are_shown_as_sent(llm) -> None:
    """The viewer's pictures: every frame, squeezed to the size that the model saw."""
    import cv2

    frames, _ = clip(6, seed=21)
    ask(llm, [as_llava(video_prompt(clip(6, seed=21)), {"trace": True})])
    ((summary, *_),) = llm.collective_rpc("adaspark_traces")
    (meta,) = llm.collective_rpc("adaspark_trace", args=(summary["id"],))
    (video,) = meta["videos"]
    assert video["grid"] == [6, 5, 5] and video["seconds_per_frame"] is None
    for index, sent in enumerate(frames):
        (jpeg,) = llm.collective_rpc("adaspark_trace", args=(summary["id"], "frame", 0, index))
        shown = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        assert shown.shape == (126, 126, 3)
        assert np.abs(shown.astype(int) - cv2.resize(sent, (126, 126))).mean() < 8


def test_text_and_images_are_the_stock_models_and_videos_are_not(alone, stock) -> None:
    for name in ("text only", "image"):
        assert alone[name].difference(stock[name]) < CLOSE, name
    assert alone["long video"].difference(stock["long video"]) > CLOSE


def test_chunks_and_preemption_change_nothing(llava, alone) -> None:
    """A prompt in two chunks; and too few KV blocks for all answers, so that some are preempted.

    A request that is computed again gets its positions anew.
    """
    options = {"max_num_scheduled_tokens": 21 * 64, "enable_prefix_caching": False}
    options |= {"num_gpu_blocks_override": 27, "max_model_len": 1600, "disable_log_stats": False}
    with engine(llava, SPARSE, **options) as llm:
        for name, prompt in prompts().items():
            assert ask(llm, [prompt])[0].difference(alone[name]) < CLOSE, name
        # Five prompts of five blocks each are computed in one step; their answers need a sixth.
        asked = [as_llava(video_prompt(clip(10, seed=20 + i))) for i in range(5)]
        one_by_one = [ask(llm, [prompt], max_tokens=90)[0] for prompt in asked]
        assert preemptions(llm) == 0
        together = ask(llm, asked, max_tokens=90)
        assert preemptions(llm) > 0
        for got, want in zip(together, one_by_one, strict=True):
            assert got.difference(want) < CLOSE


@pytest.mark.parametrize(
    "options, words",
    [
        ({"hf_overrides": {"architectures": [ARCHITECTURE]}}, f"must be ['{LLAVA_ARCHITECTURE}']"),
        ({"mm_processor_kwargs": {"size": {"height": 9}}}, '--mm-processor-kwargs {"size"'),
        ({"block_size": 128}, "--block-size 128 does not match cube=[4, 4, 4]"),
        ({"media_io_kwargs": {"video": {"max_frames": 9}}}, "max_frames=9: unknown; allowed: num"),
    ],
)
def test_a_server_that_cannot_work_is_refused(llava, options, words) -> None:
    ours = {"hf_overrides": {"architectures": [LLAVA_ARCHITECTURE]}}
    with pytest.raises(ValueError) as refused:
        EngineArgs(model=str(llava), **ours | options).create_engine_config()
    assert words in str(refused.value)


def test_inspect_and_ask(llava, tmp_path, capsys, monkeypatch) -> None:
    """Neither is told which model it is, and what the one foretells is what the other counts."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    video = demo_video.write_mp4(tmp_path / "clip.mp4", seconds=10, fps=8, width=168, height=140)
    about = ["--model", str(llava), "--max-frames", "40", "--p", "0.5", "--dense-below", "2"]
    assert main(["inspect", str(video), *about, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cost"]["grid"] == [40, 5, 5] and told["cost"]["resized"] == [126, 126]
    assert '--media-io-kwargs \'{"video": {"num_frames": 40}}\'' in told["flags"]
    started = ["--enforce-eager", "--dtype", "float32", "--gpu-memory-utilization", "0.3"]
    asked = ["ask", str(video), "What moves?", *about, *started, "--max-tokens", "4", "--json"]
    assert main([*asked, "--picture", str(tmp_path / "heat.png")]) == 0
    out = capsys.readouterr().out
    (run,) = json.loads(out[out.index("{") :])["runs"].values()
    assert run["account"]["video_tokens"] == told["cost"]["video_tokens"] == 40 * FRAME
    assert run["account"]["mode"] == "sparse" and run["account"]["flops_ratio"] < 1
    assert (tmp_path / "heat.png").stat().st_size > 1000
