"""``vllm-adaspark analyze``: the paper's analysis plots for a model, a video and a question."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..methods import DEFAULT
from . import CommandError, UsageError
from .settings import add_rules, add_sampling, checked, given_settings, refuse_misspelt

PASSES_ON = True  # unknown options are vLLM's

ANSWER_TOKENS = 32  # of the traced run, to be read below its picture
SHARES = "0.5,0.7,0.8,0.9,0.95"
# Settings that the study's runs choose themselves, or that it has no use for.
CHOSEN = ("p_attn", "p_ffn", "flops", "prune", "off", "trace", "report_file")
# Fixed, because the numbers are taken in this process from a prompt computed in one step.
OURS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def add_parser(subparsers: Any, arguments: Sequence[str] = ()) -> None:
    """Add this subcommand."""
    parser = subparsers.add_parser(
        "analyze",
        help="draw the paper's analysis plots",
        allow_abbrev=False,
        description="Draw the paper's analysis plots: how few tokens and cubes hold most of the "
        "attention, what the FFN does to video and text tokens, what each layer keeps at several "
        "p, and where the question looked. Writes PNG and JSON.",
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
    add_rules(parser, DEFAULT, without=CHOSEN)
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
    refuse_misspelt(args)
    settings = given_settings(args) | {"prune": 0.0}  # runs are compared token by token
    checked(args.settings_class, settings)
    try:
        plots.require_matplotlib()
    except plots.MatplotlibMissing as error:
        raise CommandError(str(error)) from None
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {args.out}: {error.strerror}") from None
    numbers = _analyze(args, shares, settings)
    files = [*plots.draw_all(numbers, args.out), args.out / "case.png", args.out / "analysis.json"]
    files[-1].write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    for file in files:
        print(file)
    return 0


def _analyze(
    args: argparse.Namespace, shares: list[float], settings: dict[str, Any]
) -> dict[str, Any]:
    """The numbers; the picture that needs the engine is drawn on the way."""
    from ..analysis.study import StudyError, study
    from ..traces.picture import save_heatmap
    from ..traces.reader import read_offline
    from . import media, offline
    from .inspect import fitting_cost

    model = media.find_model(args.model, args.revision)
    config = checked(
        args.settings_class, settings, checkpoint=args.settings_class.of_checkpoint(model.config)
    )
    sampling = media.sampling(args, model.rules)
    text_tokens = 64 + len(args.question.encode())  # at the most
    with ExitStack() as stack:
        file = stack.enter_context(offline.video_file(args.video))
        video = media.probe(file.read_bytes(), args.video)
        cost = fitting_cost(model, video, config, sampling, text_tokens=text_tokens)
        offline.prepare_environment()
        revision = ["--revision", args.revision] if args.revision else []
        options = offline.engine_options(
            model, sampling, file.resolve().parent, [*args.rest, *revision]
        )
        _fix(options, cost.max_model_len)
        offline.say("starting the engine")
        llm = stack.enter_context(
            offline.engine(options, model, DEFAULT, settings, config.cube_volume, cost)
        )
        question = offline.Question(file, args.question, args.max_pixels)

        def ask(request: dict[str, Any], max_tokens: int = 1) -> offline.Answer:
            return offline.ask(llm, question, request, max_tokens=max_tokens)

        try:
            numbers = study(llm, ask, shares, args.queries, offline.say)
        except StudyError as error:
            raise CommandError(str(error)) from None
        offline.say("sparse, traced")
        ask({"trace": True}, ANSWER_TOKENS)
        save_heatmap(read_offline(llm), args.out / "case.png", source="question")
    asked = {"model": model.name, "video": args.video[:200], "question": args.question}
    return {**asked, **numbers}


def _fix(options: Any, prompt_tokens: int) -> None:
    """One device, one process, one step for the whole prompt, hooks that fire."""
    for name in OURS:
        if getattr(options, name) > 1:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag} {getattr(options, name)}: analyze looks into one process; leave it out"
            )
    options.enforce_eager = True
    options.enable_prefix_caching = False
    options.distributed_executor_backend = "uni"
    options.max_num_batched_tokens = options.max_num_batched_tokens or prompt_tokens
    options.max_num_scheduled_tokens = options.max_num_batched_tokens


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
