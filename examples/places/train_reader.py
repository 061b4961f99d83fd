"""Stage B: teach the language model all skills on composed videos; the tower is frozen.

    python examples/places/train_reader.py .places/tower.pt .places/reader.pt

Goes on where it was stopped.  First a few tokens of a video are there, at last all of them.  What
is measured and exported is a running average of the weights.  `--from` a checkpoint, whose tower
`train_tower.py --from` took, training goes on at `--step`, first with the heads of the clues alone.
"""

import shared  # noqa: F401, puts the needle model's modules on the path

# isort: split

import argparse
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import batches
import clues
import network
import numpy as np
import places
import prompts
import torch
import tower as towers
import tracks
import train_tower
from forward import fast_dtype
from places import EASY, HARD, HELD_OUT_SEEDS, SKILLS, TRAINING_SEEDS
from scoring import logits
from torch.optim.swa_utils import AveragedModel
from train_language import WARM_UP, follow, running_average, step_loss

FIRST_BANK_SEED = 90_000_000  # of TRAINING_SEEDS
HELD_OUT_BANK_SEED = HELD_OUT_SEEDS[90_000_000]
SEEDS_A_STEP = 64
VIDEOS, HELD_OUT_VIDEOS = 20, 4  # of each haystack, in the banks
# Once the others are known.
HARDER = (*SKILLS, *HARD, "before", "after")
HARDEST = (*SKILLS, "before", "after", "after", "after", "count", "count")
COUNTING = (*SKILLS, "before", "before", "after", "count", "count")
LONG = (*SKILLS, "before", "before", "after", "after", "count")


@dataclass(frozen=True)
class Phase:
    """`steps` steps on videos of `patches` (from, to) temporal patches, `kept` tokens of each."""

    steps: int
    patches: tuple[int, int]
    videos: int
    asked: int
    rate: tuple[float, float]  # learning rate at its beginning and end
    kept: int | None
    skills: tuple[str, ...] = SKILLS


SCHEDULE = (
    Phase(200, (12, 32), 16, 6, (1e-5, 1e-3), 64, EASY),
    Phase(400, (12, 64), 16, 8, (1e-3, 1e-3), 96),
    Phase(600, (12, 64), 16, 8, (1e-3, 1e-3), 96, HARDER),
    Phase(100, (16, 64), 8, 10, (1e-3, 1e-3), 256, HARDER),
    Phase(300, (12, 48), 10, 10, (1e-3, 1e-3), 128, HARDEST),
    Phase(50, (24, 96), 2, 16, (8e-4, 6e-4), 1024, HARDEST),
    Phase(120, (16, 48), 1, 24, (6e-4, 3e-4), None, HARDEST),
    Phase(30, (32, 96), 1, 24, (3e-4, 1e-5), None, HARDER),
    Phase(300, (12, 64), 16, 8, (1e-3, 1e-3), 96, HARDEST),
    Phase(60, (24, 96), 2, 16, (8e-4, 6e-4), 1024, HARDEST),
    Phase(200, (16, 64), 1, 24, (6e-4, 2e-4), None, HARDEST),
    Phase(80, (32, 128), 1, 24, (2e-4, 1e-5), None, HARDER),
    Phase(360, (12, 64), 16, 8, (1e-3, 1e-3), 96, COUNTING),
    Phase(40, (24, 96), 2, 16, (8e-4, 6e-4), 1024, COUNTING),
    Phase(160, (16, 64), 1, 24, (6e-4, 3e-4), None, COUNTING),
    Phase(500, (12, 64), 16, 8, (1e-3, 1e-3), 96, COUNTING),
    Phase(160, (16, 64), 1, 24, (8e-4, 2e-4), None, COUNTING),
    Phase(60, (32, 128), 1, 24, (2e-4, 1e-5), None, COUNTING),
    Phase(320, (12, 64), 16, 8, (1e-3, 1e-3), 96, COUNTING),
    Phase(140, (16, 64), 1, 24, (8e-4, 3e-4), None, COUNTING),
    Phase(50, (32, 128), 1, 24, (3e-4, 1e-5), None, COUNTING),
    Phase(120, (64, 160), 2, 16, (8e-4, 6e-4), 1024, LONG),
    Phase(300, (48, 160), 1, 24, (6e-4, 1e-5), None, LONG),
    Phase(70, (48, 160), 1, 24, (5e-4, 1e-5), None, LONG),
)
# What heads that were not kept learn from a trained model.
HEADS_ALONE = Phase(60, (12, 48), 16, 8, (1e-2, 3e-3), 96)


