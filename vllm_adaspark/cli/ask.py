"""``vllm-adaspark ask``: one question about one video, without a server."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from . import CommandError, UsageError
from .settings import (
    add_sampling,
    add_settings,
    checked,
    given_settings,
    method_named,
    refuse_misspelt,
    request_settings,
)

PASSES_ON = True  # unknown options are vLLM's


def add_parser(subparsers: Any, arguments: Sequence[str] = ()) -> None:
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
    add_settings(parser, method_named(arguments))


def run(args: argparse.Namespace) -> int:
    """Ask, and print answer, times and account."""
    from . import media, offline
    from .inspect import fitting_cost

    refuse_misspelt(args)
    settings = given_settings(args)
    checked(args.settings_class, settings)
    model = media.find_model(args.model, args.revision)
    sampling = media.sampling(args, model.rules)
    config = checked(
        args.settings_class, settings, checkpoint=args.settings_class.of_checkpoint(model.config)
    )
    _check(args, config)
    with ExitStack() as stack:
        file = stack.enter_context(offline.video_file(args.video))
        # All that can be refused is refused before the engine starts.
        video = media.probe(file.read_bytes(), args.video)
        for remark in video.remarks:
            offline.say(f"VIDEO: {remark}")
        cost = fitting_cost(model, video, config, sampling, answer_tokens=args.max_tokens + 256)
        offline.prepare_environment()
        rest = [*args.rest, *(["--revision", args.revision] if args.revision else [])]
        options = offline.engine_options(model, sampling, file.resolve().parent, rest)
        offline.say("starting the engine")
        engine = offline.engine(options, model, args.method, settings, config.cube_volume, cost)
        llm = stack.enter_context(engine)
        question = offline.Question(file, args.question, args.max_pixels)

        def ask(request: Any) -> offline.Answer:
            return offline.ask(llm, question, request, max_tokens=args.max_tokens, quiet=args.json)

        # Named by the request too, since a budget that cannot be met is refused only there.
        ours = request_settings(settings, args.settings_class)
        runs = {
            "sparse" if config.enabled else "off": ask(
                ours | ({"trace": True} if args.picture else {})
            )
        }
        if args.picture:
            _save_picture(llm, args.picture)
        if args.dense:
            runs["dense"] = ask("off")

    if args.json:
        print(json.dumps(_report(args, model, config, cost, runs), indent=2))
    else:
        print(render(runs))
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
    if not getattr(config, "sparse_attention", config.enabled):
        raise UsageError("--picture: dense attention attends to every cube; leave --off out")
    if args.picture.suffix.lower() != ".png":
        raise UsageError(f"--picture {args.picture}: expected a name that ends in .png")
    if not args.picture.absolute().parent.is_dir():
        raise UsageError(f"--picture {args.picture}: no such folder")


def _save_picture(llm: Any, path: Path) -> None:
    """The latest trace, which is that of the request that just ended."""
    from ..traces.picture import save_heatmap
    from ..traces.reader import read_offline

    try:
        save_heatmap(read_offline(llm), path)
    except (LookupError, OSError, ValueError) as error:
        raise CommandError(f"--picture {path}: {error}") from None


def _report(args, model, config, cost, runs) -> dict[str, Any]:
    return {
        "model": model.name,
        "question": args.question,
        "settings": config.to_dict(),
        "cost": cost.to_dict(),
        "picture": str(args.picture) if args.picture else None,
        "runs": {
            name: {
                "answer": answer.text,
                "tokens": answer.tokens,
                "prompt_tokens": len(answer.prompt_token_ids),
                "seconds": answer.seconds,
                "account": answer.account,
            }
            for name, answer in runs.items()
        },
    }


def render(runs: dict[str, Any]) -> str:
    """Answers, times and accounts as text."""
    lines, answers = [], runs.values()
    for name, answer in runs.items():
        lines += [f"{name}: {answer.text}" if len(runs) > 1 else answer.text, ""]
    rows = [
        ("prompt tokens", [f"{len(answer.prompt_token_ids):,}" for answer in answers]),
        ("answer tokens", [f"{answer.tokens:,}" for answer in answers]),
    ]
    for stage in ("read", "prefill", "answer", "total"):
        rows.append((f"{stage}, s", [f"{answer.seconds[stage]:.2f}" for answer in answers]))
    shares = {"attention_density": "attention density", "ffn_density": "FFN density"}
    told = {name: [answer.account[name] for answer in answers] for name in shares}
    alive = [answer.account.get("means", {}).get("alive") for answer in answers]
    if any(share is not None for share in alive):  # whatever a layer sees it runs densely
        shares, told = {"alive": "video tokens alive"}, {"alive": [x or 1 for x in alive]}
    shares["flops_ratio"] = "FLOPs of dense"
    told["flops_ratio"] = [answer.account["flops_ratio"] for answer in answers]
    for name, title in shares.items():
        rows.append((title, [f"{share:.1%}" for share in told[name]]))
    if len(runs) > 1:
        rows.insert(0, ("", list(runs)))
    lines += [f"{title:<18}" + "".join(f"{cell:>12}" for cell in cells) for title, cells in rows]
    return "\n".join(lines)
