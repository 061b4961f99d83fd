"""docs/choosing.png: what each method lost and spent, from all results of the needle benchmark.

    python benchmarks/choosing.py

It reads benchmarks/results/needle*.json as they are committed, and measures nothing.  Each file's
contenders are compared with the dense model of the same file, over the videos that both answered.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks.needle.intervals import Interval, difference  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
LENGTHS = (4096, 8192)  # video tokens, where all contenders meet
DENSE = "dense"
ENDS = ("low", "high")  # of an interval
# What belongs to a method, by a contender's name, and how it is drawn.
FAMILIES = {
    "AdaSpark": (r"adaspark (p=[\d.]+/[\d.]+( min 8)?|flops=[\d.]+)", "tab:blue", "o"),
    "AdaSpark by bounds": (r"adaspark (p=[\d.]+/[\d.]+( min 8)?|flops=[\d.]+) bounds", "navy", "*"),
    "AdaSpark with prune": (r"adaspark .* prune=[\d.]+", "tab:cyan", "D"),
    "EVS": (r"evs .*", "tab:red", "s"),
    "AdaTP": (r"adatp .*", "tab:green", "^"),
    "FastV": (r"fastv .*", "tab:olive", "v"),
    "VideoNSA": (r"videonsa", "tab:purple", "P"),
    "top-k": (r"topk .*", "tab:brown", "x"),
    "uniform": (r"uniform .*", "tab:orange", "+"),
}


@dataclass(frozen=True)
class Point:
    """A contender over all of LENGTHS.

    Attributes:
        family: a key of FAMILIES.
        name: of the contender.
        flops: mean share of the dense FLOPs.
        lost: points of right answers, dense minus its own, as a share.
    """

    family: str
    name: str
    flops: float
    lost: Interval


def points(files: Iterable[Path]) -> list[Point]:
    """Of all contenders that have a family and were asked at all of LENGTHS."""
    found = []
    for path in files:
        rows = [row for row in json.loads(path.read_text())["rows"] if row["tokens"] in LENGTHS]
        rows = [row for row in rows if row["parts"] == 1]
        reference = [row for row in rows if row["contender"] == DENSE]
        for name in dict.fromkeys(row["contender"] for row in rows):
            family = next(
                (key for key, (like, *_) in FAMILIES.items() if re.fullmatch(like, name)), None
            )
            mine = [row for row in rows if row["contender"] == name]
            known = [row["flops_ratio"] for row in mine if row["flops_ratio"] is not None]
            if family is None or {row["tokens"] for row in mine} != set(LENGTHS) or not known:
                continue
            better = difference(mine, reference)
            lost = Interval(-better.value, -better.high, -better.low)
            found.append(Point(family, name, sum(known) / len(known), lost))
    return found


def draw(found: list[Point]) -> plt.Figure:
    """Lost against spent; above ten points the axis is compressed."""
    figure, axis = plt.subplots(figsize=(10, 5.6), layout="constrained")
    for family, (_, color, marker) in FAMILIES.items():
        mine = sorted((p for p in found if p.family == family), key=lambda p: p.flops)
        if mine:
            values = [p.lost.value for p in mine]
            low, high = ([abs(getattr(p.lost, end) - p.lost.value) for p in mine] for end in ENDS)
            axis.errorbar(
                [p.flops for p in mine], values, yerr=[low, high], fmt=marker, ms=7, color=color,
                elinewidth=1, alpha=0.75, label=f"{family} ({len(mine)})",
            )  # fmt: skip
    axis.axhline(0, color="black", lw=1)
    axis.text(0.005, 0.001, "dense", fontsize=9, va="bottom")
    axis.set_yscale("symlog", linthresh=0.1, linscale=2.5)
    ticks = [-0.02, 0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6]
    axis.set_yticks(ticks, [f"{100 * tick:.0f}" for tick in ticks])
    axis.set_ylim(0.75, -0.035)  # better is higher
    axis.set_xlim(0, 1.02)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlabel("share of the dense model's FLOPs")
    axis.set_ylabel("right answers lost, percentage points")
    axis.set_title("Needle model, 4,096 and 8,192 video tokens, 95 % intervals", fontsize=11)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=9, loc="lower right")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "choosing.png")
    out = parser.parse_args().out
    found = points(sorted(RESULTS.glob("needle*.json")))
    for point in sorted(found, key=lambda p: (p.family, p.flops)):
        low, high = 100 * point.lost.low, 100 * point.lost.high
        said = f"{100 * point.lost.value:+5.1f} [{low:+.1f}, {high:+.1f}]"
        print(f"{point.family:20} {point.name:36} {point.flops:6.1%} lost {said}")
    figure = draw(found)
    figure.savefig(out, dpi=120, facecolor="white")
    print(out)


if __name__ == "__main__":
    main()
