"""The picture of a run: what each setting lost against what it spent, and layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..analysis.plots import DPI, GREY, TEXT, VIDEO, require_matplotlib
from .report import PICTURE, Run

COLORS = {"adaspark": VIDEO, "adatp": "#2a9d5c", "videonsa": "#7b3fa0"}
RIGHT = 0.75  # share of the FLOPs from which a name stands to the left of its mark


def draw(run: Run, folder: Path) -> Path:
    """Write the picture into a folder.

    Raises:
        MatplotlibMissing: it is not installed.
    """
    plt = require_matplotlib()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12.5, 5), layout="constrained", width_ratios=(3, 2)
    )
    _losses(left, run)
    _layers(plt, right, run)
    path = folder / PICTURE
    figure.savefig(path, dpi=DPI, facecolor="white")
    plt.close(figure)
    return path


def _losses(axis: Any, run: Run) -> None:
    from matplotlib.ticker import PercentFormatter

    best = run.choice.outcome
    drawn = [each for each in run.found if each.loss is not None]
    seen = set()
    for each in drawn:
        kind = _kind(each)
        color = GREY if each is run.reference else COLORS.get(each.contender.method, TEXT)
        loss = each.loss
        spread = (
            None if each is run.reference else [[loss.value - loss.low], [loss.high - loss.value]]
        )
        axis.errorbar(
            each.flops,
            loss.value,
            yerr=spread,
            fmt=_marker(kind),
            ms=6,
            color=color,
            ecolor=(*_rgb(color), 0.3),
            elinewidth=1.2,
            label=kind if kind not in seen else None,
        )
        seen.add(kind)
    if best.loss is not None:
        axis.plot(best.flops, best.loss.value, "o", ms=16, mfc="none", mec=TEXT, mew=2)
    axis.axhline(run.wanted, color=TEXT, lw=1, ls="--")
    axis.text(0.005, run.wanted, "may be lost", color=TEXT, ha="left", va="bottom", fontsize=9,
              transform=axis.get_yaxis_transform())  # fmt: skip
    for each in _worth_a_name(drawn, best):
        left = each.flops > RIGHT
        axis.annotate(
            _plain(each.contender.name.removeprefix(f"{each.contender.method} ")),
            (each.flops, each.loss.value),
            xytext=(-7 if left else 7, 7),
            textcoords="offset points",
            fontsize=8,
            ha="right" if left else "left",
        )
    axis.set_xlabel("share of the dense model's FLOPs")
    axis.set_ylabel(f"answers lost against {_plain(run.reference.contender.name)}")
    axis.set_title(f"{len(run.questions)} questions about {len(run.videos)} videos", fontsize=10.5)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xlim(0, 1.06)
    axis.grid(alpha=0.25)
    if drawn:
        axis.legend(fontsize=8, loc="upper right")


def _worth_a_name(drawn: list[Any], best: Any) -> list[Any]:
    """What is taken, and what loses less than everything that is cheaper."""
    named = [best] if best.loss is not None else []
    for each in sorted(drawn, key=lambda each: (each.flops, each.loss.value)):
        cheaper = [other.loss.value for other in drawn if other.flops < each.flops]
        beside = any(abs(each.flops - other.flops) < 0.02 for other in named)
        if each.loss.value < min(cheaper, default=float("inf")) and not beside:
            named.append(each)
    return named


def _layers(plt: Any, axis: Any, run: Run) -> None:
    from matplotlib.ticker import PercentFormatter

    best = run.choice.outcome
    names = {
        "attention": "cubes attended",
        "ffn": "tokens that ran the FFN",
        "alive": "tokens alive",
    }
    colors = {"attention": VIDEO, "ffn": TEXT, "alive": "#2a9d5c"}
    layers = best.layers or {}
    for key in ["alive"] if "alive" in layers else layers:
        kept = layers[key]
        axis.plot(range(len(kept)), kept, "o-", ms=4, color=colors[key], label=names[key])
    axis.set_title(f"What {_plain(best.contender.name)} keeps", fontsize=10.5)
    axis.set_xlabel("layer")
    axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_ylim(0, 1.02)
    axis.grid(alpha=0.25)
    if layers:
        axis.legend(fontsize=8)


def _kind(outcome: Any) -> str:
    """What a point's marker says."""
    settings = outcome.contender.settings
    if "off" in settings:
        return "dense"
    if settings.get("prune"):
        return f"{outcome.contender.method}, prune"
    return "fastv" if settings.get("fastv") else outcome.contender.method


def _marker(kind: str) -> str:
    return {"dense": "s", "adatp": "^", "fastv": "v", "adaspark, prune": "D"}.get(kind, "o")


def _plain(name: str) -> str:
    """A name that matplotlib takes for no formula."""
    return name.replace("$", r"\$")


def _rgb(color: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(color)
