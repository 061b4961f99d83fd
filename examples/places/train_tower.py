"""Stage A: teach the vision tower to tell the digit and colour of a mark, token by token.

    python examples/places/train_tower.py .places/tower.pt

Goes on where it was stopped.  Linear heads on every token tell the digit and the colour of the mark
it shows, or that there is none, and the colours of its cells.  A checkpoint has no such heads:
`--from` a checkpoint, its tower stays as it is and the heads alone are trained (200 steps do).
"""

import shared  # noqa: F401, puts the needle model's modules on the path

# isort: split

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tower as towers
import windows
from places import HELD_OUT_SEEDS, TRAINING_SEEDS
from transformers import Qwen2_5_VLForConditionalGeneration

FIRST_SEED = 50_000_000  # of TRAINING_SEEDS; scenes and tracks use others
BATCH = 256  # windows
STEPS = 900
OPENING = 300  # steps in which batches become as hard as videos are
GOOD = 0.85  # share of digits that must be right before they become harder


def losses(heads, tokens, frames, digits, colours):
    """The loss of a batch, and shares that are right."""
    said_digit, said_colour = heads["digit"](tokens), heads["colour"](tokens)
    error = F.mse_loss(heads["content"](tokens), windows.content(frames).to(tokens))
    on = (digits >= 0) & (digits < windows.NO_DIGIT)
    loss = error
    for said, truth in ((said_digit, digits), (said_colour, colours)):
        loss = loss + F.cross_entropy(
            said.flatten(0, 1), truth.flatten(), ignore_index=windows.NOT_ASKED
        )
    # Tokens with a digit are few among those without.
    loss = loss + F.cross_entropy(said_digit[on], digits[on])
    loss = loss + 0.3 * F.cross_entropy(said_colour[on], colours[on])
    loss = loss + 1e-3 * (tokens.pow(2).mean() - 1).abs()
    none = digits == windows.NO_DIGIT
    with torch.no_grad():
        right = {
            "digit": (said_digit.argmax(-1) == digits)[on].float().mean().item(),
            "colour": (said_colour.argmax(-1) == colours)[on].float().mean().item(),
            "none": (said_digit.argmax(-1) == digits)[none].float().mean().item(),
            "content": error.item(),
        }
    return loss, right


def train(
    path: Path,
    steps: int = STEPS,
    highest: float = 2e-3,
    device: str = "cpu",
    start: Path | None = None,
) -> None:
    """Train, or go on where `path` was left; the rate falls from `highest` along a cosine.

    Args:
        start: checkpoint whose tower stays as it is; None trains a tower.
    """
    model, heads = towers.build(), towers.make_heads()
    if start is not None:
        model.load_state_dict(weights_of(start))
        model.model.visual.requires_grad_(False)
    both = torch.nn.ModuleDict({"tower": model.model.visual, "heads": heads}).to(device)
    optimizer = torch.optim.AdamW(both.parameters(), lr=0, weight_decay=0.01, betas=(0.9, 0.98))
    done, opened = 0, float(start is not None)
    if path.exists():
        saved = torch.load(path, map_location=device)
        both.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        done, opened = saved["step"], saved["opened"]
    pool = windows.worlds(TRAINING_SEEDS[FIRST_SEED])
    running: dict[str, float] = {}
    began = time.monotonic()
    for step in range(done, steps):
        fall = 0.51 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = highest * fall * min(1, (step + 1) / 100)
        rng = np.random.default_rng(TRAINING_SEEDS[FIRST_SEED + 1 + step])
        frames, digits, colours = windows.batch(rng, pool, BATCH, windows.Stage.at(opened))
        tokens = towers.encode(model.model.visual, frames).float()
        loss, right = losses(heads, tokens, frames, digits.to(device), colours.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        for name, value in right.items():
            running[name] = 0.9 * running.get(name, value) + 0.1 * value
        if running["digit"] > GOOD:
            opened = min(1.0, opened + 1 / OPENING)
        if step % 25 == 0 or step == steps - 1:
            figures = " ".join(f"{name} {value:.3f}" for name, value in running.items())
            seconds = time.monotonic() - began
            print(f"{step}/{steps} {seconds:.0f} s opened {opened:.2f} {figures}", flush=True)
        if step % 100 == 99 or step == steps - 1:
            state = {"weights": both.state_dict(), "optimizer": optimizer.state_dict()}
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state | {"step": step + 1, "opened": opened}, path)


@torch.no_grad()
def measure(path: Path, batches: int = 8) -> dict[str, float]:
    """Shares that are right on held-out windows."""
    model, heads = load(path)
    pool = windows.worlds(HELD_OUT_SEEDS[FIRST_SEED], 40)
    total: dict[str, float] = {}
    for number in range(batches):
        rng = np.random.default_rng(HELD_OUT_SEEDS[FIRST_SEED + 1 + number])
        frames, digits, colours = windows.batch(rng, pool, BATCH, windows.Stage())
        tokens = towers.encode(model.model.visual, frames).float()
        for name, value in losses(heads, tokens, frames, digits, colours)[1].items():
            total[name] = total.get(name, 0) + value / batches
    return total


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's weights, float32."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32
    ).state_dict()


def load(path: Path):
    """The model with the trained tower (its language model is untrained), and the heads."""
    weights = torch.load(path, map_location="cpu")["weights"]
    model, heads = towers.build(), towers.make_heads()
    both = torch.nn.ModuleDict({"tower": model.model.visual, "heads": heads})
    both.load_state_dict(weights)
    return model, heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="file to write, and to go on from if it exists")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--from", dest="start", type=Path, help="checkpoint whose tower to keep")
    arguments = parser.parse_args()
    train(arguments.path, arguments.steps, arguments.lr, arguments.device, arguments.start)
    print({name: round(value, 3) for name, value in measure(arguments.path).items()})


if __name__ == "__main__":
    main()
