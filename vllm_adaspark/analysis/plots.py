"""The pictures of an analysis, from the numbers that study.study returns.  Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VIDEO, TEXT, GREY = "#1f4e79", "#e07b00", "#8a939c"
KINDS = {"video": "video tokens ask", "question": "question tokens ask"}
DPI = 130


class MatplotlibMissing(ImportError):
    """Says how to get it."""


def require_matplotlib() -> Any:
    """``matplotlib.pyplot``, set up to draw into files.

    Raises:
        MatplotlibMissing: it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MatplotlibMissing(
            "pictures need matplotlib: pip install 'vllm-adaspark[analyze]'"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_all(numbers: dict[str, Any], out: Path) -> list[Path]:
    """Write every picture into the folder ``out``; returns the files."""
    plt = require_matplotlib()
    pictures = {
        "attention_mass": attention_mass,
        "ffn_change": ffn_change,
        "selection_ratio": selection_ratio,
    }
    files = []
    for name, draw in pictures.items():
        figure = draw(plt, numbers)
        files.append(out / f"{name}.png")
        figure.savefig(files[-1], dpi=DPI, facecolor="white")
        plt.close(figure)
    return files


def attention_mass(plt: Any, numbers: dict[str, Any]) -> Any:
    """How few tokens, and how few cubes, hold most of the attention, and where it falls."""
    layers, masses = numbers["layers"], numbers["masses"]
    at = [layer["layer"] for layer in layers]
    kinds = [kind for kind in KINDS if kind in layers[0]["attention"]]
    figure, axes = plt.subplots(
        3, len(kinds), figsize=(5.2 * len(kinds), 9.2), sharex=True, sharey="row",
        squeeze=False, layout="constrained",
    )  # fmt: skip
    shades = plt.get_cmap("viridis_r")(
        [0.12 + 0.8 * i / (len(masses) - 1) for i in range(len(masses))]
    )
    for column, kind in enumerate(kinds):
        measured = [layer["attention"][kind] for layer in layers]
        for axis, what in zip(axes[:2, column], ("tokens", "cubes"), strict=True):
            for mass, shade in zip(masses, shades, strict=True):
                found = [one[what][str(mass)] for one in measured]
                _line(axis, at, found, "p50", shade, f"{mass:.0%}", band=mass == 0.9)
        _stack(axes[2, column], at, [one["falls_on"] for one in measured])
        axes[0, column].set_title(
            f"{KINDS[kind]} ({numbers['queries'][kind]} sampled)", fontsize=11
        )
        axes[2, column].set_xlabel("layer")
    axes[0, 0].set_ylabel("share of all tokens before\nthat hold the mass")
    axes[1, 0].set_ylabel("share of preceding cubes\nthat hold the mass on cubes")
    axes[2, 0].set_ylabel("where the mass falls")
    for axis in axes[:2].flat:
        _percent(axis)
    _percent(axes[2, 0])
    _whole_layers(plt, axes[2, 0], at)
    axes[0, -1].legend(title="mass held", fontsize=8, title_fontsize=8, loc="upper right")
    axes[2, -1].legend(fontsize=8, loc="lower right")
    figure.suptitle(
        f"Attention mass, dense: median over heads and queries, band p10 to p90 at 90%\n"
        f"{numbers['tokens']['video']:,} video tokens in {numbers['cubes']} cubes "
        f"of {numbers['block_size']}",
        fontsize=11.5,
    )
    return figure


def ffn_change(plt: Any, numbers: dict[str, Any]) -> Any:
    """What the FFN does to video and to text tokens, layer by layer."""
    layers = numbers["layers"]
    at = [layer["layer"] for layer in layers]
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.9), layout="constrained")
    titles = (
        "L2 norm, after ÷ before (median, p10 to p90)",
        "standard deviation of that ratio",
        "cosine of before and after (median, p10 to p90)",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10.5)
        axis.set_xlabel("layer")
        axis.grid(alpha=0.25)
        _whole_layers(plt, axis, at)
    for kind, colour in (("video", VIDEO), ("text", TEXT)):
        ratio = [layer["ffn"][kind]["norm_ratio"] for layer in layers]
        cosine = [layer["ffn"][kind]["cosine"] for layer in layers]
        label = f"{kind} tokens"
        _line(axes[0], at, ratio, "p50", colour, label, band=True)
        axes[1].plot(at, [one["std"] for one in ratio], "o-", ms=3.5, color=colour, label=label)
        _line(axes[2], at, cosine, "p50", colour, label, band=True)
    axes[0].axhline(1, color=GREY, lw=0.8, ls=":")
    axes[1].set_ylim(bottom=0)
    axes[0].legend(fontsize=9)
    figure.suptitle("What the FFN changes in the residual stream", fontsize=11.5)
    return figure


def selection_ratio(plt: Any, numbers: dict[str, Any]) -> Any:
    """What sparse runs kept, layer by layer, one line for each p."""
    runs = sorted(numbers["selection"], key=lambda run: run["p"])
    at = [layer["layer"] for layer in numbers["layers"]]
    figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.1), sharey=True, layout="constrained")
    shades = plt.get_cmap("viridis_r")(
        [0.12 + 0.8 * i / max(1, len(runs) - 1) for i in range(len(runs))]
    )
    for run, shade in zip(runs, shades, strict=True):
        label = f"p = {run['p']:g}: {run['flops_ratio']:.0%} of dense FLOPs"
        for axis, key in zip(axes, ("attention_density", "ffn_density"), strict=True):
            axis.plot(at, run["layers"][key], "o-", ms=3.5, color=shade, label=label)
    for axis, title in zip(
        axes, ("preceding cubes attended", "video tokens that run the FFN"), strict=True
    ):
        axis.set_title(title, fontsize=10.5)
        axis.set_xlabel("layer")
        _percent(axis)
        _whole_layers(plt, axis, at)
    axes[1].legend(fontsize=8, loc="best")
    figure.suptitle("Layer-wise selection ratio, p_attn = p_ffn = p", fontsize=11.5)
    return figure


def _line(axis, at, found, middle: str, colour, label: str, *, band: bool) -> None:
    axis.plot(at, [one[middle] for one in found], "o-", ms=3.5, color=colour, label=label)
    if band:
        low, high = ([one[name] for one in found] for name in ("p10", "p90"))
        axis.fill_between(at, low, high, color=colour, alpha=0.16, lw=0)


def _stack(axis, at, falls_on: list[dict[str, float]]) -> None:
    parts = {"cubes": "preceding cubes", "own_block": "own block", "text": "text and edge blocks"}
    heights = [[one[key] for one in falls_on] for key in parts]
    axis.stackplot(at, heights, labels=parts.values(), colors=(VIDEO, "#8fb3d4", TEXT), alpha=0.9)
    axis.set_ylim(0, 1)
    axis.margins(x=0)


def _percent(axis) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_ylim(0, 1.02)
    axis.grid(alpha=0.25)


def _whole_layers(plt: Any, axis, at: list[int]) -> None:
    axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    margin = 0.03 * (at[-1] - at[0]) or 0.5
    axis.set_xlim(at[0] - margin, at[-1] + margin)
