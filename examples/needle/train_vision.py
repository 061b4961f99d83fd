"""Stage A: teach the vision tower alone what is on a picture.

Linear heads on every video token tell what the token's picture holds: the colour and digit of a
number card, the two colours of a frame, the figure of a sign, or nothing. Digits are the hard part
and are learned only along a curriculum: one font in the middle in white first, then moved about, in
all fonts and both inks, at last on frames of other shapes, with many letters and through a video
codec: to take a letter for a digit spoils every count. About ten minutes on two cores.

    python examples/needle/train_vision.py .needle/vision.pt
"""

import argparse
import math
import time
from pathlib import Path

import cards
import cv2
import footage
import forward
import haystack
import network
import numpy as np
import torch
import torch.nn.functional as F
from scenes import TRAINING_SEEDS
from transformers import Qwen2_5_VLForConditionalGeneration

# Merged tokens of a frame, height × width. The first is where most training happens.
GRIDS = ((4, 4), (3, 5), (5, 3), (4, 6), (6, 4), (5, 5))
# What a token's picture may hold, with the number of classes; the last class is "no such thing".
LABELS = {"colour": 9, "digit": 11, "border": 9, "named": 9, "sign": 5}
FIRST_SEED = 50_000_000  # of TRAINING_SEEDS; scenes and banks use others
PATCHES = 96  # of a 4×4 grid in a batch
# Shares of number cards, frames, signs and distractors in a batch; the rest is haystack.
USUAL, LETTERS = (1 / 2, 1 / 10, 1 / 12, 1 / 6), (2 / 5, 1 / 12, 1 / 16, 1 / 3)
HEADS_FIRST = 100  # steps that train new heads on a tower that is trained further


def squeeze(rng, frames: np.ndarray) -> np.ndarray:
    """Lossy compression of two frames in three tenths of the cases, as a video file brings it."""
    if rng.random() > 0.3:
        return frames
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(25, 96))]
    return np.stack([cv2.imdecode(cv2.imencode(".jpg", one, quality)[1], 1) for one in frames])


def batch(rng, size, count: int, difficulty: cards.Difficulty, shares=USUAL):
    """Pictures of all kinds with their labels: frames and a dict of int64 [count]."""
    frames, labels = [], {name: [] for name in LABELS}
    numbers, borders, signs, distractors = (round(share * count) for share in shares)

    def add(picture, **known):
        frames.append(
            squeeze(rng, picture if picture.ndim == 4 else haystack.flicker(rng, picture))
        )
        for name, classes in LABELS.items():
            labels[name].append(known.get(name, classes - 1))

    def colour() -> int:
        return int(rng.integers(len(cards.COLOUR_NAMES)))

    for _ in range(numbers):
        ground, digit = colour(), int(rng.integers(10))
        add(cards.number_card(rng, size, ground, digit, difficulty), colour=ground, digit=digit)
    for _ in range(borders):
        border, named = colour(), colour()
        add(cards.frame(rng, size, border, named), border=border, named=named)
    for _ in range(signs):
        figure = int(rng.integers(len(cards.SIGNS)))
        add(cards.sign(rng, size, figure), sign=figure)
    for _ in range(distractors):
        add(cards.distractor(rng, size, difficulty))
    while len(frames) < count:
        motion = haystack.MOTIONS[int(rng.integers(2))]
        for pair in haystack.clip(rng, size, 2, motion).reshape(2, 2, *size, 3):
            add(pair)
    labels = {name: torch.tensor(values[:count]) for name, values in labels.items()}
    return np.concatenate(frames[:count]), labels


def losses(heads, tokens: torch.Tensor, labels) -> tuple[torch.Tensor, dict[str, float]]:
    """Summed loss, and the accuracy per label over the tokens that have one."""
    length = tokens.shape[1]
    loss = 1e-3 * (tokens.pow(2).mean() - 1).abs()  # keeps the scale the language model expects
    accuracy = {}
    for name, classes in LABELS.items():
        logits, target = heads[name](tokens), labels[name]
        loss = loss + F.cross_entropy(logits.flatten(0, 1), target.repeat_interleave(length))
        there = target < classes - 1
        right = (logits.argmax(-1) == target[:, None]).float().mean(1)
        accuracy[name] = right[there].mean().item()
        accuracy["none"] = accuracy.get("none", 0) + right[~there].mean().item() / len(LABELS)
        if name == "digit":
            loss = loss + F.cross_entropy(logits.mean(1), target)
    return loss, accuracy


