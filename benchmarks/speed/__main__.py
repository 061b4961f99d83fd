"""Run the benchmark: ``make bench``, ``make bench-quick``, ``make bench ARGS='--only ffn'``.

Writes all samples and rows as JSON, the picture, and the tables of docs/performance.md; a quick run
writes only its own files and prints the tables.  Interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples" / "demo")]

import pages  # noqa: E402

from speed import (  # noqa: E402
    attention,
    decoding,
    dropping,
    ffn,
    long,
    off,
    plots,
    report,
    scaling,
    served,
    videonsa,
)
from speed.record import DENSE, Record, machine, progress, rows  # noqa: E402

PARTS = (
    *("attention", "decoding", "long", "ffn", "videonsa"),
    *("served", "compiled", "dropping", "off", "scaling"),
)
WORK = ROOT / "build" / "bench"
SHARES = (0.05, 0.1, 0.2, 0.5, 1.0)

FULL = {
    "attention": [
        attention.Plan(4096, SHARES, flex_shares=SHARES),
        attention.Plan(8192, SHARES, flex_shares=(0.1, 0.2)),
        attention.Plan(16384, SHARES, flex_shares=(0.1, 0.2)),
        attention.Plan(32768, (0.05, 0.1, 0.2), rounds=3),
        attention.Plan(65536, (0.05, 0.1, 0.2), rounds=3, dense_rounds=1),
        attention.Plan(8192, (0.1, 0.2), attention.LARGE),
        attention.Plan(16384, (0.1, 0.2, 0.5), attention.LARGE),
        attention.Plan(32768, (0.1, 0.2), attention.LARGE, rounds=3),
        attention.Plan(8192, (0.1, 0.2), attention.NO_AMX, rounds=3),
        attention.Plan(16384, (0.1, 0.2), attention.NO_AMX),
    ],
    "decoding": [decoding.Plan(tokens) for tokens in (16384, 32768, 65536)],
    "long": [long.Chunks(), long.Many()],
    "ffn": [
        ffn.Plan("3B", (0.2, 0.35, 0.5, 0.65, 0.8, 1.0)),
        ffn.Plan("7B", (0.2, 0.5, 0.8, 1.0)),
    ],
    "videonsa": [
        videonsa.Plan(4096),
        videonsa.Plan(8192),
        videonsa.Plan(16384, rounds=3),
        videonsa.Plan(32768, rounds=3, dense_rounds=1),
    ],
    "served": [
        served.Single(4096, (DENSE, "p=1", served.SPARSE), rounds=7),
        served.Single(8192),
        served.Single(16384, (DENSE, served.EVS, served.SPARSE)),
        served.Single(32768, (DENSE, served.EVS, served.SPARSE)),
        served.Decoding(32768, rounds=3),
        served.AtOnce(1),
        served.AtOnce(8),
        served.AtOnce(32, rounds=1),
    ],
    "compiled": [
        served.Single(8192, (DENSE, served.EVS, served.SPARSE), compiled=True),
        served.Single(32768, (DENSE, served.EVS, served.SPARSE), compiled=True),
    ],
    "dropping": [
        dropping.Plan(1, 4096),
        dropping.Plan(1, 16384),
        dropping.Plan(8, 2048, answer_tokens=8),
        dropping.Plan(32, 2048, rounds=1, answer_tokens=8),
    ],
    "off": [off.Plan(off.TEXT, 128), off.Plan(off.VIDEO, 512), off.Plan(off.QUESTION, 128)],
}
QUICK = {
    "attention": [
        attention.Plan(4096, (0.1, 0.2, 0.5), flex_shares=(0.2,)),
        attention.Plan(8192, (0.1, 0.2), rounds=3),
    ],
    "decoding": [decoding.Plan(8192, rounds=3)],
    "long": [long.Chunks((8192, 16384), rounds=1), long.Many(rounds=1)],
    "ffn": [ffn.Plan("3B", (0.2, 0.5, 1.0), tokens=4096, rounds=3)],
    "videonsa": [videonsa.Plan(4096, rounds=3), videonsa.Plan(8192, rounds=3)],
    "served": [
        served.Single(4096, (DENSE, served.EVS, served.SPARSE), rounds=3),
        served.Decoding(4096, (DENSE, "p=0.9"), rounds=3),
        served.AtOnce(8, 512, (DENSE, served.SPARSE), rounds=1),
    ],
    "compiled": [served.Single(4096, (DENSE, served.SPARSE), rounds=1, compiled=True)],
    "dropping": [dropping.Plan(1, 4096, rounds=1)],
    "off": [off.Plan(off.VIDEO, 512, rounds=6, answer_tokens=9)],
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small part, in minutes")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas: %(default)s")
    parser.add_argument("--fresh", action="store_true", help="forget an interrupted run's samples")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing: tables and picture of the last run"
    )
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: parts are {', '.join(PARTS)}")
    name = "bench-quick" if options.quick else "bench"
    results = WORK if options.quick else ROOT / "benchmarks" / "results"
    out = options.out or results / f"{name}.json"

    if options.report:
        show(json.loads(out.read_text(encoding="utf-8")), quick=options.quick)
        return
    work = WORK / f"{name}.jsonl"
    if options.fresh:
        work.unlink(missing_ok=True)
    try:
        record = Record(work, {"machine": machine()})
    except ValueError as error:
        parser.error(str(error))
    measure(record, QUICK if options.quick else FULL, parts)
    result = with_other_parts(result_of(record), out, parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    work.unlink()  # the next run measures anew
    show(result, quick=options.quick)
    progress(f"wrote {out}")


def show(result: dict[str, Any], *, quick: bool) -> None:
    """Print the tables, draw the picture; of a full run, into the pages that show them."""
    tables = report.markdown(result)
    print(tables)
    if quick:
        plots.draw(result, WORK / "bench-quick.png")
        return
    plots.draw(result, ROOT / "docs" / "bench.png")
    filled = {"tables": f"\n{tables}", "headline": f"\n{report.headline(result)}"}
    pages.refill(ROOT / "docs" / "performance.md", "bench", filled)
    pages.refill(ROOT / "README.md", "bench", filled)


def measure(record: Record, plans: dict[str, list], parts: list[str]) -> None:
    """Take all samples of some parts; ``scaling`` needs none of its own."""
    if "attention" in parts:
        attention.measure(record, plans["attention"])
    if "decoding" in parts:
        decoding.measure(record, plans["decoding"])
    if "long" in parts:
        long.measure(record, plans["long"])
    if "ffn" in parts:
        ffn.measure(record, plans["ffn"])
    if "videonsa" in parts:
        videonsa.measure(record, plans["videonsa"])
    in_folders = {"served": served, "compiled": served, "dropping": dropping, "off": off}
    for part, module in in_folders.items():
        if part in parts:
            # Not kept: the videos are distinct, so they are many.
            with tempfile.TemporaryDirectory(prefix="adaspark-bench-") as folder:
                module.measure(record, plans[part], Path(folder))


def result_of(record: Record) -> dict[str, Any]:
    """What the JSON file holds, but for what is made of all rows."""
    return {"about": record.about, "notes": record.notes, "rows": rows(record)}


def with_other_parts(result: dict[str, Any], out: Path, parts: list[str]) -> dict[str, Any]:
    """The result with the rows that ``out`` has of parts not measured now.

    ``about`` stays what most of them were measured on; parts that were measured elsewhere are told
    of in ``elsewhere``, by part.
    """
    result = result | {"elsewhere": {}}
    if out.exists():
        before = json.loads(out.read_text(encoding="utf-8"))
        here = json.loads(json.dumps(result["about"]))
        kept = [row for row in before["rows"] if part_of(row) not in parts]
        elsewhere = {
            part: about
            for part, about in before.get("elsewhere", {}).items()
            if part in {part_of(row) for row in kept}
        }
        if kept:
            result["about"] = before["about"]
            if before["about"] != here:
                elsewhere |= {part: here for part in parts}
        result |= {"rows": kept + result["rows"], "elsewhere": elsewhere}
        result["notes"] = before["notes"] | result["notes"]
    return result | {"scaling": scaling.summary(result["rows"])}


def part_of(row: dict[str, Any]) -> str:
    """The part that measures a row."""
    return row["name"].split()[0].rstrip(",") if row["name"].startswith(PARTS) else "served"


if __name__ == "__main__":
    main()
