"""How many tokens of a cube must be asked what it keeps: answers with all of them and with fewer.

    python benchmarks/cube_queries.py    # writes benchmarks/results/cube_queries.json

Asks the needle model the same held-out questions under servers that differ in ``cube_queries``
alone.  Attention is sparse and the FFN dense, without a floor of cubes, where a worse choice would
show first; and the defaults.  The table is that of docs/quality.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from in_process import NEEDLE, ROOT, ask, in_own_process, start
from pages import refill

ASKED = (64, 16, 8, 4)  # of the 64 tokens of a cube
BARE = {"p_ffn": 1.0, "min_cubes": 1}
CONTENDERS = {
    "the defaults": {},
    "`p_attn` 0.5": {"p_attn": 0.5, **BARE},
    "`p_attn` 0.3": {"p_attn": 0.3, **BARE},
    "`p_attn` 0.2": {"p_attn": 0.2, **BARE},
    "`top_k` 0.1": {"selection": "top_k", "keep": 0.1, **BARE},
}
MOTIONS = ("calm", "busy")
PAGE = ROOT / "docs" / "quality.md"


def measure(asked: int, patches: int, videos: int) -> list[dict]:
    """One row for each contender, under a server that asks so many tokens of a cube."""
    from evaluate import held_out_video  # examples/needle

    llm = start(NEEDLE / "checkpoint", patches * 16, {"cube_queries": asked})
    rows = {
        name: {"cube_queries": asked, "contender": name, "correct": 0, "total": 0, "density": []}
        for name in CONTENDERS
    }
    for motion in MOTIONS:
        for number in range(videos):
            video = held_out_video(number, patches, motion=motion)
            for name, settings in CONTENDERS.items():
                answers, account = ask(llm, video, video.asked, settings)
                row = rows[name]
                row["density"].append(account["attention_density"])
                row["total"] += len(answers)
                row["correct"] += sum(
                    answer == question.answer
                    for question, answer in zip(video.asked, answers, strict=True)
                )
    return [row | {"density": float(np.mean(row["density"]))} for row in rows.values()]


def table(rows: list[dict], tokens: int) -> str:
    """Markdown: right answers, and the share of the cubes that were attended."""
    total = rows[0]["total"]
    lines = [
        f"{tokens:,} video tokens, {total} questions a cell; in brackets the share of the cubes:",
        "",
        "| settings | " + " | ".join(f"{asked} asked" for asked in ASKED) + " |",
        "|" + "---|" * (1 + len(ASKED)),
    ]
    by_key = {(row["contender"], row["cube_queries"]): row for row in rows}
    for name in CONTENDERS:
        cells = [by_key[name, asked] for asked in ASKED]
        shown = [f"{c['correct'] / c['total']:.1%} ({c['density']:.1%})" for c in cells]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patches", type=int, default=256, help="of 16 tokens")
    parser.add_argument("--videos", type=int, default=16, help="per haystack")
    default = ROOT / "benchmarks" / "results" / "cube_queries.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    rows = []
    for asked in ASKED:
        rows += in_own_process(measure, asked, options.patches, options.videos)
        print(*rows[-len(CONTENDERS) :], sep="\n", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"tokens": options.patches * 16, "rows": rows}, indent=1))
    text = table(rows, options.patches * 16)
    print(text)
    if options.out == default:
        refill(PAGE, "cube_queries", {"table": text})


if __name__ == "__main__":
    main()
