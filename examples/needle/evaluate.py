"""Measure a checkpoint on held-out videos: accuracy per skill, length and haystack.

    python examples/needle/evaluate.py examples/needle/checkpoint
    python examples/needle/evaluate.py examples/needle/checkpoint --engine vllm --patches 64 256

Every video is drawn, written to a real mp4 file and read back. One question per skill is asked of
each. `--engine torch` runs the training code's forward pass in bf16; `--engine vllm` runs vLLM in
this process, greedily; `--engine sparse` runs what vllm_adaspark.training computes of a fine-tuned
checkpoint. A temporal patch of 112×112 pixels has 16 tokens.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import batches
import footage
import forward
import haystack
import numpy as np
import scenes
import scoring
import torch

PROMPT = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>{}<|im_end|>\n"
PROMPT += "<|im_start|>assistant\n"
FIRST_VIDEO = 1000  # of HELD_OUT_SEEDS; training's own reports use those before


@dataclass(frozen=True)
class Video:
    """A scene as it comes out of its file, with one question per skill."""

    scene: scenes.Scene
    frames: np.ndarray  # RGB uint8 [2 × patches, height, width, 3]
    asked: list[scenes.Question]

    @property
    def metadata(self) -> dict:
        """As vLLM's video loader gives it."""
        count = len(self.frames)
        return {
            "fps": footage.FPS,
            "duration": count / footage.FPS,
            "total_num_frames": count,
            "frames_indices": list(range(count)),
            "video_backend": "opencv",
            "do_sample_frames": False,
        }


def held_out_video(number: int, patches: int, size=(112, 112), motion: str = "calm") -> Video:
    """The `number`-th video of the held-out set at this length."""
    seed = scenes.HELD_OUT_SEEDS[FIRST_VIDEO + number]
    scene = scenes.make(seed, patches, size, motion)
    rng = np.random.default_rng((seed, 3))
    return Video(scene, footage.through_codec(footage.frames(scene)), one_of_each(rng, scene))


def one_of_each(rng, scene: scenes.Scene) -> list[scenes.Question]:
    """One question of each skill the scene has."""
    asked = scenes.questions(scene)
    by_skill = {skill: [q for q in asked if q.skill == skill] for skill in scenes.SKILLS}
    return [batches.one_of(rng, questions) for questions in by_skill.values() if questions]


