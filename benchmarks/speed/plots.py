"""The rows as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .record import DENSE


def draw(result: dict[str, Any], path: Path) -> None:
    """Time of one attention layer, efficiency of both sparsities, and TTFT by part."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    figure, (time, efficiency, ttft) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    _attention_time(time, [row for row in rows if row["name"] == "attention"])
    _efficiency(efficiency, rows)
    _ttft(ttft, [row for row in rows if row["name"] == "ttft"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _attention_time(axes: Any, rows: list[dict[str, Any]]) -> None:
    for contender, asked in sorted({(row["contender"], row["asked"]) for row in rows}):
        points = sorted(
            (row["tokens"], row["median_s"])
            for row in rows
            if (row["contender"], row["asked"]) == (contender, asked)
        )
        label = contender if contender == DENSE else f"{contender}, {asked:.0%}"
        style = {DENSE: "k-", "adaspark": "-"}.get(contender, ":")
        axes.loglog(*zip(*points), style, base=2, marker="o", markersize=4, label=label)
    axes.set_title("One attention layer")
    axes.set_xlabel("video tokens")
    axes.set_ylabel("seconds")
    axes.grid(alpha=0.3)
    if rows:
        axes.legend(fontsize=7)


def _efficiency(axes: Any, rows: list[dict[str, Any]]) -> None:
    ours = [r for r in rows if r["contender"] == "adaspark" and r["efficiency"] is not None]
    for name, tokens in sorted({(row["name"], row["tokens"]) for row in ours}):
        points = sorted(
            (row["density"], row["efficiency"])
            for row in ours
            if (row["name"], row["tokens"]) == (name, tokens)
        )
        style = "-" if name == "attention" else "--"
        axes.plot(*zip(*points), style, marker="o", markersize=4, label=f"{name}, {tokens}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylim(0, 1.1)
    axes.set_title("Sparse efficiency: dense time × work ÷ time")
    axes.set_xlabel("work: share of pairs, or of tokens")
    axes.grid(alpha=0.3)
    if ours:
        axes.legend(fontsize=7)


def _ttft(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Stacked bars, a group per length, a bar per contender."""
    rows = sorted(rows, key=lambda row: row["tokens"])
    left = [0.0] * len(rows)
    labels = [f"{row['contender']}, {row['tokens'] // 1024}K" for row in rows]
    for part in rows[0]["parts"] if rows else ():
        seconds = [max(row["parts"][part], 0.0) for row in rows]
        axes.barh(labels, seconds, left=left, label=part)
        left = [a + b for a, b in zip(left, seconds)]
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_title("Time to first token, 3B shape, 4 layers")
    axes.set_xlabel("seconds")
    if rows:
        axes.legend(fontsize=7)
