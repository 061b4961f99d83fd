"""``vllm-adaspark inspect``: what a video would cost, and the flags it needs; starts nothing."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

from . import PROGRAM, UsageError
from .settings import add_sampling, add_settings, checked, given_settings, method_named

MOST_FRAMES = 2**31 - 1  # of a file, whose containers count in 32 bits
NUMBER = r"(\d+(?:\.\d+)?)"
LENGTH = re.compile(f"(?:{NUMBER}h)?(?:{NUMBER}m)?(?:{NUMBER}s?)?")  # 90s, 10m, 1h30m


def add_parser(subparsers: Any, arguments: Sequence[str] = ()) -> None:
    """Add this subcommand."""
    parser = subparsers.add_parser(
        "inspect",
        help="tell what a video costs",
        description="Tell what a question about a video costs: tokens, FLOPs, memory, flags. "
        "Neither the model's weights nor a GPU are needed.",
        epilog=f"An hour of HD video: {PROGRAM} inspect --duration 1h --size 1280x720 --model 7b",
    )
    parser.add_argument(
        "video", nargs="?", metavar="VIDEO", help="path or URL; or --duration and --size instead"
    )
    parser.add_argument(
        "--model",
        default="7b",
        help="a checkpoint's folder or name, or 3b, 7b (default), 32b, 72b, onevision-0.5b, "
        "onevision-7b",
    )
    parser.add_argument("--duration", help="without VIDEO: its length, e.g. 90s, 10m, 1h, 1h30m")
    parser.add_argument("--size", help="without VIDEO: width x height, e.g. 1280x720")
    parser.add_argument(
        "--source-fps", type=float, default=30.0, help="without VIDEO: its frame rate (30)"
    )
    parser.add_argument(
        "--text-tokens", type=int, default=64, help="tokens of the prompt's text (64)"
    )
    parser.add_argument(
        "--answer-tokens", type=int, default=1024, help="tokens left for the answer (1024)"
    )
    parser.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "fp8"),
        default="auto",
        help="as in vLLM (auto: 16 bit)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_sampling(parser)
    add_settings(parser, method_named(arguments))


def run(args: argparse.Namespace) -> int:
    """Print what it costs."""
    from ..accounts import cost as costs
    from ..models.layout import LayoutError
    from . import media

    checked(args.settings_class, given_settings(args))
    model = media.find_model(args.model)
    sampling = media.sampling(args, model.rules)
    for name in ("text_tokens", "answer_tokens"):
        value, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if value < 1:
            raise UsageError(f"{option} {value}: expected 1 or more")
        if value > model.max_positions:
            raise UsageError(
                f"{option} {value}: more than the model's {model.max_positions:,} positions"
            )
    if args.video is None:
        video = _imagined(args)
    elif args.duration or args.size:
        raise UsageError("VIDEO and --duration or --size: give a video, or both of those")
    else:
        video = media.probe(media.read_video(args.video), args.video)
    config = checked(
        args.settings_class,
        given_settings(args),
        checkpoint=args.settings_class.of_checkpoint(model.config),
    )
    try:
        cost = costs.cost(
            model,
            video,
            config,
            sampling,
            text_tokens=args.text_tokens,
            answer_tokens=args.answer_tokens,
            kv_element_bytes=1 if args.kv_cache_dtype == "fp8" else 2,
        )
    except LayoutError as error:
        raise UsageError(str(error)) from None
    flags = _flags(args, cost, model.rules.flags(sampling))
    if args.json:
        about = {"frames": video.frames, "fps": video.fps, "seconds": video.seconds}
        about["size"] = [video.width, video.height]
        if video.remarks:
            about["remarks"] = list(video.remarks)
        settings = config.to_dict()
        report = {"model": model.name, "video": about, "settings": settings, "flags": flags}
        print(json.dumps(report | {"cost": cost.to_dict()}, indent=2))
    else:
        print(render(model, video, config, cost, flags, kv_dtype=args.kv_cache_dtype))
    return 0


def _imagined(args: argparse.Namespace):
    """The video that ``--duration`` and ``--size`` describe."""
    from ..models.layout import Video

    if not args.duration or not args.size:
        raise UsageError(
            "give a VIDEO, or --duration and --size, e.g. --duration 1h --size 1280x720"
        )
    size = re.fullmatch(r"(\d+)x(\d+)", args.size.lower())
    if size is None or not int(size[1]) or not int(size[2]):
        raise UsageError(f"--size {args.size!r}: expected width x height, e.g. 1280x720")
    parts = LENGTH.fullmatch(args.duration)
    seconds = 0.0
    if parts is not None:
        seconds = sum(float(part or 0) * unit for part, unit in zip(parts.groups(), (3600, 60, 1)))
    if not seconds > 0:
        raise UsageError(f"--duration {args.duration!r}: expected a length, e.g. 90s, 10m or 1h30m")
    if not args.source_fps > 0:
        raise UsageError(f"--source-fps {args.source_fps:g}: expected a number above 0")
    frames = seconds * args.source_fps
    if not frames <= MOST_FRAMES:
        raise UsageError(
            f"--duration {args.duration} and --source-fps {args.source_fps:g}: {frames:.3g} frames "
            f"are more than any file's ({MOST_FRAMES})"
        )
    return Video(round(frames), args.source_fps, int(size[1]), int(size[2]))


def _flags(args: argparse.Namespace, cost: Any, of_frames: list[str]) -> list[str]:
    """Options of ``vllm serve`` (and ours, which are the same) that this video needs."""
    flags = [
        f"--max-model-len {cost.max_model_len}",
        f"--max-num-batched-tokens {cost.max_num_batched_tokens}",
        *of_frames,
    ]
    if args.kv_cache_dtype != "auto":
        flags.append(f"--kv-cache-dtype {args.kv_cache_dtype}")
    return flags


def render(model, video, config, cost, flags: list[str], *, kv_dtype: str) -> str:
    """The report as text."""
    t, h, w = cost.grid
    high, wide = cost.resized
    dropped = f", {cost.dropped_tokens:,} of them dropped" if cost.dropped_tokens else ""
    sums = (
        f", and {_bytes(cost.key_sum_bytes)} of key {config.key_summary}"
        if cost.key_sum_bytes
        else ""
    )
    rows = [
        ("model", model.name),
        (
            "video",
            f"{_clock(video.seconds)}, {video.width}x{video.height}, {video.frames:,} frames at "
            f"{video.fps:.4g} per second",
        ),
        *(("", f"note: {remark}") for remark in video.remarks),
        (
            "sampled",
            f"{cost.frames:,} frames of {wide}x{high} (one every "
            f"{video.seconds / cost.frames:.2f} s)",
        ),
        (
            "tokens",
            f"{cost.video_tokens:,} = {t} x {h} x {w}{dropped}; prompt {cost.prompt_tokens:,}",
        ),
        *(
            [("cubes", f"{cost.cubes:,} of {config.cube_volume} tokens (one KV block each)")]
            if sums
            else []
        ),
        ("", ""),
        ("FLOPs, dense", f"{_si(cost.dense_flops)}FLOPs for the prompt"),
        ("FLOPs, sparse", _spent(config, cost)),
        *([("of attention", _attention(cost))] if config.enabled and cost.flops_by_part else []),
        ("", ""),
        (
            "KV cache",
            f"{_bytes(cost.kv_bytes)} ({'fp8' if kv_dtype == 'fp8' else '16 bit'}){sums}",
        ),
        ("encoder cache", _bytes(cost.encoder_cache_bytes)),
        ("weights", _bytes(cost.weights_bytes) if cost.weights_bytes else "unknown"),
        ("host memory", f"{_bytes(cost.host_bytes)} while the video is read and cut"),
        ("", ""),
    ]
    lines = [f"{name:<16} {text}".rstrip() for name, text in rows]
    if cost.fits:
        lines += ["needs", *(f"  {flag}" for flag in flags)]
    else:
        lines += [
            f"does not fit: the model has {model.max_positions:,} positions. What would:",
            *(f"  {way}" for way in ways_to_fit(cost, model)),
        ]
    return "\n".join(lines)


class TooLong(UsageError):
    """A prompt that the model has too few positions for."""


def fitting_cost(model: Any, video: Any, config: Any, sampling: Any, **tokens: int) -> Any:
    """``cost.cost`` of a question about a video.

    Raises:
        UsageError: it cannot be asked; ``TooLong``: the model has too few positions for it.
    """
    from ..accounts import cost as costs
    from ..models.layout import LayoutError

    try:
        cost = costs.cost(model, video, config, sampling, **tokens)
    except LayoutError as error:
        raise UsageError(str(error)) from None
    if not cost.fits:
        raise TooLong(
            f"the prompt has {cost.prompt_tokens:,} tokens, with its answer more than the model's "
            f"{model.max_positions:,} positions hold; what fits: "
            f"{' or '.join(ways_to_fit(cost, model))}"
        )
    return cost


def ways_to_fit(cost: Any, model: Any) -> list[str]:
    """Options with which a video that does not fit would."""
    options = {"--max-frames": cost.fitting_frames, "--max-pixels": cost.fitting_pixels}
    ways = [f"{name} {value}" for name, value in options.items() if value is not None]
    if cost.prompt_tokens < model.max_positions:
        ways.append("a shorter answer")
    return ways or ["a shorter video: not even the fewest and smallest frames fit"]


def _spent(config: Any, cost: Any) -> str:
    if not config.enabled:
        return "off: the same"
    if cost.flops is None:
        return "not estimated for this method; 'ask' and usage.adaspark count them"
    return f"{_si(cost.flops)}FLOPs, {cost.flops_ratio:.1%} of dense{cost.flops_note}"


def _attention(cost: Any) -> str:
    """What attention and all that serves it spends, by part, as shares of dense attention."""
    shares = {
        part: flops / cost.dense_attention_flops
        for part, flops in cost.flops_by_part.items()
        if part not in ("qkvo", "ffn")
    }
    parts = ", ".join(f"{part} {share:.1%}" for part, share in shares.items())
    return f"{sum(shares.values()):.1%} of dense attention: {parts}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{seconds:04.1f}"


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:,.0f} {unit}" if number >= 1000 else f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:,.2f} GiB"


def _si(value: float) -> str:
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.4g} "
