"""One cube in a query tile, or two: seconds of an attention layer, and answers.

    python benchmarks/tile_cubes.py --only seconds    # minutes on an idle core
    python benchmarks/tile_cubes.py --only answers    # the same; --videos 3 for fewer questions

Writes benchmarks/results/tile_cubes.json and the table of answers in docs/quality.md.  Seconds are
of the layer of ``make bench ARGS='--only attention'``, the two kinds of tile and the stock kernel
one after the other in every round.  They are the process's CPU time, so set OMP_NUM_THREADS=1; on a
machine that has other work, it is less disturbed than the time on the wall.  Answers are the needle
model's, at equal budgets and equal shares.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cube_queries import BARE, MOTIONS
from in_process import NEEDLE, ROOT, ask, in_own_process, start
from pages import refill
from speed.attention import Plan, _Inputs, _Ours, _stock
from speed.record import machine

TILES = (1, 2)
LENGTHS, SHARE, ROUNDS = (8192, 16384), 0.2, 5
CONTENDERS = {
    "`flops` 0.4": {"flops": 0.4},
    "`flops` 0.25": {"flops": 0.25, "min_cubes": 1},
    "`p_attn` 0.3": {"p_attn": 0.3, **BARE},
    "`top_k` 0.1": {"selection": "top_k", "keep": 0.1, **BARE},
}
PAGE = ROOT / "docs" / "quality.md"


def cpu_seconds(run: Callable[[], Any]) -> float:
    """CPU time of this process while ``run`` runs."""
    began = time.process_time()
    run()
    return time.process_time() - began


def seconds(rounds: int) -> list[dict]:
    """One row for each length and kind of tile; every round takes a sample of each."""
    rows = []
    for tokens in LENGTHS:
        inputs = _Inputs.make(tokens)
        plans = {tile: Plan(tokens, (SHARE,), tile_cubes=tile) for tile in TILES}
        ours = {tile: _Ours(inputs, plan, SHARE) for tile, plan in plans.items()}
        stock = _stock(inputs, plans[1])
        samples = []
        for _ in range(rounds):
            of_round = {tile: cpu_seconds(ours[tile].sample) for tile in TILES}
            samples.append(of_round | {"dense": cpu_seconds(stock)})
        for tile in TILES:
            rows.append(
                {
                    "tokens": tokens,
                    "tile_cubes": tile,
                    "work": ours[tile].work,
                    "dense_s": [each["dense"] for each in samples],
                    "time_s": [each[tile] for each in samples],
                }
            )
    return rows


def seconds_table(rows: list[dict]) -> str:
    """Markdown: medians of times, and of each round's ratio to the stock kernel."""
    lines = [
        "| tokens | cubes in a tile | work | stock | ours | speed-up | efficiency |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        time_s, dense = statistics.median(row["time_s"]), statistics.median(row["dense_s"])
        pairs = zip(row["dense_s"], row["time_s"], strict=True)
        faster = statistics.median(stock / ours for stock, ours in pairs)
        lines.append(
            f"| {row['tokens']:,} | {row['tile_cubes']} | {row['work']:.0%} | {dense:.3g} s "
            f"| {time_s:.3g} s | {faster:.2f}x | {faster * row['work']:.2f} |"
        )
    return "\n".join(lines)


def answers(tile_cubes: int, patches: int, videos: int, dtype: str) -> list[dict]:
    """One row for each contender, under a server with so many cubes in a tile."""
    from evaluate import held_out_video  # examples/needle

    settings = {"tile_cubes": tile_cubes}
    llm = start(NEEDLE / "checkpoint", patches * 16, settings, dtype=dtype)
    rows = {
        name: {"tile_cubes": tile_cubes, "contender": name, "right": [], "density": [], "flops": []}
        for name in CONTENDERS
    }
    for motion in MOTIONS:
        for number in range(videos):
            video = held_out_video(number, patches, motion=motion)
            for name, asked in CONTENDERS.items():
                got, account = ask(llm, video, video.asked, asked)
                rows[name]["density"].append(account["attention_density"])
                rows[name]["flops"].append(account["flops_ratio"])
                rows[name]["right"] += [
                    answer == question.answer
                    for question, answer in zip(video.asked, got, strict=True)
                ]
    return list(rows.values())


def answers_table(rows: list[dict], tokens: int) -> str:
    """Markdown: right answers, and in brackets the shares of cubes and of FLOPs."""
    total = len(rows[0]["right"])
    lines = [
        f"{tokens:,} video tokens, {total} questions a cell; in brackets cubes and FLOPs:",
        "",
        "| settings | one cube in a tile | two | two right where one is wrong, and the reverse |",
        "|---|---|---|---|",
    ]
    by_key = {(row["contender"], row["tile_cubes"]): row for row in rows}
    for name in CONTENDERS:
        cells = [by_key[name, tile] for tile in TILES]
        shown = [
            f"{sum(c['right'])} ({statistics.mean(c['density']):.1%}, "
            f"{statistics.mean(c['flops']):.1%})"
            for c in cells
        ]
        one, two = (cell["right"] for cell in cells)
        gained = sum(b and not a for a, b in zip(one, two, strict=True))
        lost = sum(a and not b for a, b in zip(one, two, strict=True))
        lines.append(f"| {name} | {' | '.join(shown)} | {gained}, {lost} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["seconds", "answers"], help="one of the two")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples of each time")
    parser.add_argument("--patches", type=int, default=256, help="of 16 tokens")
    parser.add_argument("--videos", type=int, default=8, help="per haystack")
    parser.add_argument("--dtype", default="bfloat16", help="of the answers; float32 without bf16")
    default = ROOT / "benchmarks" / "results" / "tile_cubes.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.only != "answers":
        result["seconds"] = {"machine": machine(), "rows": seconds(options.rounds)}
    if options.only != "seconds":
        rows, tokens = [], options.patches * 16
        for tile in TILES:
            rows += in_own_process(answers, tile, options.patches, options.videos, options.dtype)
        result["answers"] = {"tokens": tokens, "dtype": options.dtype, "rows": rows}
    tables = {}
    if "seconds" in result:
        tables["seconds"] = seconds_table(result["seconds"]["rows"])
    if "answers" in result:
        tables["answers"] = answers_table(result["answers"]["rows"], result["answers"]["tokens"])
    print(*tables.values(), sep="\n\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if options.out == default and "answers" in tables:
        refill(PAGE, "tile_cubes", tables)


if __name__ == "__main__":
    main()
