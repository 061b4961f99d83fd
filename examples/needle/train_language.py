"""Stage B: teach the language model all skills on composed videos; the vision tower is frozen.

    python examples/needle/train_language.py .needle/vision.pt .needle/language.pt

Goes on where it was stopped. Lengths grow phase by phase, and most steps see a quarter of each
picture's tokens. What is measured and exported is a running average of the weights. To train a
checkpoint further, as the shipped one was, without the optimizer that made it:

    python examples/needle/train_language.py --start examples/needle/checkpoint --at 4210 \
        .needle/vision.pt .needle/language.pt
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import bank as banks
import batches
import hints
import network
import numpy as np
import scenes
import scoring
import torch
import torch.nn.functional as F
from scenes import TRAINING_SEEDS
from torch.optim.swa_utils import AveragedModel
from train_vision import GRIDS
from transformers import Qwen2_5_VLForConditionalGeneration

SEEDS_A_STEP = 64  # twice the most videos a batch can have
WARM_UP = 20  # steps, at the beginning of each phase
LAYERS = (4, 6)  # of the language model, at first and later
FIRST_BANK_SEED = 90_000_000  # of TRAINING_SEEDS
HELD_OUT_BANK_SEED = scenes.HELD_OUT_SEEDS[90_000_000]
END_WEIGHT = 0.1  # of the loss on the token that ends the answer
HINT_WEIGHT = 0.2
AVERAGE = 0.98  # share of the weights' running average that stays, each step; less at first
# Once the others are known these are asked more often.
HARDER = (*scenes.SKILLS, "two_hop", "two_hop", "count", "before")
HARDEST = (*scenes.SKILLS, "count", "count", "count", "before", "before")
BEFORE = (*scenes.SKILLS, "two_hop", "count", "before", "before", "before", "marked")
LAST = (*scenes.SKILLS, "two_hop", "count", "count", "before", "marked")


@dataclass(frozen=True)
class Phase:
    """`steps` steps on videos of `patches` (from, to) temporal patches."""

    steps: int
    patches: tuple[int, int]
    videos: int
    asked: int
    rate: tuple[float, float]  # learning rate at its beginning and end
    kept: int | None = 4  # tokens of a picture
    shaped: float = 0.0  # share of the steps on frames of other shapes
    layers: int = LAYERS[0]
    skills: tuple[str, ...] = scenes.SKILLS


SCHEDULE = (
    Phase(250, (4, 8), 32, 4, (1e-5, 1e-3)),
    Phase(800, (10, 20), 24, 6, (1e-3, 1e-3)),
    Phase(550, (20, 40), 16, 8, (1e-3, 1e-3)),
    Phase(500, (20, 96), 10, 8, (1e-3, 1e-3), shaped=0.1, skills=HARDER),
    Phase(300, (20, 128), 10, 8, (1e-3, 7e-4), shaped=0.2, skills=HARDER),
    Phase(200, (24, 64), 6, 8, (7e-4, 5e-4), kept=None, shaped=0.4, skills=HARDER),
    Phase(250, (96, 320), 5, 10, (5e-4, 3e-4), shaped=0.2, skills=HARDER),
    Phase(120, (64, 256), 2, 12, (3e-4, 1.5e-4), kept=None, shaped=0.4),
    # Two more layers, for what takes two looks one after the other.
    Phase(400, (16, 64), 12, 10, (8e-4, 8e-4), shaped=0.2, skills=HARDER, layers=LAYERS[1]),
    # Counting depends on how many tokens a picture has, so the end is trained on all of them.
    Phase(200, (20, 96), 4, 12, (8e-4, 5e-4), None, 0.3, LAYERS[1], HARDER),
    Phase(200, (96, 320), 5, 12, (5e-4, 3e-4), 4, 0.2, LAYERS[1], HARDER),
    Phase(150, (64, 300), 2, 16, (3e-4, 2e-4), None, 0.2, LAYERS[1], HARDER),
    Phase(150, (24, 96), 6, 12, (4e-4, 2e-4), None, 0.3, LAYERS[1], HARDER),
    Phase(100, (96, 400), 1, 24, (2e-4, 1e-4), None, 0.2, LAYERS[1], HARDER),
    Phase(40, (256, 700), 1, 24, (1e-4, 1e-5), None, 0.1, LAYERS[1]),
    # From here on all tokens, as videos have them, and many questions a video.
    Phase(300, (24, 96), 6, 20, (5e-4, 5e-4), None, 0.3, LAYERS[1], HARDEST),
    Phase(500, (64, 300), 2, 24, (5e-4, 3e-4), None, 0.2, LAYERS[1], HARDEST),
    Phase(200, (24, 400), 2, 24, (3e-4, 1e-4), None, 0.2, LAYERS[1], HARDEST),
    Phase(60, (200, 1024), 1, 24, (1e-4, 2e-5), None, 0.1, LAYERS[1], HARDEST),
    Phase(120, (64, 1024), 1, 24, (2e-4, 1e-5), None, 0.1, LAYERS[1], LAST),
    # The shipped model's tower was trained further once more before these.
    Phase(60, (48, 256), 2, 24, (3e-4, 2e-4), None, 0.2, LAYERS[1], LAST),
    Phase(90, (128, 1024), 1, 24, (2e-4, 1e-5), None, 0.1, LAYERS[1], LAST),
    # Counting in two steps (`hints.links`), from here on.
    Phase(250, (24, 96), 16, 10, (5e-4, 5e-4), 4, 0.3, LAYERS[1], HARDEST),
    Phase(250, (24, 96), 6, 20, (5e-4, 5e-4), None, 0.3, LAYERS[1], HARDEST),
    Phase(250, (64, 300), 2, 24, (4e-4, 3e-4), None, 0.3, LAYERS[1], HARDEST),
    Phase(130, (64, 1024), 1, 24, (3e-4, 1e-5), None, 0.2, LAYERS[1], LAST),
    # Short ones were forgotten a little.
    Phase(140, (12, 72), 6, 20, (3e-4, 3e-4), None, 0.3, LAYERS[1], BEFORE),
    Phase(160, (48, 1024), 1, 24, (3e-4, 1e-5), None, 0.2, LAYERS[1], BEFORE),
    # At 16K tokens alone were "before" and counts still below nine in ten.
    Phase(112, (384, 1024), 1, 24, (2.5e-4, 1e-5), None, 0.1, LAYERS[1], BEFORE),
)


def make_banks(model, seed: int, share: float = 1.0) -> dict[tuple[int, int], banks.Bank]:
    """One bank per frame shape; the first, which most videos are made of, is the largest."""
    made = {}
    for number, grid in enumerate(GRIDS):
        variants, clips = (32, 40) if number == 0 else (10, 12)
        sizes = [max(2, round(share * size)) for size in (variants, 12 * variants, clips)]
        made[grid] = banks.make(model, seed + number, grid, *sizes)
    return made


def step_loss(model, heads, batch: batches.Batch, words, hints=hints):
    """The loss, and which questions were answered rightly, bool [batch, Q].

    `hints` is the module that gives the batch's links and the loss of what is hinted.
    """
    links = hints.links(batch)
    said, made = scoring.logits(model, batch, watch=links)
    answer = F.cross_entropy(said[:, :, 0].flatten(0, 1), batch.answers.flatten())
    ends = torch.full_like(batch.answers, words.end).flatten()
    end = F.cross_entropy(said[:, :, 1].flatten(0, 1), ends)
    hint, known = hints.loss(heads, batch, made, links)
    loss = answer + END_WEIGHT * end + HINT_WEIGHT * hint
    return loss, said[:, :, 0].argmax(-1) == batch.answers, known


class Trainer:
    """Stage B, up to some step.

    Args:
        vision: what train_vision.py wrote; may be missing where weights are known already.
        path: file to write, and to go on from.
        start: checkpoint to begin with if there is no `path`, and `at` which step it is.
    """

    def __init__(self, vision: Path, path: Path, device: str, start: Path | None = None, at=0):
        self.path, self.device = path, device
        self.words = batches.Words(network.tokenizer())
        self.step = 0
        saved = torch.load(path, map_location="cpu") if path.exists() else None
        if saved is None and start is not None:
            self.step = at
            self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                start, dtype=torch.float32
            )
        else:
            layers = network.layers_of(saved["model"]) if saved else LAYERS[0]
            self.model = network.build(layers=layers)
        self.heads = hints.make_heads(self.model.config.text_config.hidden_size)
        if saved:
            self.model.load_state_dict(saved["model"])
            self.heads.load_state_dict(saved["heads"])
            self.step = saved["step"]
        self._begin()
        if saved:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average.module.load_state_dict(saved["average"])
            self.average.n_averaged.fill_(saved["averaged"])
        if vision.exists() or self.step == 0:
            self._take_tower(torch.load(vision, map_location="cpu")["weights"])
        began = time.monotonic()
        self.banks = make_banks(self.model, TRAINING_SEEDS[FIRST_BANK_SEED])
        self.held_out = banks.make(self.model, HELD_OUT_BANK_SEED, GRIDS[0], 6, 96, 12)
        pictures = sum(len(bank.tokens) for bank in self.banks.values())
        print(f"{pictures} pictures encoded in {time.monotonic() - began:.0f} s", flush=True)

    def _take_tower(self, weights: dict[str, torch.Tensor]) -> None:
        """The tower may have been trained further since; what was averaged is then out of date."""
        tower = {n.removeprefix("tower."): w for n, w in weights.items() if "tower." in n}
        had = self.model.model.visual.state_dict()
        if any(not torch.equal(had[name], weight) for name, weight in tower.items()):
            for model in (self.model, self.average.module):
                model.model.visual.load_state_dict(tower)
            self.average.n_averaged.fill_(0)

    def _begin(self) -> None:
        """Train these weights from now on, with an optimizer that knows nothing yet."""
        self.model.model.visual.requires_grad_(False)
        self.model.to(self.device)
        self.heads.to(self.device)
        self.weights = [w for w in self.model.parameters() if w.requires_grad]
        self.weights += list(self.heads.parameters())
        self.optimizer = torch.optim.AdamW(self.weights, lr=0, weight_decay=0.01, betas=(0.9, 0.98))
        self.average = AveragedModel(self.model, multi_avg_fn=running_average)

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"average": self.average.module.state_dict(), "heads": self.heads.state_dict()}
        state |= {"averaged": int(self.average.n_averaged), "step": self.step}
        torch.save(state, self.path)

    def train(self, phase: Phase, done: int) -> None:
        """The rest of a phase of which `done` steps have been made."""
        if phase.layers > self.model.config.text_config.num_hidden_layers:
            self.model = network.grow(self.model, phase.layers)
            self._begin()
        running: dict[str, float] = {}
        start = time.monotonic()
        for number in range(done, phase.steps):
            low, high = phase.rate
            warm = min(1.0, (number + 1) / WARM_UP)
            for group in self.optimizer.param_groups:
                group["lr"] = warm * (low + (high - low) * number / phase.steps)
            rng = np.random.default_rng((5, self.step))
            shaped = rng.random() < phase.shaped
            grid = GRIDS[int(rng.integers(1, len(GRIDS)))] if shaped else GRIDS[0]
            patches = int(rng.integers(phase.patches[0], phase.patches[1] + 1))
            seeds = _seeds(self.step, patches, phase.videos)
            batch = batches.make(
                rng,
                self.model,
                self.words,
                self.banks[grid],
                seeds,
                patches,
                phase.asked,
                skills=phase.skills,
                kept=phase.kept,
            )
            loss, right, known = step_loss(self.model, self.heads, batch, self.words)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.average.update_parameters(self.model)
            self.step += 1
            _follow(running, batch, right.tolist())
            if self.step % 25 == 0:
                figures = " ".join(f"{skill} {running[skill]:.2f}" for skill in sorted(running))
                figures += " | " + " ".join(f"{name} {share:.2f}" for name, share in known.items())
                print(
                    f"{self.step} patches {patches} {time.monotonic() - start:.0f} s "
                    f"loss {loss.item():.3f} {figures}",
                    flush=True,
                )
            if self.step % 200 == 0:
                self.save()
        self.save()

    def report(self) -> None:
        """Accuracy on held-out scenes and pictures."""
        for patches, videos in ((16, 64), (64, 32), (256, 12)):
            counts = scoring.accuracy(
                self.average.module, self.words, self.held_out, patches, videos
            )
            print(f"  held out, {patches} patches: {scoring.shares(counts)}", flush=True)


@torch.no_grad()
def running_average(averages, weights, number: torch.Tensor) -> None:
    """The running average after `number` steps; its window grows with them."""
    stays = min(AVERAGE, number.item() / (number.item() + 9))
    torch._foreach_lerp_(averages, weights, 1 - stays)


def _seeds(step: int, patches: int, videos: int) -> list[int]:
    """Of twice as many, the scenes with the most frames: with one there is nothing to confuse."""
    first = step * SEEDS_A_STEP
    candidates = TRAINING_SEEDS[first : first + 2 * videos]
    frames = {seed: len(scenes.make(seed, patches).of("frame")) for seed in candidates}
    return sorted(candidates, key=frames.get, reverse=True)[:videos]


def _follow(running: dict[str, float], batch: batches.Batch, right) -> None:
    """Running accuracy per skill."""
    for row, marks in zip(batch.asked, right):
        for question, mark in zip(row, marks):
            before = running.get(question.skill, float(mark))
            running[question.skill] = 0.995 * before + 0.005 * mark


def follow(schedule, trainer) -> None:
    """Train what is left of the schedule's phases, and report after each."""
    first = 0
    for phase in schedule:
        if trainer.step < first + phase.steps:
            print(phase, flush=True)
            trainer.train(phase, max(0, trainer.step - first))
            trainer.report()
        first += phase.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vision", type=Path, help="what train_vision.py wrote")
    parser.add_argument("path", type=Path, help="file to write, and to go on from if it exists")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--start", type=Path, help="checkpoint to begin with if there is no PATH")
    parser.add_argument(
        "--at", type=int, default=0, help="step of the schedule that it has reached"
    )
    arguments = parser.parse_args()
    trainer = Trainer(
        arguments.vision, arguments.path, arguments.device, arguments.start, arguments.at
    )
    follow(SCHEDULE, trainer)


if __name__ == "__main__":
    main()
