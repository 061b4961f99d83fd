"""How far the tile rule strays from the paper: density and output error, as tables and a picture.

``make fidelity`` (``python benchmarks/fidelity.py``) runs both rules
(paper.py and reference.py in vllm_adaspark/methods/adaspark/) on the inputs of inputs.py, prints
the tables and writes them to docs/fidelity.md and docs/fidelity.png.  Seeds are fixed; about a
minute on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import inputs
import torch
from inputs import BLOCK, HEADS, KINDS, QUESTION, Inputs

from vllm_adaspark.methods.adaspark.paper import paper_attention
from vllm_adaspark.methods.adaspark.reference import Tile, tile_attention
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
UNIFORM_KEEP = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
SEEDS = (0, 1)
CHUNKS = (None, 512, 256, 100)
UNALIGNED = 41  # text tokens before the video that push it off the block edge

# The paper has no minimum number of cubes, so neither has the tile rule here.
BARE = AdaSparkConfig(dense_below=0).override("paper")


class Row(NamedTuple):
    """Both rules on one kind of input at one p, over a whole prompt or its question alone."""

    kind: str
    p: float
    paper_density: float
    tile_density: float
    paper_error: float  # against dense attention
    tile_error: float  # against dense attention
    apart: float  # the tile rule against the paper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # many small tensors: more threads only wait for each other

    print(_line(Row._fields))
    everywhere, question, evenly = [], [], {}
    for kind in KINDS:
        made = [inputs.make(kind, seed) for seed in SEEDS]
        dense = [paper(x, 1.0)[0] for x in made]
        for p in SHARES:
            runs = [compare(kind, x, d, p) for x, d in zip(made, dense, strict=True)]
            for rows, of_runs in zip((everywhere, question), zip(*runs, strict=True), strict=True):
                rows.append(_mean(of_runs))
            print(_line(_cells(everywhere[-1])), flush=True)
        evenly[kind] = [uniform(made[0], dense[0], keep) for keep in UNIFORM_KEEP]
    chunks = chunk_rows()

    text = report(everywhere, question, chunks)
    (out / "fidelity.md").write_text(text)
    draw(everywhere, evenly, out / "fidelity.png")
    print("\n" + chunk_table(chunks))
    print(f"\nwrote {out / 'fidelity.md'} and {out / 'fidelity.png'}")


def paper(x: Inputs, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of the paper's rule, and ``[n, heads, cubes]`` bool, the cubes kept."""
    return paper_attention(x.q, x.k, x.v, x.cube_of, p, x.scale)


def paper_density(x: Inputs, kept: torch.Tensor) -> float:
    """Share of preceding cubes kept by the last ``len(kept)`` tokens."""
    preceding = x.cube_of.clamp(min=0)  # cube i has i before it, text before the video none
    preceding[-QUESTION:] = kept.shape[-1]
    return float(kept.sum() / (preceding[-len(kept) :].sum() * HEADS))


def tile(
    x: Inputs, config: AdaSparkConfig, chunk: int | None = None
) -> tuple[torch.Tensor, list[Tile]]:
    """Output and tiles of the tile rule, the prompt fed ``chunk`` tokens at a time."""
    n = len(x.q)
    chunk = chunk or n
    parts = [
        tile_attention(x.q, x.k, x.v, x.is_video, BLOCK, (at, min(n, at + chunk)), config)
        for at in range(0, n, chunk)
    ]
    return torch.cat([out for out, _ in parts]), [t for _, tiles in parts for t in tiles]


def density(tiles: Iterable[Tile]) -> float:
    """Share of candidate cubes kept, a video tile counted once per token."""
    tiles = list(tiles)
    kept = sum(len(t.tokens) * int(t.kept.sum()) for t in tiles)
    return kept / sum(len(t.tokens) * t.kept.numel() for t in tiles)


def error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative RMS."""
    return float((out - truth).norm() / truth.norm())


def compare(kind: str, x: Inputs, dense: torch.Tensor, p: float) -> tuple[Row, Row]:
    """One row for the whole prompt and one for its question."""
    by_paper, kept = paper(x, p)
    by_tile, tiles = tile(x, BARE.override({"p_attn": p}))

    def row(last: int) -> Row:
        rest = len(x.q) - last
        return Row(
            kind,
            p,
            paper_density(x, kept[rest:]),
            density(t for t in tiles if t.tokens.start >= rest),
            error(by_paper[rest:], dense[rest:]),
            error(by_tile[rest:], dense[rest:]),
            error(by_tile[rest:], by_paper[rest:]),
        )

    return row(len(x.q)), row(QUESTION)


def uniform(x: Inputs, dense: torch.Tensor, keep: float) -> tuple[float, float]:
    """Density and error of evenly spread cubes: what choosing by score has to beat."""
    out, tiles = tile(x, BARE.override({"selection": "uniform", "keep": keep}))
    return density(tiles), error(out, dense)


def chunk_rows(p: float = 0.9) -> list[tuple[str, str, float, float]]:
    """Where the video starts and how the prompt is cut: (start, chunk, density, error)."""
    rows = []
    for text_before in (inputs.TEXT_BEFORE, UNALIGNED):
        x = inputs.make("scenes", text_before=text_before)
        dense, _ = paper(x, 1.0)
        for chunk in CHUNKS:
            out, tiles = tile(x, BARE.override({"p_attn": p}), chunk)
            start = "at a block edge" if text_before % BLOCK == 0 else "inside a block"
            size = "whole prompt" if chunk is None else f"{chunk} tokens"
            rows.append((start, size, density(tiles), error(out, dense)))
    return rows


def chunk_table(rows: list[tuple[str, str, float, float]]) -> str:
    head = _line(("video starts", "chunk", "density", "error vs dense"))
    body = [_line((start, size, f"{share:.3f}", f"{err:.4f}")) for start, size, share, err in rows]
    return "\n".join([head, "|---|---|---|---|", *body])


def table(rows: list[Row]) -> str:
    head = (
        "input",
        "p",
        "density, paper",
        "density, tile rule",
        "error vs dense, paper",
        "error vs dense, tile rule",
        "tile rule vs paper",
    )
    return "\n".join([_line(head), "|---" * len(head) + "|", *(_line(_cells(r)) for r in rows)])


def report(
    everywhere: list[Row], question: list[Row], chunks: list[tuple[str, str, float, float]]
) -> str:
    frames, height, width = inputs.GRID
    cubes = frames * height * width // BLOCK
    p = AdaSparkConfig().p_attn
    gaps = "\n".join(
        f"* {row.kind}: {row.tile_density / row.paper_density:.2f} times the paper's density, "
        f"{row.tile_error / row.paper_error:.2f} times its error"
        for row in everywhere
        if row.p == p
    )
    return f"""# Fidelity: the tile rule against the paper

