"""The pictures: depth × length per contender, accuracy against FLOPs, the ablation."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .grid import CUBE_ORDER, DENSE, LENGTHS
from .intervals import accuracy, difference
from .tables import Result, Rows, followed, meeting, series
from .videos import DEPTHS, depth_bin

COLOURS = {
    "dense": "black",
    "adaspark": "tab:blue",
    "adaspark bounds": "midnightblue",
    "adaspark+prune": "tab:cyan",
    "adaspark+prune bounds": "teal",
    "topk": "tab:green",
    "uniform": "tab:orange",
    "evs": "tab:red",
    "adatp": "tab:purple",
    "fastv": "tab:brown",
}
NAMES = {
    "adaspark": "AdaSpark (top-p)",
    "adaspark bounds": "AdaSpark by bounds",
    "adaspark+prune": "EVS's rule, then AdaSpark",
    "adaspark+prune bounds": "EVS's rule, then AdaSpark by bounds",
    "topk": "top-k",
    "evs": "EVS",
    "adatp": "AdaTP",
    "fastv": "FastV",
}
RESOLUTION = 110


def draw(result: Result, folder: Path) -> list[Path]:
    """All pictures of a result; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    of = series(result)
    for name, picture in PICTURES[of].items():
        figure = picture(result)
        drawn.append(folder / f"{of}_{name}.png")
        figure.savefig(drawn[-1], dpi=RESOLUTION)
        plt.close(figure)
    return drawn


def depth(result: Result) -> plt.Figure:
    """A heat map of right answers for each followed contender: where in the video, how long."""
    rows = Rows.of(result)
    names = [name for name in followed() if name in rows.values("contender")]
    lengths = [n for n in LENGTHS if n in rows.values("tokens")]
    across = min(5, len(names))
    down = -(-len(names) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(2.6 * across + 1, 2.5 * down + 0.6), squeeze=False,
        sharex=True, sharey=True, layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names):
        mine = rows.where(contender=name)
        shares = np.full((DEPTHS, len(lengths)), np.nan)
        for column, tokens in enumerate(lengths):
            for place in range(DEPTHS):
                here = mine.where(lambda r, p=place: depth_bin(r["depth"]) == p, tokens=tokens)
                if len(here):
                    shares[place, column] = accuracy(here).value
        image = axis.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (row, column), share in np.ndenumerate(shares):
            if not np.isnan(share):
                axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7)
        axis.set_title(name, fontsize=8)
        axis.set_xticks(range(len(lengths)), [f"{n // 1024}K" for n in lengths], fontsize=7)
        edges = np.linspace(0, 100, DEPTHS + 1)
        axis.set_yticks(
            range(DEPTHS), [f"{a:.0f}–{b:.0f} %" for a, b in pairwise(edges)], fontsize=7
        )
    figure.supxlabel("video tokens", fontsize=9)
    figure.supylabel("depth of the needle", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.7, label="right answers")
    return figure


def flops(result: Result) -> plt.Figure:
    """Right answers against FLOPs, haystack by haystack, where all contenders meet."""
    rows = Rows.of(result).where(tokens=meeting(result))
    haystacks = rows.values("haystack")
    wide = max(11, 3.6 * len(haystacks))
    figure, axes = plt.subplots(
        1, len(haystacks), figsize=(wide, 4.6), sharey=True, squeeze=False, layout="constrained"
    )
    axes = axes[0]
    for axis, motion in zip(axes, haystacks):
        for curve, colour in COLOURS.items():
            drawn = [
                (mine.mean("flops_ratio"), accuracy(mine), name)
                for name in curve_members(result, curve)
                if len(mine := rows.where(contender=name, haystack=motion))
            ]
            if not drawn:
                continue
            drawn.sort(key=lambda point: point[0])
            at = [point[0] for point in drawn]
            value = np.array([point[1].value for point in drawn])
            low = np.array([point[1].low for point in drawn])
            high = np.array([point[1].high for point in drawn])
            span = np.stack([value - low, high - value]).tolist()
            axis.errorbar(
                at, value, span, color=colour, linewidth=1.2, markersize=4,
                elinewidth=0.6, capsize=2, marker="o", linestyle="-" if len(at) > 1 else "none",
                label=NAMES.get(curve, curve),
            )  # fmt: skip
        axis.set_title(f"{motion} haystack")
        axis.set_xlabel("language-model FLOPs / dense FLOPs")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right answers, all skills")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=5)
    tokens = " and ".join(f"{n:,}" for n in rows.values("tokens"))
    title = "Needle model" if series(result) == "needle" else f'"{series(result)}"'
    figure.suptitle(f"{title}, {tokens} video tokens; 95 % bootstrap intervals over videos")
    return figure


def curve_members(result: Result, curve: str) -> list[str]:
    """The contenders that make a curve: of ours those that keep to grid.BASE's rules."""
    names = [c["name"] for c in result["contenders"] if c["curve"] == curve]
    if curve != "adaspark":
        return names
    # Variants have more words in their names; attention and FFN must both be sparse, or both dense.
    return [
        name
        for name in names
        if len(name.split()) == 2 and (name == CUBE_ORDER.name or not _half(name))
    ]


def _half(name: str) -> bool:
    return name.startswith("adaspark p=1/") or name.endswith("/1")


def ablation(result: Result) -> plt.Figure:
    """Points lost or won against stock dense, contender by contender."""
    rows = Rows.of(result).where(tokens=meeting(result))
    reference = rows.where(contender=DENSE.name)
    shown = []
    for contender in result["contenders"]:
        mine = rows.where(contender=contender["name"])
        if len(mine) and contender["name"] != DENSE.name:
            shown.append((contender, mine.mean("flops_ratio"), difference(mine, reference)))
    figure, axis = plt.subplots(figsize=(9, 0.24 * len(shown) + 1.2), layout="constrained")
    for row, (contender, share, lost) in enumerate(shown):
        colour = COLOURS.get(contender["curve"], "gray")
        span = [[100 * (lost.value - lost.low)], [100 * (lost.high - lost.value)]]
        axis.errorbar([100 * lost.value], [row], xerr=span, marker="o", markersize=4,
                      color=colour, capsize=2, linewidth=1)  # fmt: skip
        axis.annotate(f"{share:.0%}", (1.01, row), xycoords=("axes fraction", "data"),
                      va="center", fontsize=7)  # fmt: skip
    axis.annotate("FLOPs", (1.01, -1), xycoords=("axes fraction", "data"), va="center", fontsize=7)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [c["name"] for c, _, _ in shown], fontsize=7)
    axis.set_ylim(len(shown) - 0.5, -1.5)
    axis.set_xlabel("right answers minus stock dense, percentage points (95 % intervals)")
    axis.grid(alpha=0.3, axis="x")
    return figure


# By series; videonsa has no curves of its own.
PICTURES = {
    "needle": {"depth": depth, "flops": flops, "ablation": ablation},
    "videonsa": {},
    "adatp": {"ablation": ablation},
    "places": {"flops": flops},
}
