"""``vllm-adaspark ask``: one question about one video, without a server."""

from __future__ import annotations

import argparse
import json
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from . import CommandError, UsageError
from .settings import (
    add_sampling,
    add_settings,
    checked,
    given_settings,
    refuse_misspelt,
    request_settings,
)

PASSES_ON = True  # unknown options are vLLM's


def add_parser(subparsers: Any) -> None:
    """Add this subcommand."""
    parser = subparsers.add_parser(
        "ask",
        help="ask one question about a video",
        allow_abbrev=False,
        description="Ask a question about a video and show what the answer cost.",
        epilog="Any other option is one of vLLM's, e.g. --dtype, --enforce-eager, "
        "--tensor-parallel-size 2; --max-model-len and --max-num-batched-tokens are chosen to fit "
        "the video. The answer goes to stdout, progress to stderr.",
    )
    parser.add_argument("video", metavar="VIDEO", help="path, or http(s):, file: or data: URL")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument(
        "--model",
        required=True,
        help="a checkpoint's folder or name, or 3b, 7b, 32b, 72b, onevision-0.5b, onevision-7b",
    )
    parser.add_argument("--revision", help="of the model on its hub")
    parser.add_argument("--max-tokens", type=int, default=256, help="of the answer (256)")
    parser.add_argument(
        "--dense", action="store_true", help="ask a second time, dense, and compare"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="save a heat map of the cubes attended"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, show no progress")
    add_sampling(parser)
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    """Ask, and print answer, times and account."""
    from . import media
    from .inspect import fitting_cost
    from .progress import Progress

    refuse_misspelt(args.rest)
    settings = given_settings(args)
    checked(settings)
    model = media.find_model(args.model, args.revision)
    sampling = media.sampling(args, model.rules)
    config = checked(settings, checkpoint=model.settings)
    _check(args, config)
    # All that can be refused is refused before the engine starts.
    data = _read(args.video, quiet=args.json)
    video = media.probe(data, args.video)
    for remark in video.remarks:
        print(f"VIDEO: {remark}", file=sys.stderr)
    cost = fitting_cost(model, video, config, sampling, answer_tokens=args.max_tokens + 256)

    from . import offline

    offline.prepare_environment()
    rest = [*args.rest, *(["--revision", args.revision] if args.revision else [])]
    options = offline.engine_options(model.name, rest)
    with Progress("decode", None, "frames", quiet=args.json) as decoding:
        frames = offline.decode(data, model, sampling, options, decoding)
    with ExitStack() as stack:
        with Progress("start", None, "", quiet=args.json) as starting:
            engine = offline.engine(options, model, settings, config.cube_volume, cost)
            llm = stack.enter_context(engine)
        prompt = offline.video_prompt(llm, args.question, frames, args.max_pixels)
        watched = {"max_tokens": args.max_tokens, "quiet": args.json}
        # Named by the request too, since a budget that cannot be met is refused only there.
        ours = request_settings(settings) | ({"trace": True} if args.picture else {})
        first = "sparse" if config.enabled else "off"
        runs = {
            first: offline.ask(
                llm, _with(prompt, ours), cost, name=first if args.dense else "", **watched
            )
        }
        if args.picture:
            _save_picture(llm, args.picture)
        if args.dense:
            runs["dense"] = offline.ask(llm, _with(prompt, "off"), cost, name="dense", **watched)

    times = {"decode": decoding.seconds, "start": starting.seconds}
    if args.json:
        print(json.dumps(_report(args, model, config, cost, times, runs), indent=2))
    else:
        print(render(runs, times))
        if args.picture:
            print(f"\npicture: {args.picture}")
    return 0


def _check(args: argparse.Namespace, config: Any) -> None:
    if not args.question.strip():
        raise UsageError("QUESTION is empty")
    if args.max_tokens < 1:
        raise UsageError(f"--max-tokens {args.max_tokens}: expected 1 or more")
    if args.dense and not config.enabled:
        raise UsageError("--dense and --off: there is nothing to compare; leave one of them out")
    if args.picture is None:
        return
    if not config.sparse_attention:
        raise UsageError("--picture: dense attention attends to every cube; leave --off out")
    if args.picture.suffix.lower() != ".png":
        raise UsageError(f"--picture {args.picture}: expected a name that ends in .png")
    if not args.picture.absolute().parent.is_dir():
        raise UsageError(f"--picture {args.picture}: no such folder")


def _read(source: str, *, quiet: bool) -> bytes:
    from . import media
    from .progress import Progress

    if not re.match(r"https?://", source, re.IGNORECASE):
        return media.read_video(source)
    with Progress("fetch", None, "bytes", quiet=quiet) as progress:
        return media.read_video(source, progress.to)


def _with(prompt: dict[str, Any], settings: Any) -> dict[str, Any]:
    """The prompt with a request's AdaSpark settings."""
    others = prompt.get("mm_processor_kwargs", {})
    return prompt | {"mm_processor_kwargs": {**others, "adaspark": settings}}


def _save_picture(llm: Any, path: Path) -> None:
    """The latest trace, which is that of the request that just ended."""
    from ..traces.picture import save_heatmap
    from ..traces.reader import read_offline

    try:
        save_heatmap(read_offline(llm), path)
    except (LookupError, OSError, ValueError) as error:
        raise CommandError(f"--picture {path}: {error}") from None


def _report(args, model, config, cost, times, runs) -> dict[str, Any]:
    return {
        "model": model.name,
        "question": args.question,
        "settings": config.to_dict(),
        "cost": cost.to_dict(),
        "seconds": times,
        "picture": str(args.picture) if args.picture else None,
        "runs": {
            name: {
                "answer": answer.text,
                "tokens": answer.tokens,
                "prompt_tokens": answer.prompt_tokens,
                "seconds": answer.seconds,
                "account": answer.account,
            }
            for name, answer in runs.items()
        },
    }


def render(runs: dict[str, Any], times: dict[str, float]) -> str:
    """Answers, times and accounts as text."""
    lines = []
    for name, answer in runs.items():
        lines += [f"{name}: {answer.text}" if len(runs) > 1 else answer.text, ""]
    columns = ("", *runs)
    rows = [
        ("prompt tokens", [f"{answer.prompt_tokens:,}" for answer in runs.values()]),
        ("answer tokens", [f"{answer.tokens:,}" for answer in runs.values()]),
    ]
    for stage in ("prepare", "encode", "prefill", "answer", "total"):
        taken = [answer.seconds[stage] for answer in runs.values()]
        cells = ["in prefill" if time is None else f"{time:.2f}" for time in taken]
        rows.append((f"{stage}, s", cells))
    for title, key, form in (
        ("cubes attended", "attention_density", "{:.1%}"),
        ("FFN active", "ffn_density", "{:.1%}"),
        ("FLOPs of dense", "flops_ratio", "{:.1%}"),
    ):
        accounts = [answer.account for answer in runs.values()]
        rows.append((title, [form.format(a[key]) if a else "unknown" for a in accounts]))
    if len(runs) > 1:
        lines.append(f"{columns[0]:<16}" + "".join(f"{name:>12}" for name in columns[1:]))
    lines += [f"{title:<16}" + "".join(f"{cell:>12}" for cell in cells) for title, cells in rows]
    lines.append(f"and once: decode {times['decode']:.2f} s, engine start {times['start']:.2f} s")
    return "\n".join(lines)