Written by `make fidelity` (benchmarks/fidelity.py); do not edit.

The paper lets every query token and query head choose its own cubes.  In the fast path the heads of
a GQA group choose together, and so do the tokens of a cube; a text token chooses for itself (the
*tile rule*, methods/adaspark/reference.py).  This page measures what that costs on synthetic inputs
(benchmarks/inputs.py).  No model is behind them: they show how the two rules differ, not how
accurate a model stays.

* **inputs**: a video of {frames} x {height} x {width} merged tokens in {cubes} cubes of {BLOCK},
  {inputs.TEXT_BEFORE} text tokens before it and a question of {QUESTION} after it;
  {HEADS} query heads, {inputs.KV_HEADS} KV heads, head size {inputs.DIM};
  mean over {len(SEEDS)} seeds.
* **flat**: independent Gaussians.  **local**: attention falls with M-RoPE distance.
  **scenes**: keys cluster by scene; each query head seeks its own scene and one other cube.
* **density**: share of preceding cubes attended, over all (query, head) pairs.
* **error**: relative RMS of the attention output.
* `dense_below` is 0 here; its default runs the first cubes of a video dense.

![Density against p, and error against density](fidelity.png)

## The whole prompt

Nearly all of it is video.  At the same p the tile rule keeps about as many cubes or more, because
a mean over tokens and heads is flatter than what it averages; and its error is the larger one all
the same, because a cube that one token or head needs may be outvoted.  The more they want different
things, the wider the gap; in `scenes` every head seeks another cube.  At p = {p:g}, the default:

{gaps}

{table(everywhere)}

## The question alone

Here only the heads of a GQA group share a choice.  Density and error against dense stay close to
the paper's; where no cube matters more than another (`flat`), the cubes themselves differ.

{table(question)}

## Where the video starts and how the prompt is cut

`scenes`, p = 0.9, one seed.  A chunk edge inside a cube makes its tokens attend to everything: more
is computed, and the error falls.  What text tokens and all other cubes choose does not change.

When the video starts inside a block, every block takes tokens from two of the input's cubes, which
seek different things, and the video tokens in the two blocks shared with text attend to everything.
Density and error both rise.

{chunk_table(chunks)}
"""


def draw(rows: list[Row], evenly: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Top: density against p.  Bottom: error against density, where lower left is better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    colours = {"paper": "#1f4e79", "tile": "#e07b00", "uniform": "#999999"}
    figure, axes = plt.subplots(2, len(KINDS), figsize=(11, 6.6), layout="constrained")
    for (top, bottom), kind in zip(axes.T, KINDS, strict=True):
        of_kind = [row for row in rows if row.kind == kind]
        shares = [row.p for row in of_kind]
        top.plot([0.5, 1], [0.5, 1], color="#cccccc", lw=1, ls="--", label="density = p")
        for name, label, marker in (("paper", "paper", "o"), ("tile", "tile rule", "s")):
            style = {"color": colours[name], "marker": marker, "ms": 4.5, "label": label}
            densities = [getattr(row, f"{name}_density") for row in of_kind]
            errors = [getattr(row, f"{name}_error") for row in of_kind]
            top.plot(shares, densities, **style)
            shown = [(d, e) for d, e in zip(densities, errors, strict=True) if e > 0]
            bottom.plot(*zip(*shown, strict=True), **style)
        bottom.plot(
            *zip(*evenly[kind], strict=True),
            color=colours["uniform"],
            marker="^",
            ms=4.5,
            ls=":",
            label="uniform choice",
        )
        top.set(title=kind, xlabel="p", ylim=(0, 1.03))
        bottom.set(xlabel="density", yscale="log", xlim=(0, 1.03), ylim=(3e-3, 1.5))
        for axis in (top, bottom):
            axis.grid(color="#eeeeee")
    axes[0, 0].set_ylabel("density")
    axes[1, 0].set_ylabel("relative RMS error vs dense")
    axes[0, 0].legend(frameon=False, loc="lower right")
    axes[1, 0].legend(frameon=False, loc="lower left")
    figure.suptitle("Paper: per token and head.  Tile rule: per cube or text token, per KV head")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _mean(runs: Sequence[Row]) -> Row:
    kind, p = runs[0][:2]
    return Row(kind, p, *(sum(c) / len(c) for c in zip(*(run[2:] for run in runs), strict=True)))


def _cells(row: Row) -> tuple[str, ...]:
    densities = (f"{value:.3f}" for value in row[2:4])
    return (row.kind, f"{row.p:g}", *densities, *(f"{value:.4f}" for value in row[4:]))


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