def train(
    path: Path,
    steps: int,
    device: str,
    highest: float = 2e-3,
    start: Path | None = None,
    at: int = 0,
) -> None:
    """Train, or go on where `path` was left.

    Args:
        highest: learning rate, from which a cosine falls.
        start: checkpoint whose tower had `at` steps; begun with if there is no `path`.
    """
    model = network.build()
    if start is not None:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    tower = model.model.visual
    heads = torch.nn.ModuleDict({n: torch.nn.Linear(256, classes) for n, classes in LABELS.items()})
    both = torch.nn.ModuleDict({"tower": tower, "heads": heads}).to(device)
    optimizer = torch.optim.AdamW(both.parameters(), lr=0, weight_decay=0.01, betas=(0.9, 0.98))
    done = at
    if path.exists():
        saved = torch.load(path, map_location=device)
        both.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    first = 0 if start is None else at + HEADS_FIRST  # step that trains the tower
    began = time.monotonic()
    for step in range(done, steps):
        rate = highest * (0.5 + 0.5 * math.cos(math.pi * step / steps) + 0.02)
        if start is not None and step < at + HEADS_FIRST:
            rate = 2e-3
            tower.requires_grad_(False)
        else:
            rate *= min(1, (step + 1 - first) / 100)
            tower.requires_grad_(True)
        for group in optimizer.param_groups:
            group["lr"] = rate
        through = step / steps
        difficulty = cards.Difficulty(
            shift=0.12 * min(1, max(0, (through - 0.1) / 0.4)),
            fonts=int(min(8, 1 + max(0, (through - 0.12) / 0.4 * 8))),
            black=0.5 if through > 0.08 else 0.0,
        )
        rng = np.random.default_rng(TRAINING_SEEDS[FIRST_SEED + step])
        shaped = through > 0.4 and step % 2
        grid = GRIDS[int(rng.integers(1, len(GRIDS)))] if shaped else GRIDS[0]
        count = PATCHES * 16 // (grid[0] * grid[1])
        shares = LETTERS if through > 0.6 and step % 4 else USUAL
        frames, labels = batch(rng, (28 * grid[0], 28 * grid[1]), count, difficulty, shares)
        if through > 0.6 and step % 3:
            mixed = rng.permutation(count)  # neighbours in the file are unrelated
            pairs = frames.reshape(-1, 2, *frames.shape[1:])[mixed]
            frames = footage.through_codec(pairs.reshape(frames.shape))
            labels = {name: values[mixed] for name, values in labels.items()}
        inputs = forward.pixels(frames).to(device, torch.bfloat16)
        tokens = forward.vision(model, inputs, grid).float()
        loss, accuracy = losses(heads, tokens, {n: x.to(device) for n, x in labels.items()})
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            figures = " ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
            rms = tokens.pow(2).mean().sqrt().item()
            seconds = time.monotonic() - began
            print(
                f"{step}/{steps} {seconds:.0f} s {grid} loss {loss.item():.3f} {figures} "
                f"rms {rms:.2f}",
                flush=True,
            )
        if step % 200 == 199 or step == steps - 1:
            state = {"weights": both.state_dict(), "optimizer": optimizer.state_dict()}
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state | {"step": step + 1}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="file to write, and to go on from if it exists")
    parser.add_argument("--steps", type=int, default=4100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--start", type=Path, help="checkpoint to begin with if there is no PATH")
    parser.add_argument("--at", type=int, default=0, help="step it has reached")
    arguments = parser.parse_args()
    train(
        arguments.path,
        arguments.steps,
        arguments.device,
        arguments.lr,
        arguments.start,
        arguments.at,
    )


if __name__ == "__main__":
    main()
