"""Flags that several subcommands share: the method, its settings, and which frames are taken.

There is a flag for every field of the method's settings, whose class also checks the values.  Which
method that is must be known before the flags are: ``--method`` is looked for in the arguments
before they are parsed.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Collection, KeysView, Sequence
from dataclasses import fields
from typing import Any

from ..methods import DEFAULT, OF_ARCHITECTURE, built_in, settings_class
from ..settings import METHOD_KEY, OFF, Settings, SettingsError, check_cube_volume
from . import UsageError
from .checkpoints import config_of, trained_for
from .vllm_options import from_config_file, json_object, take_json, value_of

ADDITIONAL = "--additional-config"


def method_named(arguments: Sequence[str], model: str | None = None) -> str:
    """The method that the arguments ask for, or the one that the checkpoint was trained for.

    Args:
        arguments: the command's: ``--method``, or vLLM's ``--additional-config`` with it.
        model: the checkpoint's folder or name; by default what ``--model`` says.

    Raises:
        UsageError: both options name one, and not the same.
    """
    arguments = list(arguments)
    flag = value_of(arguments, "--method")
    model = model or value_of(arguments, "--model")
    try:
        file = from_config_file(arguments)
        model = model or file.get("--model")
        in_file = file.get(ADDITIONAL) or {}
        if isinstance(in_file, str):
            in_file = json_object(ADDITIONAL, in_file)
        told = take_json(arguments, ADDITIONAL)[0].get(METHOD_KEY, in_file.get(METHOD_KEY))
    except UsageError:  # the command itself says so, once its flags are parsed
        told = None
    if flag is not None and told is not None and flag != told:
        raise UsageError(
            f"--method {flag} and {ADDITIONAL} {METHOD_KEY}={told!r}: leave one of them out"
        )
    named = told if flag is None else flag
    if named is not None:
        return named
    if not model:
        return DEFAULT
    return OF_ARCHITECTURE.get(trained_for(str(model), config_of(str(model))), DEFAULT)


def add_settings(parser: argparse.ArgumentParser, method: str) -> None:
    """Add ``--method``, a flag for every setting and short word of the method, and ``--p``.

    Unset flags leave no trace.

    Raises:
        UsageError: there is no such method.
    """
    parser.add_argument(
        "--method",
        default=method,
        metavar="NAME",
        help=f"{', '.join(built_in())}, or module:class (default: {DEFAULT}); "
        "with --help: the settings of that method",
    )
    group = add_rules(parser, method)
    if {"p_attn", "p_ffn"} <= names(parser.get_default("settings_class")):
        group.add_argument(
            "--p", type=float, metavar="P", help="short for --p-attn P --p-ffn P, 0 < P <= 1"
        )


def add_rules(
    parser: argparse.ArgumentParser, method: str, without: Collection[str] = ()
) -> argparse._ArgumentGroup:
    """Add a flag for every setting and word of a method that is not in ``without``.

    Returns:
        The group of the flags, for a command that adds its own.
    """
    cls = _class_of(method)
    parser.set_defaults(settings_class=cls)
    group = parser.add_argument_group(
        f"settings of {method}", "unset: the defaults of docs/settings.md"
    )
    for word, meaning in cls.words.items():
        if word not in without:
            text = "dense, exactly as the stock model" if word == OFF else f"short for {meaning}"
            group.add_argument(_flag(word), action="store_true", default=None, help=text)
    for spec in fields(cls):
        if spec.name != "enabled" and spec.name not in without:  # --off is there for the first
            _add_setting(group, spec)
    for name in cls.refused:  # taken, so that the settings say why there is no such thing
        group.add_argument(_flag(name), dest=name, type=_value, help=argparse.SUPPRESS)
    return group


def _add_setting(group: argparse._ArgumentGroup, spec: Any) -> None:
    rule = spec.metadata
    if spec.name == "cube":
        options = {"type": _cube, "metavar": "T,H,W"}
    elif isinstance(spec.default, bool):
        on = argparse.BooleanOptionalAction
        options = {"action": on if spec.default else "store_true"}
    elif "choices" in rule:
        options = {"choices": rule["choices"]}
    elif rule.keys() & {"share", "budget", "part"}:
        options = {"type": float, "metavar": "SHARE"}
    elif "check" in rule:
        options = {"type": _value, "metavar": "VALUE"}
    elif isinstance(spec.default, int | float):
        options = {"type": type(spec.default), "metavar": "N"}
    else:
        options = {"metavar": "PATH"}
    default = f" (default: {spec.default})" if spec.default not in (None, False) else ""
    help_text = (rule["doc"] + default).replace("%", "%%")
    group.add_argument(_flag(spec.name), dest=spec.name, default=None, help=help_text, **options)


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


def names(cls: type[Settings]) -> KeysView[str]:
    """The names of a method's settings, in the order in which the class has them."""
    return {spec.name: spec for spec in fields(cls)}.keys()


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the flags name, as a JSON-ready object."""
    cls = args.settings_class
    named = [*names(cls), *cls.words, *cls.refused]
    settings = {name: getattr(args, name, None) for name in named}
    settings = {key: value for key, value in settings.items() if value is not None}
    both = getattr(args, "p", None)  # analyze has another --p
    return ({"p_attn": both, "p_ffn": both} if isinstance(both, float) else {}) | settings


def refuse_misspelt(args: argparse.Namespace) -> None:
    """Refuse what is nearly an option of ours, before vLLM is started to do so in its own words."""
    if wrong := misspelt(args.rest, args.settings_class):
        raise UsageError(f"unknown option {wrong[0]} (did you mean {wrong[1]}?)")


THEIRS = ("--model",)  # vLLM's options that are near one of ours: VideoNSA's --mode


def misspelt(arguments: list[str], cls: type[Settings]) -> tuple[str, str] | None:
    """An option that is nearly one of ours, and ours."""
    ours = [_flag(name) for name in sorted((names(cls) | set(cls.words)) - {"enabled", OFF})]
    ours = [flag.removeprefix("--") for flag in (*ours, "--request-settings")]
    for argument in arguments:
        name = argument.partition("=")[0]
        # Without the dashes, which make short names alike.
        close = difflib.get_close_matches(name.removeprefix("--"), ours, n=1, cutoff=0.8)
        if not argument.startswith("--") or not close or name in THEIRS:
            continue
        if (flag := f"--{close[0]}") != name:
            return name, flag
    return None


def request_settings(settings: dict[str, Any], cls: type[Settings]) -> dict[str, Any]:
    """Those that a request may set."""
    server = {spec.name for spec in fields(cls) if not spec.metadata["request"]}
    return {key: value for key, value in settings.items() if key not in server}


def checked(
    cls: type[Settings],
    settings: dict[str, Any],
    source: str = "settings",
    checkpoint: Any = None,
) -> Settings:
    """What these settings come to, laid over those of a checkpoint's config.json.

    Raises:
        UsageError: the method refuses them.
    """
    try:
        config = cls.settled(checkpoint, settings, source=source)
        check_cube_volume(config)
        return config
    except SettingsError as error:
        raise UsageError(str(error)) from None


def _class_of(method: str) -> type[Settings]:
    try:
        return settings_class(method)
    except SettingsError as error:
        raise UsageError(str(error)) from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _value(text: str) -> Any:
    """JSON, numbers with commas between them, or text; the settings check it."""
    for form in (text, f"[{text}]"):
        try:
            return json.loads(form)
        except ValueError:
            continue
    return text


def _cube(text: str) -> list[int]:
    """``4,4,4`` or ``4x4x4``; the settings check the numbers."""
    try:
        sizes = [int(part) for part in text.replace("x", ",").strip("[]").split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected three whole numbers T,H,W, e.g. 4,4,4"
        )
    return sizes
