"""``vllm-adaspark analyze``: the paper's analysis plots for a model, a video and a question."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from . import CommandError, UsageError
from .settings import add_rules, add_sampling, checked, given_rules, refuse_misspelt

PASSES_ON = True  # unknown options are vLLM's

ANSWER_TOKENS = 32  # of the traced run, to be read below its picture
SHARES = "0.5,0.7,0.8,0.9,0.95"
# Settings that the study's runs choose themselves, or that it has no use for.
CHOSEN = ("p_attn", "p_ffn", "flops", "prune", "trace", "report_file")
# Fixed, because the numbers are taken in this process from a prompt computed in one step.
OURS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def add_parser(subparsers: Any) -> None:
    """Add this subcommand."""
    parser = subparsers.add_parser(
        "analyze",
        help="draw the paper's analysis plots",
        allow_abbrev=False,
        description="Draw the paper's analysis plots: how few tokens and cubes hold most of the "
        "attention, what the FFN does to video and text tokens, what each layer keeps at several "
        "p, and where the question looked. Writes PNG, JSON and Markdown.",
        epilog="Any other option is one of vLLM's, e.g. --dtype. The model runs in this process, "
        "on one device; --max-model-len is chosen to fit the video.",
    )
    parser.add_argument("--model", required=True, help="a checkpoint's folder or name")
    parser.add_argument("--revision", help="of the model on its hub")
    parser.add_argument("--video", required=True, help="path, or http(s):, file: or data: URL")
    parser.add_argument("--question", required=True, help="asked after the video")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to")
    parser.add_argument(
        "--p", default=SHARES, help=f"values of p to run at, with commas ({SHARES})"
    )
    parser.add_argument(
        "--queries", type=int, default=64, help="query tokens of each kind to measure (64)"
    )
    add_rules(parser, without=CHOSEN)
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    """Run the study and write its files."""
    # All that can be refused is refused before the engine starts.
    from ..analysis import plots

    shares = _shares(args.p)
    if args.queries < 1:
        raise UsageError(f"--queries {args.queries}: expected 1 or more")
    if not args.question.strip():
        raise UsageError("--question is empty")
    refuse_misspelt(args.rest)
    settings = given_rules(args) | {"prune": 0.0}  # the runs are compared token by token
    checked(settings)
    try:
        plots.require_matplotlib()
    except plots.MatplotlibMissing as error:
        raise CommandError(str(error)) from None
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {args.out}: {error.strerror}") from None
    numbers, pictures = _analyze(args, shares, settings)

    from ..analysis import report

    files = plots.draw_all(numbers, args.out) + pictures
    for file in [*files, *report.write(numbers, files, args.out)]:
        print(file)
    return 0


def _analyze(
    args: argparse.Namespace, shares: list[float], settings: dict[str, Any]
) -> tuple[dict[str, Any], list[Path]]:
    """The numbers, and the picture that needs the engine."""
    from ..analysis.probe import ProbeError
    from ..analysis.study import StudyError, study
    from . import media, offline
    from .inspect import fitting_cost
    from .progress import Progress

    data = media.read_video(args.video)
    model = media.find_model(args.model, args.revision)
    config = checked(settings, checkpoint=model.settings)
    sampling = media.sampling(args, model.rules)
    text_tokens = 64 + len(args.question.encode())  # at the most
    video = media.probe(data, args.video)
    cost = fitting_cost(model, video, config, sampling, text_tokens=text_tokens)
    offline.prepare_environment()
    options = _engine_options(args, model.name, cost)
    with Progress("decode", None, "frames", quiet=True) as decoding:
        frames = offline.decode(data, model, sampling, options, decoding)
    _say("starting the engine")
    with offline.engine(options, model, settings, config.cube_volume, cost) as llm:
        prompt = offline.video_prompt(llm, args.question, frames, args.max_pixels)
        try:
            numbers = study(llm, prompt, shares, args.queries, _say)
        except (StudyError, ProbeError) as error:
            raise CommandError(str(error)) from None
        picture = _case(llm, prompt, args.out / "case.png")
    asked = {"model": model.name, "video": args.video[:200], "question": args.question}
    return {**asked, **numbers}, [picture]


def _case(llm: Any, prompt: dict[str, Any], path: Path) -> Path:
    """The heat map of a traced run at the server's own p."""
    from ..analysis.study import run as ask
    from ..traces.picture import save_heatmap
    from ..traces.reader import read_offline

    _say("sparse, traced")
    ask(llm, prompt, {"trace": True}, max_tokens=ANSWER_TOKENS)
    save_heatmap(read_offline(llm), path, source="question")
    return path


def _engine_options(args: argparse.Namespace, model: str, cost: Any) -> Any:
    """One device, one process, one step for the whole prompt, hooks that fire."""
    from . import offline

    revision = ["--revision", args.revision] if args.revision else []
    options = offline.engine_options(model, [*args.rest, *revision])
    for name in OURS:
        if getattr(options, name) > 1:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag} {getattr(options, name)}: analyze looks into one process; leave it out"
            )
    options.enforce_eager = True
    options.enable_prefix_caching = False
    options.distributed_executor_backend = "uni"
    options.max_num_batched_tokens = options.max_num_batched_tokens or cost.max_model_len
    options.max_num_scheduled_tokens = options.max_num_batched_tokens
    return options


def _shares(text: str) -> list[float]:
    try:
        shares = sorted({float(part) for part in text.split(",")})
        if not all(0 < share <= 1 for share in shares):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"--p {text}: expected numbers above 0 and at most 1, with commas, e.g. {SHARES}"
        ) from None
    return shares


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
