"""The written part of an analysis: ``analysis.json`` and a short ``analysis.md``."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

PICTURES = {
    "attention_mass": "How few tokens and cubes hold most of the attention",
    "ffn_change": "What the FFN does to video and to text tokens",
    "selection_ratio": "What the sparse runs kept, layer by layer",
    "case": "What the question attended to",
}


def write(numbers: dict[str, Any], pictures: list[Path], out: Path) -> list[Path]:
    """Write both files into ``out``.

    Args:
        numbers: of study.study, and what was asked: ``model``, ``video``, ``question``.
        pictures: files in ``out`` to show.
        out: an existing folder.

    Returns:
        The files written.
    """
    files = out / "analysis.json", out / "analysis.md"
    files[0].write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    files[1].write_text(markdown(numbers, pictures), encoding="utf-8")
    return list(files)


def markdown(numbers: dict[str, Any], pictures: list[Path]) -> str:
    """The short report."""
    tokens = numbers["tokens"]
    lines = [
        f"# {numbers['model']} on {numbers['video']}",
        "",
        f"> {numbers['question']}",
        "",
        f"{tokens['all']:,} tokens, {tokens['video']:,} of them video, in {numbers['cubes']} cubes "
        f"of {numbers['block_size']}; all figures below are means over layers, layer by layer they "
        "are in [analysis.json](analysis.json).",
        "",
        *_mass_table(numbers),
        *_ffn_table(numbers),
        *_selection_table(numbers),
    ]
    for picture in pictures:
        lines += [f"![{PICTURES[picture.stem]}]({picture.name})", ""]
    return "\n".join(lines)


def _mass_table(numbers: dict[str, Any]) -> list[str]:
    masses = [str(mass) for mass in numbers["masses"]]
    rows = []
    for kind, count in numbers["queries"].items():
        if not count:
            continue
        of = [layer["attention"][kind] for layer in numbers["layers"]]
        for what, words in (("tokens", "all tokens before"), ("cubes", "preceding cubes")):
            cells = [f"{fmean(one[what][mass]['mean'] for one in of):.1%}" for mass in masses]
            rows.append(f"| {kind} | {words} | {' | '.join(cells)} |")
    head = " | ".join(f"{float(mass):.0%}" for mass in masses)
    return [
        "Share that holds so much of a query's attention mass (dense run; of cubes: of the mass "
        "on them):",
        "",
        f"| queries | of | {head} |",
        "|---|---|" + "---|" * len(masses),
        *rows,
        "",
    ]


def _ffn_table(numbers: dict[str, Any]) -> list[str]:
    rows = []
    for kind in ("video", "text"):
        of = [layer["ffn"][kind] for layer in numbers["layers"]]
        ratio = fmean(one["norm_ratio"]["mean"] for one in of)
        spread = fmean(one["norm_ratio"]["std"] for one in of)
        cosine = fmean(one["cosine"]["mean"] for one in of)
        rows.append(f"| {kind} | {ratio:.3f} | {spread:.3f} | {cosine:.3f} |")
    return [
        "The residual stream after the FFN against before:",
        "",
        "| tokens | L2 norm ratio | its standard deviation | cosine |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def _selection_table(numbers: dict[str, Any]) -> list[str]:
    rows = [
        f"| {run['p']:g} | {run['attention_density']:.1%} | {run['ffn_density']:.1%} "
        f"| {run['flops_ratio']:.1%} |"
        for run in sorted(numbers["selection"], key=lambda run: run["p"])
    ]
    return [
        "Sparse runs, p_attn = p_ffn = p:",
        "",
        "| p | cubes attended | FFN active | FLOPs of dense |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