class Torch:
    """Answers by the training code's forward pass."""

    def __init__(self, checkpoint: Path):
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

        self._model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32
        )
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.words = batches.Words(self._tokenizer)

    @torch.no_grad()
    def answers(self, video: Video, ablation: str = "none") -> list[str]:
        grid = (video.scene.size[0] // 28, video.scene.size[1] // 28)
        patches = forward.pixels(video.frames).bfloat16()
        tokens = torch.cat([forward.vision(self._model, part, grid) for part in patches.split(64)])
        batch = batches.of_video(self._model, self.words, grid, tokens, video.scene, video.asked)
        said = scoring.logits(self._model, batch, **scoring.masks(batch, ablation))[0]
        return [self._tokenizer.decode([token]) for token in said[0, :, 0].argmax(-1).tolist()]


class Sparse:
    """Answers by a fine-tuned checkpoint's own forward pass, in transformers.

    VideoNSA's has an ablation for each branch: the gates of that branch are 1, the others' 0.
    """

    def __init__(self, checkpoint: Path):
        from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

        from vllm_adaspark.training import (
            VideoNSAForConditionalGeneration,
            enable_sparse_training,
        )

        self._processor = AutoProcessor.from_pretrained(checkpoint)
        config = json.loads((checkpoint / "config.json").read_text())
        videonsa = VideoNSAForConditionalGeneration.__name__ in config["architectures"]
        kind = VideoNSAForConditionalGeneration if videonsa else Qwen2_5_VLForConditionalGeneration
        model = kind.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._model = model if videonsa else enable_sparse_training(model)
        self._weights = {name: weight.clone() for name, weight in model.state_dict().items()}

    @torch.no_grad()
    def answers(self, video: Video, ablation: str = "none") -> list[str]:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        from vllm_adaspark.training.videonsa import force_gates

        self._model.load_state_dict(self._weights)
        if ablation != "none":
            force_gates(self._model, [ablation])
        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"
        medium = self._processor(
            text=[PROMPT.format("")],
            videos=[list(video.frames)],
            video_metadata=[{k: v for k, v in video.metadata.items() if k != "do_sample_frames"}],
            do_sample_frames=False,
            return_tensors="pt",
        )
        grid, seconds = medium["video_grid_thw"], list(medium["second_per_grid_ts"])
        (encoded,) = self._model.get_video_features(
            medium["pixel_values_videos"], grid
        ).pooler_output
        pad = self._processor.video_token
        prompts = [PROMPT.format(q.text).replace(pad, pad * len(encoded)) for q in video.asked]
        asked = tokenizer(prompts, padding=True, return_tensors="pt")
        rows = len(prompts)
        logits = self._model(
            input_ids=asked["input_ids"],
            attention_mask=asked["attention_mask"],
            video_grid_thw=grid.expand(rows, -1),
            second_per_grid_ts=seconds * rows,
            mm_encoder_outputs={
                "video": BaseModelOutputWithPooling(pooler_output=(encoded,) * rows)
            },
            logits_to_keep=1,
        ).logits
        return [tokenizer.decode([token]) for token in logits[:, -1].argmax(-1).tolist()]


class VLLM:
    """Answers by stock vLLM, in this process."""

    def __init__(self, checkpoint: Path):
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM, SamplingParams

        self._sampling = SamplingParams(max_tokens=4, temperature=0)
        self._llm = LLM(
            str(checkpoint),
            enforce_eager=True,
            block_size=64,
            max_model_len=20480,
            max_num_batched_tokens=20480,
            max_num_seqs=8,
            limit_mm_per_prompt={"video": 1, "image": 0},
            skip_mm_profiling=True,
            distributed_executor_backend="uni",
        )

    def answers(self, video: Video, ablation: str = "none") -> list[str]:
        if ablation != "none":
            raise ValueError(f"ablation={ablation!r}: needs --engine torch")
        medium = {"video": [(video.frames, video.metadata)]}
        prompts = [
            {"prompt": PROMPT.format(question.text), "multi_modal_data": medium}
            for question in video.asked
        ]
        # The first alone, so that the others find the video in the prefix cache.
        outputs = self._llm.generate(prompts[:1], self._sampling, use_tqdm=False)
        outputs += self._llm.generate(prompts[1:], self._sampling, use_tqdm=False)
        return [output.outputs[0].text.strip() for output in outputs]


ENGINES = {"torch": Torch, "sparse": Sparse, "vllm": VLLM}
BRANCHES = ("cmp", "slc", "swa")  # ablations of VideoNSA, with --engine sparse


def measure(engine, patches: int, videos: int, motion: str, size, ablation: str) -> list[dict]:
    """One row per question asked."""
    rows = []
    for number in range(videos):
        video = held_out_video(number, patches, size, motion)
        said = engine.answers(video, ablation)
        for question, answer in zip(video.asked, said, strict=True):
            rows.append(
                {
                    "skill": question.skill,
                    "motion": motion,
                    "ablation": ablation,
                    "size": list(size),
                    "tokens": patches * size[0] * size[1] // 28**2,
                    "depth": round(question.needles[-1] / patches, 3),
                    "answer": answer,
                    "right": answer == question.answer,
                }
            )
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: a line per setting, a column per skill, accuracy and number of questions."""
    lines = ["| haystack | frame | video tokens | ablation | " + " | ".join(scenes.SKILLS) + " |"]
    lines.append("|---" * (4 + len(scenes.SKILLS)) + "|")
    for setting in dict.fromkeys(_setting(row) for row in rows):
        cells = []
        for skill in scenes.SKILLS:
            right = [r["right"] for r in rows if _setting(r) == setting and r["skill"] == skill]
            cells.append(f"{sum(right) / len(right):.3f} ({len(right)})" if right else "–")
        lines.append("| " + " | ".join((*setting, *cells)) + " |")
    return "\n".join(lines)


def _setting(row: dict) -> tuple[str, ...]:
    height, width = row["size"]
    return row["motion"], f"{width}×{height}", str(row["tokens"]), row["ablation"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--engine", choices=ENGINES, default="torch")
    parser.add_argument("--patches", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--videos", type=int, default=16, help="per length and haystack")
    parser.add_argument("--motion", nargs="+", choices=haystack.MOTIONS, default=haystack.MOTIONS)
    parser.add_argument("--size", type=int, nargs=2, default=(112, 112), help="height and width")
    parser.add_argument(
        "--ablation", nargs="+", choices=(*scoring.ABLATIONS, *BRANCHES), default=["none"]
    )
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    arguments = parser.parse_args()
    engine = ENGINES[arguments.engine](arguments.checkpoint)
    rows: list[dict] = []
    for patches in arguments.patches:
        for motion in arguments.motion:
            for ablation in arguments.ablation:
                start = time.monotonic()
                size = tuple(arguments.size)
                rows += measure(engine, patches, arguments.videos, motion, size, ablation)
                seconds = time.monotonic() - start
                print(f"{patches} patches, {motion}, {ablation}: {seconds:.0f} s", flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
