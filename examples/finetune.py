"""Fine-tune a Qwen2.5-VL with sparsity on, and write a checkpoint that serves with it.

    python examples/finetune.py .finetune/needle --settings '{"paper": true, "p_ffn": 0.3}'
    python examples/finetune.py .finetune/nsa --method videonsa --block-counts 8 --window-size 128
    python examples/finetune.py tuned --model Qwen/Qwen2.5-VL-7B-Instruct --data mine.jsonl --bf16

Without --data it trains the needle model (examples/needle) on its made-up videos.  With it, on your
own: one JSON object {"video": path, "question": ..., "answer": ...} a line.  Started again with the
same folder, it goes on where it was stopped.  The folder is a Hugging Face checkpoint whose
config.json says how it was trained ("adaspark_config", or VideoNSA's architecture): the plugin
serves it so by default.

A step computes one video once and all its questions with it.  The loss is on the answers.  The
vision tower stays as it is unless --train-vision.  docs/finetuning.md says more.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from finetune_data import NEEDLE, Clip, JsonLines, NeedleVideos
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vllm_adaspark.methods.adaspark.settings import COMPENSATIONS, SELECTIONS, AdaSparkConfig
from vllm_adaspark.training import VideoNSAForConditionalGeneration, enable_sparse_training
from vllm_adaspark.training.enable import checkpoint_settings
from vllm_adaspark.training.videonsa import gate_parameters

STATE = "training.pt"  # in the folder: what is needed to go on
WARM_UP = 20  # steps
ADASPARK_FLAGS = ("settings", "p_attn", "p_ffn", "compensation", "selection")
VIDEONSA_FLAGS = ("block_counts", "window_size")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write, and to go on from")
    parser.add_argument("--model", default=str(NEEDLE / "checkpoint"), help="folder or hub name")
    parser.add_argument("--data", type=Path, help="JSON lines (default: needle videos)")
    parser.add_argument("--method", choices=("adaspark", "videonsa"), default="adaspark")
    parser.add_argument("--block-counts", type=int, help="blocks of 64 tokens selected, VideoNSA")
    parser.add_argument("--window-size", type=int, help="tokens of the window, VideoNSA")
    parser.add_argument("--gate-lr", type=float, default=3e-3, help="of the gates, VideoNSA")
    parser.add_argument("--settings", type=json.loads, default={}, help="AdaSpark's, as JSON")
    parser.add_argument("--p-attn", type=float)
    parser.add_argument("--p-ffn", type=float)
    parser.add_argument("--compensation", choices=COMPENSATIONS)
    parser.add_argument("--selection", choices=SELECTIONS)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--lr", type=float, default=2e-4, help="highest learning rate")
    parser.add_argument("--videos", type=int, default=3, help="per step")
    parser.add_argument("--questions", type=int, default=24, help="per video, at most")
    parser.add_argument("--skip", type=int, default=0, help="videos of the data: another run's")
    parser.add_argument("--patches", type=int, nargs=2, default=(24, 128), help="needle videos")
    parser.add_argument("--fps", type=float, default=2.0, help="frames taken a second, --data")
    parser.add_argument("--max-frames", type=int, default=768, help="of a video, --data")
    parser.add_argument(
        "--average",
        type=float,
        default=0.0,
        help="share of a running average of the weights that "
        "stays, each step, as 0.99; it is what is written. Steadier with few videos a step",
    )
    parser.add_argument("--train-vision", action="store_true", help="train the vision tower too")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--bf16", action="store_true", help="activations in bfloat16")
    parser.add_argument("--save-every", type=int, default=20, help="steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    others = ADASPARK_FLAGS if arguments.method == "videonsa" else VIDEONSA_FLAGS
    for key in others:
        if getattr(arguments, key) not in (None, {}):
            flag = "--" + key.replace("_", "-")
            parser.error(f"{flag} means nothing to --method {arguments.method}; leave it out")
    return arguments


def load(arguments: argparse.Namespace) -> tuple[Qwen2_5_VLForConditionalGeneration, dict]:
    """The model, which computes as it will be served, and what says so: numbers and words."""
    # Weights are trained in float32: small steps are lost on bfloat16 ones.
    if arguments.method == "videonsa":
        torch.manual_seed(0)  # of gates that have no weights yet
        model = VideoNSAForConditionalGeneration.from_pretrained(
            arguments.model,
            dtype=torch.float32,
            block_counts=arguments.block_counts,
            window_size=arguments.window_size,
        )
        text = model.config.text_config
        settings = {key: getattr(text, key) for key in VIDEONSA_FLAGS}
        return model, {"method": "videonsa", **settings}
    config = settings_of(arguments)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32)
    return enable_sparse_training(model, config), checkpoint_settings(config)


def settings_of(arguments: argparse.Namespace) -> AdaSparkConfig:
    """AdaSpark's: the flags over --settings over the defaults."""
    flags = {key: getattr(arguments, key) for key in ADASPARK_FLAGS if key != "settings"}
    named = {key: value for key, value in flags.items() if value is not None}
    config = AdaSparkConfig().override(arguments.settings, source="--settings")
    return config.override(named, source="flags")


