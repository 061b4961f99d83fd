"""Training passes compute what is served: transformers against the engine; finetune.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from engine.engines import VIDEO, Answer, ask, chat, clip, engine, last_reports, video_prompt
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.training import VideoNSAForConditionalGeneration, enable_sparse_training

pytestmark = pytest.mark.engine

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.append(str(EXAMPLES / "needle"))
CLOSE = 1e-3  # of log-probabilities in float32
SETTINGS = {
    "dense, cube order": {"p_attn": 1.0, "p_ffn": 1.0},
    "dense, raster order": {"p_attn": 1.0, "p_ffn": 1.0, "order": "raster"},
    "sparse": {"p_attn": 0.5, "p_ffn": 0.5, "min_cubes": 1},
    "paper": {"p_attn": 0.5, "p_ffn": 0.5, "paper": True},
    "bypass": {"p_attn": 0.5, "p_ffn": 0.5, "min_cubes": 1, "compensation": "bypass"},
    "top_k": {"selection": "top_k", "keep": 0.3},
}


class Trained:
    """The checkpoint in transformers, sparse training on."""

    def __init__(self, checkpoint: Path, kind: type = Qwen2_5_VLForConditionalGeneration) -> None:
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.model = kind.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def logprobs(
        self, config: AdaSparkConfig | None, text: str, videos: list, answer: tuple[int, ...]
    ) -> torch.Tensor:
        """Log-probabilities ``[answer, vocab]``, all in one pass; VideoNSA takes no config."""
        if config is not None:
            enable_sparse_training(self.model, config)
        inputs = self.processor(
            text=[text],
            videos=[list(frames) for frames, _ in videos],
            video_metadata=[
                {key: value for key, value in metadata.items() if key != "do_sample_frames"}
                for _, metadata in videos
            ],
            do_sample_frames=False,
            return_tensors="pt",
        )
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer[:-1]]).long()], dim=1)
        rest = {key: inputs[key] for key in inputs if "video" in key or "second" in key}
        with torch.inference_mode():
            logits = self.model(input_ids=ids, **rest).logits[0, -len(answer) :]
        return logits.log_softmax(-1)


def compare(answer: Answer, expected: torch.Tensor, what: str) -> None:
    for step, (got, want) in enumerate(zip(answer.logprobs, expected, strict=True)):
        named = torch.tensor(list(got))
        difference = (want[named] - torch.tensor(list(got.values()))).abs().max()
        assert difference < CLOSE, f"{what}, token {step}: {difference}"


def test_training_pass_equals_the_engine(checkpoint) -> None:
    trained = Trained(checkpoint)
    server = AdaSparkConfig(dense_below=2)
    one, two = [clip(44, seed=7)], [clip(30, seed=2), clip(20, 112, 196, seed=3)]
    prompts = {"one video": (chat(VIDEO, "Which digit?"), one)}
    prompts["two videos"] = (chat("First: ", VIDEO, " Second: ", VIDEO, " Which?"), two)
    with engine(checkpoint, {"dense_below": 2}) as llm:
        for name, settings in SETTINGS.items():
            for which, (text, videos) in prompts.items():
                prompt = {
                    "prompt": text,
                    "multi_modal_data": {"video": videos},
                    "mm_processor_kwargs": {"adaspark": settings},
                }
                (answer,) = ask(llm, [prompt], max_tokens=4, logprobs=20)
                (report,) = last_reports(llm)
                config = server.override(settings)
                assert (report["flops_ratio"] < 1) == (config.sparse_attention or config.sparse_ffn)
                expected = trained.logprobs(config, text, videos, answer.ids)
                compare(answer, expected, f"{name}, {which}")


@pytest.fixture(scope="module")
def needle(tmp_path_factory) -> Path:
    """The needle checkpoint in float32, so that no rounding makes the choices differ."""
    folder = tmp_path_factory.mktemp("needle") / "checkpoint"
    source = EXAMPLES / "needle/checkpoint"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def needle_clip(frames: int, seed: int = 0):
    """(frames, metadata) of 112 x 112 pixels."""
    moving, metadata = clip(frames, 112, 112, seed=seed)
    return np.ascontiguousarray(moving), metadata


def test_training_pass_equals_the_engine_on_the_needle_model(needle) -> None:
    trained, video = Trained(needle), needle_clip(120)
    question = "Which digit is on the red card?"
    with engine(needle, {}) as llm:
        for name in ("dense, cube order", "sparse", "paper", "bypass", "top_k"):
            prompt = video_prompt(video, question=question, **SETTINGS[name])
            (answer,) = ask(llm, [prompt], max_tokens=2, logprobs=10)
            config = AdaSparkConfig().override(SETTINGS[name])
            expected = trained.logprobs(config, chat(VIDEO, question), [video], answer.ids)
            compare(answer, expected, name)


def test_the_shipped_videonsa_answers_as_it_was_trained() -> None:
    """Its log-probabilities are those of the training pass, and its answers are right."""
    from evaluate import held_out_video

    shipped = EXAMPLES / "needle/videonsa"
    assert sum(file.stat().st_size for file in shipped.iterdir()) < 16 * 2**20
    trained = Trained(shipped, VideoNSAForConditionalGeneration)
    videos = [held_out_video(number, 64 * (1 + number)) for number in range(2)]
    asked = [(video, question) for video in videos for question in video.asked]
    prompts = [
        video_prompt((video.frames, video.metadata), question=question.text)
        for video, question in asked
    ]
    ends = trained.processor.tokenizer.eos_token_id
    with engine(shipped, {}, method=None, architecture=None) as llm:
        answers = [ask(llm, [prompt], max_tokens=2, logprobs=10)[0] for prompt in prompts[::6]]
        (report,) = last_reports(llm)
        together = ask(llm, prompts, max_tokens=2, logprobs=10)
    assert report["flops"]["executed"]["slc"] > 0 and report["attention_density"] < 0.7
    for prompt, (video, _), answer in zip(prompts[::6], asked[::6], answers, strict=True):
        videos = [(video.frames, video.metadata)]
        compare(answer, trained.logprobs(None, prompt["prompt"], videos, answer.ids), "VideoNSA")
    said, right = trained.processor.tokenizer, 0
    for (_, question), answer in zip(asked, together, strict=True):
        right += said.decode(answer.ids[:1]).strip() == question.answer and answer.ids[1] == ends
    assert right >= 9, f"{right} of {len(asked)} right"


def test_finetune_makes_a_videonsa_of_the_needle_model(tmp_path) -> None:
    out = tmp_path / "nsa"
    common = ["--method", "videonsa", "--patches", 12, 14, "--questions", 2, "--videos", 1]
    printed = run_finetune(out, *common, "--block-counts", 3, "--window-size", 48, "--steps", 2)
    assert "'block_counts': 3, 'window_size': 48" in printed
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["VideoNSAForConditionalGeneration"]
    assert config["text_config"]["block_counts"] == 3 and "adaspark_config" not in config
    weights = load_file(out / "model.safetensors")
    assert weights["model.layers.5.self_attn.g_proj_1.weight"].dtype == torch.bfloat16
    rates = torch.load(out / "training.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["highest"] for group in rates] == [2e-4, 3e-3]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "finetune.py"), "x", "--window-size", "3"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "--window-size means nothing to --method adaspark" in done.stderr


def run_finetune(folder: Path, *options: object) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "finetune.py"), str(folder), *map(str, options)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_finetune_goes_on_and_is_served_as_it_was_trained(tmp_path) -> None:
    """The example on your own data: three steps, stopped after two, then served by the plugin."""
    import footage
    import scenes

    scene = scenes.make(scenes.TRAINING_SEEDS[7], 24)
    footage.write_mp4(footage.frames(scene), tmp_path / "clip.mp4")
    entries = [
        {"video": "clip.mp4", "question": question.text, "answer": question.answer}
        for question in scenes.questions(scene)[:3]
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, entries)))
    settings = {"p_attn": 0.4, "p_ffn": 0.3, "compensation": "mean", "dense_below": 1}
    common = ["--data", data, "--settings", json.dumps(settings), "--questions", 2]
    common += ["--average", 0.5]
    out = tmp_path / "tuned"
    first = run_finetune(out, *common, "--steps", 2, "--lr", 1e-3)
    assert "step 2 of 2" in first
    before = load_file(out / "model.safetensors")
    state = torch.load(out / "training.pt", weights_only=True)
    head = before["lm_head.weight"]
    assert torch.equal(head, state["averages"][-1].to(head)), "the average is what is written"
    assert not torch.equal(head, state["model"]["lm_head.weight"].to(head))
    second = run_finetune(out, *common, "--steps", 3, "--lr", 1e-3)
    assert "goes on after step 2" in second and "step 3 of 3" in second
    after = load_file(out / "model.safetensors")
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and not any("visual" in name for name in changed), "vision stays as it is"

    saved = json.loads((out / "config.json").read_text())
    assert settings.items() <= saved["adaspark_config"].items()
    with engine(out, {"p_ffn": 0.35}, dtype="auto") as llm:  # the operator's word counts
        frames = footage.read_mp4(tmp_path / "clip.mp4")
        metadata = needle_clip(2)[1] | {
            "total_num_frames": len(frames),
            "duration": len(frames) / 2,
            "frames_indices": list(range(len(frames))),
        }
        prompt = video_prompt((frames, metadata), question=entries[0]["question"])
        ask(llm, [prompt])
        (report,) = last_reports(llm)
    named = report["settings"]
    assert {key: named[key] for key in ("p_attn", "p_ffn", "compensation")} == {
        "p_attn": 0.4,
        "p_ffn": 0.35,
        "compensation": "mean",
    }
    assert report["ffn_density"] < 0.6