def banks(tower: Path, model, heads, videos: int):
    """Tracks to train on and held-out ones; encoded once, then read from a file beside `tower`."""
    digest = hashlib.sha256(tower.read_bytes()).hexdigest()[:8]
    path = tower.with_name(f"bank-{digest}-{videos}.pt")
    if not path.exists():
        began = time.monotonic()
        held_out = max(1, videos * HELD_OUT_VIDEOS // VIDEOS)
        made = (
            tracks.make(model, heads, TRAINING_SEEDS[FIRST_BANK_SEED], videos),
            tracks.make(model, heads, HELD_OUT_BANK_SEED, held_out),
        )
        print(f"{path.name}: encoded in {time.monotonic() - began:.0f} s", flush=True)
        torch.save(made, path)
    return torch.load(path, weights_only=False)


class Trainer:
    """Stage B, up to some step.

    Args:
        tower: what train_tower.py wrote.
        path: file to write, and to go on from if it exists.
        videos: of each haystack, encoded to compose from.
        start: checkpoint to begin with if there is no `path`, and `at` which step it is.
    """

    def __init__(self, tower: Path, path: Path, device: str, videos=VIDEOS, start=None, at=0):
        self.path, self.step = path, 0
        self.words = batches.Words(
            network.tokenizer(places.every_question_text()), places.every_question_text()
        )
        self.model, marks_heads = train_tower.load(tower)
        self.model.model.visual.requires_grad_(False)
        self.heads = clues.make_heads(towers.HIDDEN)
        self.model.to(device)
        self.heads.to(device)
        marks_heads.to(device)
        self.weights = [w for w in self.model.parameters() if w.requires_grad]
        self.weights += list(self.heads.parameters())
        self.optimizer = torch.optim.AdamW(self.weights, lr=0, weight_decay=0.01, betas=(0.9, 0.98))
        self.average = AveragedModel(self.model, multi_avg_fn=running_average)
        if path.exists():
            saved = torch.load(path, map_location=device)
            self.model.load_state_dict(saved["model"])
            self.heads.load_state_dict(saved["heads"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.average.module.load_state_dict(saved["average"])
            self.average.n_averaged.fill_(saved["averaged"])
            self.step = saved["step"]
        self.bank, self.held_out = banks(tower, self.model, marks_heads, videos)
        if start is not None and not path.exists():
            self._begin(start, at)

    def _begin(self, start: Path, at: int) -> None:
        """Take the checkpoint's weights, and teach the clues' heads what these know already."""
        weights = train_tower.weights_of(start)
        for name, weight in self.model.model.visual.state_dict().items():
            if not torch.equal(weight, weights[f"model.visual.{name}"].to(weight)):
                raise ValueError(f"{start}: must have the tower that the language model belongs to")
        self.model.load_state_dict(weights)
        self.average.module.load_state_dict(weights)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        for weight in trained:
            weight.requires_grad_(False)
        self.step = at - HEADS_ALONE.steps
        self.train(HEADS_ALONE, 0)
        for weight in trained:
            weight.requires_grad_(True)
        self.report()

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"average": self.average.module.state_dict(), "heads": self.heads.state_dict()}
        state |= {"averaged": int(self.average.n_averaged), "step": self.step}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.path)

    def train(self, phase: Phase, done: int) -> None:
        """The rest of a phase of which `done` steps have been made."""
        running: dict[str, float] = {}
        began = time.monotonic()
        for number in range(done, phase.steps):
            low, high = phase.rate
            for group in self.optimizer.param_groups:
                rate = low + (high - low) * number / phase.steps
                group["lr"] = rate * min(1.0, (number + 1) / WARM_UP)
            rng = np.random.default_rng((5, self.step))
            patches = int(rng.integers(phase.patches[0], phase.patches[1] + 1))
            first = self.step * SEEDS_A_STEP
            seeds = list(TRAINING_SEEDS[first : first + phase.videos])
            batch = self.batch(rng, seeds, patches, phase.asked, phase.skills, phase.kept)
            loss, right, known = step_loss(self.model, self.heads, batch, self.words, hints=clues)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
            self.optimizer.step()
            self.average.update_parameters(self.model)
            self.step += 1
            for row, ticks in zip(batch.asked, right.tolist()):
                for question, tick in zip(row, ticks):
                    before = running.get(question.skill, float(tick))
                    running[question.skill] = 0.99 * before + 0.01 * tick
            if self.step % 25 == 0:
                figures = " ".join(f"{skill} {running[skill]:.2f}" for skill in sorted(running))
                figures += " | " + " ".join(f"{name} {share:.2f}" for name, share in known.items())
                seconds = time.monotonic() - began
                print(f"{self.step} {seconds:.0f} s loss {loss.item():.3f} {figures}", flush=True)
            if self.step % 100 == 0:
                self.save()
        self.save()

    def batch(self, rng, seeds, patches: int, asked: int, skills, kept) -> prompts.Prompts:
        """Tokens in the type that is fast here: the tracks hold bf16."""
        made = prompts.make(
            rng, self.model, self.words, self.bank, seeds, patches, asked, skills, kept
        )
        made.prefix = made.prefix.to(fast_dtype(made.prefix.device))
        return made

    @torch.no_grad()
    def report(self, patches: int = 32, videos: int = 20) -> None:
        """Accuracy on held-out scenes of held-out tracks, all tokens there."""
        counts = {skill: [0, 0] for skill in SKILLS}
        for seed in HELD_OUT_SEEDS[:videos]:
            rng = np.random.default_rng(seed)
            batch = prompts.make(
                rng,
                self.average.module,
                self.words,
                self.held_out,
                [seed],
                patches,
                24,
            )
            batch.prefix = batch.prefix.to(fast_dtype(batch.prefix.device))
            said = logits(self.average.module, batch)[0][:, :, 0].argmax(-1)
            for question, right in zip(batch.asked[0], (said == batch.answers)[0].tolist()):
                counts[question.skill][0] += right
                counts[question.skill][1] += 1
        figures = " ".join(f"{s} {r / max(1, n):.2f} ({n})" for s, (r, n) in counts.items())
        print(f"  held out, {patches} patches: {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tower", type=Path, help="what train_tower.py wrote")
    parser.add_argument("path", type=Path, help="file to write, and to go on from if it exists")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--videos", type=int, default=VIDEOS, help="of each haystack, to compose from"
    )
    parser.add_argument("--from", dest="start", type=Path, help="checkpoint to begin with")
    parser.add_argument(
        "--step", type=int, default=sum(p.steps for p in SCHEDULE), help="which step that is"
    )
    arguments = parser.parse_args()
    trainer = Trainer(
        arguments.tower,
        arguments.path,
        arguments.device,
        arguments.videos,
        arguments.start,
        arguments.step,
    )
    follow(SCHEDULE, trainer)


if __name__ == "__main__":
    main()
