"""Flags that several subcommands share: AdaSpark's settings, and which frames are taken.

There is a flag for every field of AdaSparkConfig, which also checks the values.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from ..methods.adaspark.settings import AdaSparkConfig
from ..settings import SettingsError, check_cube_volume
from . import UsageError


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every setting and short word, and ``--p``; unset flags leave no trace."""
    group = add_rules(parser, without=())
    group.add_argument(
        "--p", type=float, metavar="P", help="short for --p-attn P --p-ffn P, 0 < P <= 1"
    )
    group.add_argument(
        "--off", action="store_true", default=None, help="dense, exactly as the stock model"
    )


def add_rules(parser: argparse.ArgumentParser, without: Collection[str]) -> Any:
    """Add ``--paper`` and a flag for every setting that is not in ``without``; returns the group.

    For a command that chooses the others, ``--p`` and ``--off`` included, by itself.
    """
    group = parser.add_argument_group("AdaSpark", "unset: the defaults of docs/settings.md")
    group.add_argument("--paper", action="store_true", default=None, help="the paper's own rules")
    for spec in fields(AdaSparkConfig):
        rule, flag = spec.metadata, _flag(spec.name)
        if spec.name == "enabled" or spec.name in without:
            continue  # --off is there for the first
        if spec.name == "cube":
            options = {"type": _cube, "metavar": "T,H,W"}
        elif isinstance(spec.default, bool):
            options = {"action": "store_true"}
        elif "choices" in rule:
            options = {"choices": rule["choices"]}
        elif rule.keys() & {"share", "budget", "part"}:
            options = {"type": float, "metavar": "SHARE"}
        elif "low" in rule:
            options = {"type": int, "metavar": "N"}
        else:
            options = {"metavar": "PATH"}
        default = f" (default: {spec.default})" if spec.default not in (None, False) else ""
        text = rule["doc"] + default
        group.add_argument(flag, dest=spec.name, default=None, help=text, **options)
    return group


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which frames are taken and how large they may be."""
    group = parser.add_argument_group("frames")
    group.add_argument(
        "--fps", type=float, help="frames taken per second (Qwen: 2; LLaVA-OneVision: no limit)"
    )
    group.add_argument(
        "--max-frames", type=int, help="frames taken at the most (Qwen: 768; LLaVA-OneVision: 32)"
    )
    group.add_argument(
        "--max-pixels", type=int, help="pixels of a frame at the most (the checkpoint's)"
    )


def given_rules(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the flags of :func:`add_rules` name, as a JSON-ready object."""
    settings = {spec.name: getattr(args, spec.name, None) for spec in fields(AdaSparkConfig)}
    settings |= {"off": getattr(args, "off", None), "paper": args.paper}
    return {key: value for key, value in settings.items() if value is not None}


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the flags of :func:`add_settings` name, as a JSON-ready object."""
    settings = given_rules(args)
    if args.p is not None:
        settings = {"p_attn": args.p, "p_ffn": args.p} | settings
    return settings


def refuse_misspelt(arguments: list[str]) -> None:
    """Refuse what is nearly an option of ours, before vLLM is started to do so in its own words."""
    if wrong := misspelt(arguments):
        raise UsageError(f"unknown option {wrong[0]} (did you mean {wrong[1]}?)")


def misspelt(arguments: list[str]) -> tuple[str, str] | None:
    """An option that is nearly one of ours, and ours; no option of vLLM's is that near."""
    ours = [_flag(spec.name) for spec in fields(AdaSparkConfig) if spec.name != "enabled"]
    ours += ["--paper", "--request-settings"]
    for argument in arguments:
        name = argument.partition("=")[0]
        close = difflib.get_close_matches(name, ours, n=1, cutoff=0.8)
        if argument.startswith("--") and close and close[0] != name:
            return name, close[0]
    return None


def request_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Those that a request may set."""
    server = {spec.name for spec in fields(AdaSparkConfig) if not spec.metadata["request"]}
    return {key: value for key, value in settings.items() if key not in server}


def checked(
    settings: dict[str, Any], source: str = "settings", checkpoint: Any = None
) -> AdaSparkConfig:
    """The config that these settings make, laid over those of a checkpoint's config.json.

    Raises:
        UsageError: AdaSparkConfig refuses them.
    """
    try:
        config = AdaSparkConfig.settled(checkpoint, settings, source=source)
        check_cube_volume(config)
        return config
    except SettingsError as error:
        raise UsageError(str(error)) from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _cube(text: str) -> list[int]:
    """``4,4,4`` or ``4x4x4``; AdaSparkConfig checks the numbers."""
    try:
        sizes = [int(part) for part in text.replace("x", ",").strip("[]").split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected three whole numbers T,H,W, e.g. 4,4,4"
        )
    return sizes
