"""Run the benchmark: python -m benchmarks.needle, from the repository's root.

A run that was stopped goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

from server import ServerFailed  # examples/demo

from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.settings import SettingsError

from . import NEEDLE, ROOT, grid, plots, report, results, tables
from .beds import NEEDLE_BED, PLACES_BED
from .run import Run
from .work import Work, file_hash

BEDS = {bed.name: bed for bed in (NEEDLE_BED, PLACES_BED)}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.needle", description=__doc__)
    of_bed = "where videos and questions come from: examples/needle or examples/places"
    parser.add_argument("--bed", choices=BEDS, default="needle", help=of_bed)
    parser.add_argument("--checkpoint", type=Path, help="default: the bed's")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="minutes; changes nothing in docs/")
    size.add_argument("--full", action="store_true", help="every pair of p_attn and p_ffn: hours")
    size.add_argument(
        "--videonsa",
        type=Path,
        nargs="?",
        const=NEEDLE / "videonsa",
        metavar="CHECKPOINT",
        help="VideoNSA against dense, and each of its branches alone",
    )
    size.add_argument(
        "--adatp", action="store_true", help="AdaTP and FastV against AdaSpark and EVS"
    )
    precision = "what all servers compute in; auto: as the checkpoint says, which is bfloat16"
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32"], help=precision)
    engines = "ask engines in place of servers: no HTTP, and started sooner"
    parser.add_argument("--offline", action="store_true", help=engines)
    parser.add_argument("--videos", type=int, help="a cell, each asks 6 questions")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="with * and ?")
    parser.add_argument("--lengths", type=int, nargs="+", default=[], help="video tokens")
    own = "a contender of your own, with its --settings; may be repeated"
    parser.add_argument("--contender", action="append", default=[], metavar="NAME", help=own)
    differs = "what differs from the settings of dense in cube order"
    parser.add_argument("--settings", action="append", default=[], metavar="JSON", help=differs)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/needle.json")
    parser.add_argument("--page", type=Path, help="to put tables into; pictures go beside it")
    parser.add_argument("--folder", type=Path, help="of videos, logs and the work file")
    parser.add_argument("--fresh", action="store_true", help="forget what was already asked")
    parser.add_argument("--list", action="store_true", help="show the contenders and stop")
    again = "pictures and tables again, from the file that --out names"
    parser.add_argument("--report-only", action="store_true", help=again)
    options = parser.parse_args(arguments)
    if len(options.contender) != len(options.settings):
        parser.error("every --contender needs its --settings")
    if options.bed != "needle" and (options.quick or options.videonsa or options.adatp):
        parser.error(f"--bed {options.bed} has one grid: leave out --quick, --videonsa and --adatp")
    options.checkpoint = options.checkpoint or BEDS[options.bed].checkpoint
    options.folder = options.folder or ROOT / f".{options.bed}" / "benchmark"
    beside = options.folder / "quick" if options.quick else None
    name = f"{options.bed}{'_videonsa' * bool(options.videonsa)}{'_adatp' * options.adatp}.json"
    options.out = options.out or (beside or ROOT / "benchmarks/results") / name
    page = report.PLACES_PAGE if options.bed == "places" else report.PAGE
    options.page = options.page or (beside / "quality.md" if beside else page)
    return options


def chosen_grid(options: argparse.Namespace) -> grid.Grid:
    """The grid that the options ask for.

    Raises:
        ValueError: an option's value cannot be used.
    """
    if options.bed == "places":
        made = grid.on_places(options.full)
    elif options.videonsa:
        made = grid.videonsa()
    elif options.adatp:
        made = grid.adatp()
    else:
        made = grid.quick() if options.quick else grid.full() if options.full else grid.default()
    lengths = tuple(options.lengths) or grid.MIDDLE
    own = tuple(own_contender(*pair, lengths) for pair in zip(options.contender, options.settings))
    made = replace(made, contenders=made.contenders + own, videos=options.videos or made.videos)
    return grid.narrowed(made, options.only, options.lengths)


def own_contender(name: str, settings: str, lengths: tuple[int, ...]) -> grid.Contender:
    """A user's contender; what the settings leave out is as in grid.BASE.

    Raises:
        ValueError: no JSON object, or settings the plugin refuses.
    """
    try:
        given = json.loads(settings)
    except ValueError as error:
        raise ValueError(f"--settings {settings!r}: not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"--settings {settings!r}: expected a JSON object")
    # A budget or "off" takes the place of shares.
    base = grid.BASE if not {"flops", "off"} & given.keys() else {"cube": grid.BASE["cube"]}
    whole = base | given
    try:
        AdaSparkConfig().override(whole, source=f"--settings of {name!r}")
    except SettingsError as error:
        raise ValueError(str(error)) from None
    return grid.Contender(f"adaspark {name}", settings=whole, lengths=lengths)


def measured(options: argparse.Namespace) -> dict:
    """Run the grid, or go on with it; returns the result, which is in its file by then."""
    chosen = chosen_grid(options)
    if options.list:
        for contender in chosen.contenders:
            print(
                f"{contender.name:36} {contender.kind:9} {contender.lengths} {contender.settings}"
            )
        sys.exit()
    path = options.folder / "work.jsonl"
    if options.fresh:
        path.unlink(missing_ok=True)
    work = Work(path, file_hash(options.checkpoint / "model.safetensors"))
    if work.other_code:
        print(f"{work.other_code} earlier answers are of other plugin code; --fresh asks again")
    started = now()
    checkpoint, folder, dtype = options.checkpoint, options.folder, options.dtype
    run = Run(chosen, checkpoint, folder, work, options.videonsa, dtype, options.offline)
    records = run.measure()
    result = results.document(records, chosen, checkpoint, started, dtype, options.offline)
    if options.videonsa:
        result["videonsa"] = results.videonsa(options.videonsa)
    results.write(result, options.out)
    return result


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def main() -> None:
    options = parse_arguments()
    options.checkpoint, options.folder = options.checkpoint.resolve(), options.folder.resolve()
    options.videonsa = options.videonsa and options.videonsa.resolve()
    # Ending this by a signal must end the server as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    result = json.loads(options.out.read_text()) if options.report_only else measured(options)
    report.write(result, options.page)
    if options.page == report.PAGE and tables.series(result) == "needle":
        report.write_summaries(result)
    pictures = plots.draw(result, options.page.parent)
    print("\n".join(str(path) for path in (options.out, options.page, *pictures)))


if __name__ == "__main__":
    try:
        main()
    except (ServerFailed, ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
