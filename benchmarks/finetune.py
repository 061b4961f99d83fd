"""What a sparse fine-tune wins back: fine-tunes the needle model, measures before and after.

    python benchmarks/finetune.py                  # writes benchmarks/results/finetune.json
    python benchmarks/finetune.py --only "paper, p=.5/.5" --steps 400 --out finetune.json

Each of SETTINGS, of which the first is run unless --only names others, is too sparse for the model
as it is.  It is fine-tuned with them on training seeds (in --folder, where a run that was stopped
goes on), and both checkpoints answer the same held-out questions through vLLM and the plugin: the
one before with the settings in the request, the one after with none, because its config.json has
them.  Dense is measured too, before and after, and "recovered" is the part of the loss that is won
back; training can make the dense answers better too, so the gap to those is told as well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from in_process import NEEDLE, ROOT, ask, in_own_process, start
from pages import refill

SETTINGS = {
    "paper, p=.9/.8": {"paper": True, "p_attn": 0.9, "p_ffn": 0.8},
    "paper, p=.5/.5": {"paper": True, "p_attn": 0.5, "p_ffn": 0.5},
    "paper, p=.3/.3": {"paper": True, "p_attn": 0.3, "p_ffn": 0.3},
}
MOTIONS = ("calm", "busy")
GUIDE = ROOT / "docs/finetuning.md"


def finetune(folder: Path, checkpoint: Path, settings: dict, steps: int, rate: float) -> float:
    """Run examples/finetune.py, or what is left of it; how many CPU seconds its steps took."""
    command = [sys.executable, str(ROOT / "examples/finetune.py"), str(folder)]
    command += ["--model", str(checkpoint), "--settings", json.dumps(settings)]
    # Videos about as long as those that are asked about: short ones leave little out.
    command += ["--patches", "96", "160", "--videos", "1", "--questions", "24"]
    command += ["--average", "0.98", "--steps", str(steps), "--lr", str(rate)]
    subprocess.run(command, check=True)
    return torch.load(folder / "training.pt", weights_only=True)["cpu_seconds"]


def measure(
    checkpoint: Path, contenders: dict[str, dict | None], patches: list[int], videos: int
) -> list[dict]:
    """One row for each contender, length and haystack; ``None``: the checkpoint's own settings."""
    from evaluate import held_out_video  # examples/needle

    llm = start(checkpoint, max(patches) * 16)
    rows = []
    for length in patches:
        for motion in MOTIONS:
            by_skill = {name: {} for name in contenders}
            flops = {name: [] for name in contenders}
            for number in range(videos):
                video = held_out_video(number, length, motion=motion)
                for name, settings in contenders.items():
                    answers, account = ask(llm, video, video.asked, settings)
                    flops[name].append(account["flops_ratio"])
                    for question, answer in zip(video.asked, answers, strict=True):
                        right, total = by_skill[name].get(question.skill, (0, 0))
                        hit = answer == question.answer
                        by_skill[name][question.skill] = (right + hit, total + 1)
            for name in contenders:
                rows.append(
                    {
                        "contender": name,
                        "haystack": motion,
                        "tokens": length * 16,
                        "flops_ratio": float(np.mean(flops[name])),
                        "correct": sum(right for right, _ in by_skill[name].values()),
                        "total": sum(total for _, total in by_skill[name].values()),
                        "by_skill": by_skill[name],
                    }
                )
    return rows


def share(rows: list[dict], contender: str) -> float:
    """Right answers of one contender over all lengths and haystacks."""
    mine = [row for row in rows if row["contender"] == contender]
    return sum(row["correct"] for row in mine) / sum(row["total"] for row in mine)


def table(results: dict) -> str:
    """Markdown: the four accuracies for each settings and haystack."""
    lines = [
        f"{results['steps']} steps; {results['videos']} held-out videos a line.",
        "",
        "| settings | haystack | tokens | FLOPs | dense | before | after | dense, after |",
        "|" + "---|" * 8,
    ]
    for name, result in results["settings"].items():
        for row in result["rows"]:
            if row["contender"] != "after":
                continue
            same = {
                other["contender"]: f"{other['correct'] / other['total']:.1%}"
                for other in (*results["before"], *result["rows"])
                if (other["haystack"], other["tokens"]) == (row["haystack"], row["tokens"])
            }
            cells = [name, row["haystack"], f"{row['tokens']:,}", f"{row['flops_ratio']:.0%}"]
            cells += [same["dense"], same[name], same["after"], same["dense, after"]]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for name, result in results["settings"].items():
        won = result["recovered"]
        parts = [
            f"* {name}: {result['dense']:.1%} dense, {result['before']:.1%} before, "
            f"{result['after']:.1%} after" + ("" if won is None else f": {won:.0%} of the loss"),
            f"dense answers came to {result['dense, after']:.1%}",
            f"so the gap to dense went from {100 * (result['dense'] - result['before']):.1f} to "
            f"{100 * (result['dense, after'] - result['after']):.1f} points",
            f"{result['cpu_seconds'] / 60:.0f} CPU minutes",
        ]
        lines.append("; ".join(parts) + ".")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=NEEDLE / "checkpoint")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=3e-4, help="highest learning rate")
    parser.add_argument("--patches", type=int, nargs="+", default=[128], help="of 16 tokens")
    parser.add_argument("--videos", type=int, default=20, help="per length and haystack")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS)[:1])
    parser.add_argument("--folder", type=Path, default=ROOT / ".finetune")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/finetune.json")
    options = parser.parse_args()

    chosen = {name: SETTINGS[name] for name in options.only}
    how = (options.patches, options.videos)
    before = in_own_process(measure, options.checkpoint, {"dense": {"off": True}} | chosen, *how)
    results = {"steps": options.steps, "lr": options.lr, "videos": options.videos}
    results |= {"before": before, "settings": {}}
    dense = share(before, "dense")
    for name, settings in chosen.items():
        folder = options.folder / str(list(SETTINGS).index(name))
        cpu_seconds = finetune(folder, options.checkpoint, settings, options.steps, options.lr)
        after = in_own_process(
            measure, folder, {"after": None, "dense, after": {"off": True}}, *how
        )
        lost, left = dense - share(before, name), dense - share(after, "after")
        results["settings"][name] = {
            "settings": settings,
            "cpu_seconds": cpu_seconds,
            "dense": dense,
            "before": share(before, name),
            "after": share(after, "after"),
            "dense, after": share(after, "dense, after"),
            "recovered": 1 - left / lost if lost > 0 else None,
            "rows": after,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        print({key: value for key, value in results["settings"][name].items() if key != "rows"})
    text = table(results)
    print(text)
    if options.out == parser.get_default("out"):
        refill(GUIDE, "finetune", {"table": text})


if __name__ == "__main__":
    main()