class Finetuning:
    """The model, its optimizer and how far it has come."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.step = arguments, 0
        self.cpu_seconds = 0.0  # of all threads and runs, for benchmarks/finetune.py
        self.processor = AutoProcessor.from_pretrained(arguments.model)
        self.written_as = getattr(torch, _dtype(arguments.model))
        model, self.settings = load(arguments)
        self.model = model.to(arguments.device).train()
        self.model.model.visual.requires_grad_(arguments.train_vision)
        if arguments.checkpointing:
            self.model.gradient_checkpointing_enable()
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self._groups(), lr=0.0, weight_decay=0.01)
        self.averages = [weight.detach().clone() for weight in self.weights if arguments.average]
        path = arguments.out / STATE
        if path.exists():
            state = torch.load(path, map_location=arguments.device, weights_only=True)
            if state["settings"] != self.settings:
                raise SystemExit(
                    f"{path} was trained with {state['settings']}; use the same settings to go on, "
                    "or another folder"
                )
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.averages = state["averages"]
            self.step, self.cpu_seconds = state["step"], state["cpu_seconds"]
            print(f"goes on after step {self.step}", flush=True)

    def _groups(self) -> list[dict]:
        """Groups of the optimizer: VideoNSA's gates hardly move at the other weights' rate."""
        gates = gate_parameters(self.model) if self.arguments.method == "videonsa" else []
        known = {id(weight) for weight in gates}
        body = [weight for weight in self.weights if id(weight) not in known]
        groups = [{"params": body, "highest": self.arguments.lr}]
        return groups + ([{"params": gates, "highest": self.arguments.gate_lr}] if gates else [])

    def save(self) -> None:
        """What is needed to go on."""
        self.arguments.out.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averages": self.averages,
            "step": self.step,
            "cpu_seconds": self.cpu_seconds,
        }
        torch.save(state, self.arguments.out / STATE)

    def export(self) -> None:
        """The checkpoint, in the dtype of the one it came from; the training ends with it."""
        with torch.no_grad():
            for weight, average in zip(self.weights, self.averages):
                weight.copy_(average)
        config = self.model.config
        config.text_config.dtype = config.vision_config.dtype = self.written_as
        self.model.to(self.written_as).save_pretrained(self.arguments.out)
        self.processor.save_pretrained(self.arguments.out)

    def train_step(self, clips: list[Clip]) -> tuple[float, int, int]:
        """One step of the optimizer: its loss, and how many of how many answers were right."""
        began = time.process_time()
        share = min(1.0, (self.step + 1) / WARM_UP)
        share *= 0.5 + 0.5 * math.cos(math.pi * self.step / self.arguments.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = share * group["highest"]
        self.optimizer.zero_grad()
        total, right, asked = 0.0, 0, 0
        for clip in clips:
            loss, correct = self.loss(clip)
            (loss / len(clips)).backward()
            total += loss.item() / len(clips)
            right, asked = right + correct, asked + len(clip.questions)
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.step += 1
        if self.averages:
            # At first the steps made so far weigh alike.
            stays = min(self.arguments.average, self.step / (self.step + 9))
            torch._foreach_lerp_(self.averages, [w.detach() for w in self.weights], 1 - stays)
        self.cpu_seconds += time.process_time() - began
        return total, right, asked

    def loss(self, clip: Clip) -> tuple[torch.Tensor, int]:
        """Cross-entropy of the answers' tokens, and how many answers are right in full."""
        texts = [self._prompt(question) for question, _ in clip.questions]
        video = self.processor(
            text=texts[:1],
            videos=[list(clip.frames)],
            video_metadata=[{k: v for k, v in clip.metadata.items() if k != "do_sample_frames"}],
            do_sample_frames=False,
            return_tensors="pt",
        ).to(self.arguments.device)
        rows = len(texts)
        with torch.autocast(self.arguments.device, torch.bfloat16, enabled=self.arguments.bf16):
            # Encoded once for all questions, which share what follows from it.
            with torch.set_grad_enabled(self.arguments.train_vision):
                (encoded,) = self.model.get_video_features(
                    video["pixel_values_videos"], video["video_grid_thw"]
                ).pooler_output
            answers = [answer for _, answer in clip.questions]
            ids, mask, targets = self._tokens(texts, answers, len(encoded))
            longest = int((targets != -100).sum(1).max())
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                video_grid_thw=video["video_grid_thw"].expand(rows, -1),
                second_per_grid_ts=list(video["second_per_grid_ts"]) * rows,
                mm_encoder_outputs={
                    "video": BaseModelOutputWithPooling(pooler_output=(encoded,) * rows)
                },
                logits_to_keep=longest + 1,
            ).logits[:, :-1]
        targets = targets[:, -longest:]
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)
        hit = (logits.argmax(-1) == targets) | (targets == -100)
        return loss, int(hit.all(1).sum())

    def _prompt(self, question: str) -> str:
        content = [{"type": "video"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def _tokens(self, texts: list[str], answers: list[str], video_tokens: int):
        """Ids, padding mask and targets ``[rows, n]``, padded on the left: the answers end alike.

        Targets are the answers' tokens and the end token, -100 elsewhere.
        """
        tokenizer, video = self.processor.tokenizer, self.processor.video_token
        rows = []
        for text, answer in zip(texts, answers, strict=True):
            prompt = tokenizer(text.replace(video, video * video_tokens)).input_ids
            said = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            rows.append((prompt, said))
        longest = max(len(prompt) + len(said) for prompt, said in rows)
        ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
        mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, (prompt, said) in enumerate(rows):
            ids[row, longest - len(prompt) - len(said) :] = torch.tensor(prompt + said)
            mask[row, longest - len(prompt) - len(said) :] = 1
            targets[row, -len(said) :] = torch.tensor(said)
        return (part.to(self.arguments.device) for part in (ids, mask, targets))


def _dtype(model: str) -> str:
    """The dtype a checkpoint's weights are written in."""
    from transformers import AutoConfig

    return str(AutoConfig.from_pretrained(model).dtype or "bfloat16").removeprefix("torch.")


def main() -> None:
    arguments = parse()
    if arguments.data is None:
        data = NeedleVideos(tuple(arguments.patches), arguments.questions)
    else:
        data = JsonLines(arguments.data, arguments.questions, arguments.fps, arguments.max_frames)
    training = Finetuning(arguments)
    print(f"settings: {training.settings}", flush=True)
    began, first = time.monotonic(), training.step
    losses, right, asked = [], 0, 0
    while training.step < arguments.steps:
        first_of_step = arguments.skip + training.step * arguments.videos
        numbers = range(first_of_step, first_of_step + arguments.videos)
        loss, correct, of = training.train_step([data.clip(number) for number in numbers])
        losses, right, asked = [*losses, loss], right + correct, asked + of
        if training.step % 10 == 0 or training.step == arguments.steps:
            seconds = time.monotonic() - began
            left = seconds / (training.step - first) * (arguments.steps - training.step)
            print(
                f"step {training.step} of {arguments.steps}  loss {sum(losses) / len(losses):.3f}  "
                f"right {right}/{asked}  {seconds:.0f} s, {left:.0f} s left",
                flush=True,
            )
            losses, right, asked = [], 0, 0
        if training.step % arguments.save_every == 0:
            training.save()
    training.save()
    training.export()
    print(f"{arguments.out}: serves with the settings it was trained with")


if __name__ == "__main__":
    main()
