"""``vllm-adaspark tune``: which setting a model can take on one's own videos and questions."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..settings import CHECKPOINT_KEY
from . import PROGRAM, CommandError, UsageError
from .redact import redact_arguments
from .settings import add_sampling

PASSES_ON = True  # unknown options are vLLM's

DISTRIBUTIONS = ("vllm", "vllm-adaspark", "torch", "transformers")


def add_parser(subparsers: Any, arguments: Sequence[str] = ()) -> None:
    """Add this subcommand."""
    parser = subparsers.add_parser(
        "tune",
        help="find the cheapest setting for your model, videos and questions",
        allow_abbrev=False,
        usage=f"{PROGRAM} tune MODEL VIDEOS [QUESTIONS] [options below] [any option of vLLM]",
        description="Ask a model the same questions dense and under a grid of settings; say what "
        "each setting costs and loses, and which to take. Answers are kept as they come: the same "
        "command goes on where it was stopped.",
        epilog='QUESTIONS has a JSON object a line: {"video": ..., "question": ..., "answer": '
        '..., "options": [...]}; the last two may be left out. Any other option is one of vLLM\'s, '
        "e.g. --dtype, --enforce-eager, --tensor-parallel-size 2.",
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint's folder or name")
    parser.add_argument(
        "videos",
        metavar="VIDEOS [QUESTIONS]",
        nargs="+",
        type=Path,
        help="a folder of videos, or one video; and a file of questions (without: stock ones)",
    )
    parser.add_argument("--revision", help="of the model on its hub")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("tune"),
        help="folder to write to, and to go on from (tune)",
    )
    parser.add_argument(
        "--lose", type=_loss, default=0.01, metavar="SHARE",
        help="answers that a setting may lose, e.g. 1%% or 0.01 (1%%)",
    )  # fmt: skip
    what = parser.add_argument_group("what is tried")
    what.add_argument("--methods", default="", help="with commas (all that the model allows)")
    what.add_argument("--quick", action="store_true", help="a few settings only")
    what.add_argument(
        "--grid", type=Path, metavar="FILE", help="your own: a JSON object of settings a line"
    )
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer (32)")
    add_sampling(parser)
    shown = shlex.join([PROGRAM, *redact_arguments(list(arguments))])
    parser.set_defaults(shown=shown)


def _loss(text: str) -> float:
    """``1%`` or ``0.01``."""
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if rest.strip() or not 0 <= value < 1 or (not percent and value >= 0.5):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected a share of answers, 1% or 0.01; from a half on as 50%"
        )
    return value


def run(args: argparse.Namespace) -> int:
    """Ask what is missing, and write the report."""
    from ..tune.grid import GridError
    from ..tune.journal import JournalError
    from ..tune.plan import Plan
    from ..tune.questions import QuestionsError
    from ..tune.run import run as run_all
    from .offline import say

    if args.max_tokens < 1:
        raise UsageError(f"--max-tokens {args.max_tokens}: expected 1 or more")
    if args.rest and not args.rest[0].startswith("-"):  # QUESTIONS, behind an option
        args.videos.append(Path(args.rest.pop(0)))
    if len(args.videos) > 2:
        raise UsageError(f"{args.videos[2]}: expected VIDEOS and at most one file of QUESTIONS")
    try:
        plan = Plan.of(args)
        if plan.work.jobs():
            say(plan.words())
    except (GridError, QuestionsError, JournalError) as error:
        raise UsageError(str(error)) from None
    failed: dict[str, str] = {}
    try:
        with _ended_by_a_signal():
            failed = run_all(plan.work, plan.job, say)
    except JournalError as error:
        raise CommandError(str(error)) from None
    except KeyboardInterrupt:
        _report(plan, failed)
        say(
            f"\nstopped; {len(plan.work.journal)} of {plan.work.total} are answered and kept in "
            f"{plan.work.journal.path}. The same command goes on:\n  {args.shown}"
        )
        return 130
    print(_report(plan, failed))
    if failed and len(failed) == len(plan.work.contenders):
        raise CommandError(f"nothing could be asked: {next(iter(failed.values()))}")
    return 1 if plan.work.contenders[0].name in failed else 0


@contextmanager
def _ended_by_a_signal() -> Iterator[None]:
    """Make SIGTERM do what Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(plan: Any, failed: dict[str, str]) -> str:
    """Write the files; returns what is to be printed."""
    from ..analysis.plots import MatplotlibMissing
    from ..tune import compare, report
    from ..tune.picture import draw

    work, args = plan.work, plan.args
    lines = {
        (each.name, some[0].name): line
        for each in work.contenders
        for some in work.videos
        if (line := work.journal.find(each.name, some[0].name))
    }
    found = [
        replace(each, refused=each.refused or failed.get(each.contender.name))
        for each in compare.outcomes(work.contenders, work.videos, lines)
    ]
    choice = compare.choose(found, args.lose)
    devices = dict.fromkeys(line["device"] for line in lines.values() if "device" in line)
    made = report.Run(
        model=plan.model.name,
        videos=work.videos,
        found=found,
        choice=choice,
        wanted=args.lose,
        left_out=plan.left_out,
        flags=plan.server_flags(choice.outcome.contender),
        missing=work.total - len(work.journal),
        about={
            "device": "; ".join(devices),
            "versions": ", ".join(f"{name} {_version(name)}" for name in DISTRIBUTIONS),
            "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        },
        command=args.shown,
        trained=plan.model.config.get(CHECKPOINT_KEY),
    )
    try:
        files = report.write(made, args.out)
        files.append(draw(made, args.out))
    except MatplotlibMissing as error:
        files.append(f"no picture ({error}; then the same command draws it)")
    except OSError as error:
        raise CommandError(f"the report cannot be written: {error}") from None
    shown = "\n".join(map(str, files))
    line = report.server_line(made, made.choice.outcome.contender)
    return f"{report.verdict(made).replace('**', '')}\n\n{line}\n\n{shown}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
