"""The rows as a picture: three small panels, one colour for each contender, labels at the lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .attention import FLEX, LARGE, NO_AMX, OURS, USUAL
from .record import DENSE
from .served import EVS, SPARSE

# Told apart by people who see red and green alike, too.
COLORS = {DENSE: "#222222", OURS: "#0072b2", SPARSE: "#0072b2", FLEX: "#d55e00", EVS: "#009e73"}
NAMES = {DENSE: "stock vLLM", SPARSE: "AdaSpark", OURS: "AdaSpark"}
SHARES = (0.05, 0.1, 0.2)  # of the cubes: what attention is drawn for
LABEL_POINTS = 11  # height of a label, so that none lies on another

Points = list[tuple[float, float]]
Line = tuple[str, str, Points]  # label, contender, (x, y) in rising x


def draw(result: dict[str, Any], path: Path) -> None:
    """Time of one attention layer, what saved work is worth, and time to first token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
        for panel, one in zip(panels, (_attention, _worth, _ttft)):
            labels = one(panel, rows)
            panel.grid(alpha=0.25, linewidth=0.6)
            panel.set_axisbelow(True)
            _label_ends(panel, labels)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    plt.close(figure)


def _attention(axes: Any, rows: list[dict[str, Any]]) -> list[Line]:
    """Seconds over length, both in powers of two."""
    rows = [row for row in rows if row["name"] == USUAL]
    lines = [(NAMES[DENSE], DENSE, _line(rows, DENSE, 1.0))]
    lines += [(f"{NAMES[OURS]}, {share:.0%}", OURS, _line(rows, OURS, share)) for share in SHARES]
    lines.append((f"{FLEX}, 20%", FLEX, _line(rows, FLEX, 0.2)))
    axes.set_title("One attention layer: seconds")
    return _over_length(axes, [line for line in lines if line[2]])


def _ttft(axes: Any, rows: list[dict[str, Any]]) -> list[Line]:
    """Seconds over length: stock, EVS, and a fifth of the cubes with half of the FFN."""
    rows = [row for row in rows if row["name"] == "ttft"]
    lines = [(NAMES.get(who, who), who, _line(rows, who, 1.0)) for who in (DENSE, EVS, SPARSE)]
    axes.set_title("Time to first token: seconds")
    return _over_length(axes, [line for line in lines if line[2]])


def _worth(axes: Any, rows: list[dict[str, Any]]) -> list[Line]:
    """Efficiency, in bars: 1 where all of the saved work is saved time."""
    bars = []
    for label, name, contender, tokens, asked in (
        ("FFN, half of it", "ffn 7B", OURS, 8192, 0.5),
        ("attention, 10% of the cubes", USUAL, OURS, 16384, 0.1),
        ("the same in cubes of 128", LARGE, OURS, 16384, 0.1),
        ("the same without AMX", NO_AMX, OURS, 16384, 0.1),
        ("language model, 32K tokens", "ttft, language model", SPARSE, 32768, 1.0),
        ("EVS, language model, 32K tokens", "ttft, language model", EVS, 32768, 1.0),
    ):
        found = [
            row["efficiency"]
            for row in rows
            if (row["name"], row["contender"], row["tokens"]) == (name, contender, tokens)
            and row["asked"] == asked
            and row["efficiency"]
        ]
        bars += [(label, value, COLORS[contender]) for value in found]
    for label, value, color in bars:
        axes.barh(label, value, height=0.6, color=color)
        style = {"ha": "right", "va": "center", "color": "white", "weight": "bold"}
        axes.annotate(f"{value:.2f} ", (value, label), **style)
    axes.axvline(1, color=COLORS[DENSE], linewidth=0.8)
    axes.set_xlim(0, 1.15)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("dense time × work ÷ time")
    axes.set_title("Saved work that is saved time")
    return []


def _line(rows: list[dict[str, Any]], contender: str, asked: float) -> Points:
    return sorted(
        (row["tokens"], row["median_s"])
        for row in rows
        if (row["contender"], row["asked"]) == (contender, asked)
    )


def _over_length(axes: Any, lines: list[Line]) -> list[Line]:
    from matplotlib.ticker import NullLocator

    for _, contender, points in lines:
        axes.plot(*zip(*points), color=COLORS[contender], marker="o", markersize=3.5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("video tokens")
    lengths = sorted({x for _, _, points in lines for x, _ in points})
    seconds = [y for _, _, points in lines for _, y in points]
    ticks = [step * 10.0**power for power in range(-3, 3) for step in (1, 3)]
    ticks = [tick for tick in ticks if seconds and min(seconds) / 2 < tick < max(seconds) * 2]
    # Numbers as people write them, and no others.
    axes.xaxis.set_ticks(lengths, [f"{tick:,}" for tick in lengths])
    axes.yaxis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    return lines


def _label_ends(axes: Any, lines: list[Line]) -> None:
    """Write each line's name beside its last point, in its colour, none over another.

    Above the point where others go on to the right.
    """
    from matplotlib.patheffects import withStroke

    last = max((points[-1][0] for _, _, points in lines), default=0)
    heights = {}
    for number, (label, contender, points) in enumerate(lines):
        heights[number] = axes.transData.transform(points[-1])[1]
        if points[-1][0] < last:
            halo = [withStroke(linewidth=3, foreground="white")]
            style = {"textcoords": "offset points", "ha": "center", "path_effects": halo}
            axes.annotate(
                label, points[-1], xytext=(0, 6), color=COLORS[contender], fontsize=8, **style
            )
            del heights[number]
    step = LABEL_POINTS * axes.figure.dpi / 72
    below = float("-inf")
    for number in sorted(heights, key=heights.__getitem__):
        label, contender, points = lines[number]
        below = max(heights[number], below + step)
        axes.annotate(
            label,
            points[-1],
            xytext=(5, (below - heights[number]) * 72 / axes.figure.dpi),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=COLORS[contender],
            annotation_clip=False,
        )
