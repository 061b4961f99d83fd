"""``vllm-adaspark serve``: ``vllm serve`` with our architecture and settings filled in.

It adds arguments, prints the command it makes of them, with keys and tokens as ``***``, and becomes
it: signals and exit code are vLLM's own.  Settings that cannot work are refused before vLLM's
seconds of start-up; options of vLLM's that the plugin does not support, by ``startup.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..methods import DEFAULT, OF_ARCHITECTURE
from ..settings import METHOD_KEY, Settings, SettingsError, operator_settings
from . import PROGRAM, CommandError, UsageError
from .checkpoints import architecture_of, config_of
from .redact import redact_arguments
from .settings import (
    ADDITIONAL,
    add_settings,
    checked,
    given_settings,
    method_named,
    refuse_misspelt,
)
from .vllm_options import from_config_file, json_object, merge, take_json, value_of

PASSES_ON = True  # unknown options are vLLM's

PLUGIN, HTTP_PLUGIN = "adaspark", "adaspark_http"
# Groups that load every plugin unless VLLM_PLUGINS names some.
OPEN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)


def add_parser(subparsers: Any, arguments: Sequence[str] = ()) -> None:
    """Add this subcommand."""
    parser = subparsers.add_parser(
        "serve",
        help="start an OpenAI-compatible server",
        allow_abbrev=False,
        usage=f"{PROGRAM} serve MODEL [options below] [any option of vllm serve]",
        description="Start 'vllm serve MODEL' with AdaSpark: prints the command and becomes it.",
        epilog="'vllm serve --help=all' lists vLLM's options; videos usually want "
        f"--max-num-batched-tokens, see '{PROGRAM} inspect'.",
    )
    given = next(iter(arguments[1:2]), "-")
    add_settings(parser, method_named(arguments, None if given.startswith("-") else given))
    group = parser.add_argument_group("server")
    group.add_argument(
        "--request-settings",
        action="store_true",
        help="let requests set their own AdaSpark settings (adds --trust-request-mm-kwargs). "
        "Risk: vLLM then also lets clients set the video processor's other options, such as "
        "max_pixels, with which one request can take much memory and time; for trusted clients",
    )
    group.add_argument(
        "--http",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="usage.adaspark in answers, metrics, and the viewer at /adaspark/ (default: on); "
        f"names {HTTP_PLUGIN} in VLLM_PLUGINS",
    )
    group.add_argument(
        "--print",
        action="store_true",
        help="print the command, with keys and tokens as ***; start nothing",
    )


def run(args: argparse.Namespace) -> int:
    """Print the command and, without ``--print``, become it."""
    arguments, added = command(args)
    program, shown = _executable()
    line = [f"{key}={shlex.quote(value)}" for key, value in added.items()]
    shown = [*shown, *redact_arguments(arguments)]
    print(" ".join([*line, shlex.join(shown)]), flush=True)
    if args.print:
        return 0
    try:
        os.execvpe(program[0], [*program, *arguments], {**os.environ, **added})
    except OSError as error:
        raise CommandError(f"{program[0]} cannot be started: {error}") from None


def command(args: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The arguments of ``vllm`` and the environment variables to add.

    Raises:
        UsageError: something that cannot be used, or that does not go together.
    """
    refuse_misspelt(args)
    file = from_config_file(args.rest)
    given = args.rest[0] if args.rest and not args.rest[0].startswith("-") else None
    model = given or value_of(args.rest, "--model") or file.get("--model")
    if not model:
        raise UsageError(f"no MODEL given; e.g. {PROGRAM} serve Qwen/Qwen2.5-VL-7B-Instruct")
    if not args.print:  # which may be meant for another machine
        _refuse_missing(str(model))

    overrides, rest = _json_option(args.rest, "--hf-overrides", file)
    additional, rest = _json_option(rest, ADDITIONAL, file)
    checkpoint = config_of(str(model), value_of(rest, "--revision"))
    architecture = architecture_of(str(model), checkpoint)
    named = overrides.get("architectures", [architecture])
    if named != [architecture]:
        raise UsageError(
            f"--hf-overrides architectures={named!r}: it must be [{architecture!r}], which is "
            "filled in if it is left out"
        )
    cls = args.settings_class
    try:
        settings = operator_settings(additional, cls) or {}
    except SettingsError as error:
        raise UsageError(str(error)) from None
    if isinstance(settings, str) and settings in cls.words:
        settings = {settings: True}
    if not isinstance(settings, dict):
        raise UsageError(f"{ADDITIONAL} {PLUGIN}={settings!r}: expected an object")
    settings = settings | given_settings(args)
    trained = cls.of_checkpoint(checkpoint | overrides)
    config = checked(cls, settings, f"{ADDITIONAL} {PLUGIN}", trained)
    _refuse_block_size(rest, file, config)

    arguments = ["serve", *rest]
    arguments += ["--hf-overrides", json.dumps(overrides | {"architectures": [architecture]})]
    if args.method != OF_ARCHITECTURE.get(architecture, DEFAULT):
        additional[METHOD_KEY] = args.method
    if settings:
        additional[PLUGIN] = settings
    if additional:
        arguments += [ADDITIONAL, json.dumps(additional)]
    trusting = "--trust-request-mm-kwargs"
    if args.request_settings and value_of(rest, trusting) is None:
        arguments.append(trusting)
    return arguments, _plugins(args.http)


def _refuse_missing(model: str) -> None:
    """Refuse a path that is no checkpoint; vLLM would take it for a name on the hub."""
    folder = Path(model)
    if not folder.exists() and model.startswith(("/", "./", "../", "~")):
        raise UsageError(f"MODEL {model!r}: no such folder")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UsageError(f"MODEL {model!r}: no config.json in it; give a checkpoint")


def _json_option(
    arguments: list[str], option: str, file: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What the file and then the command line say, merged: vLLM would drop the file's."""
    found, rest = take_json(arguments, option)
    base = file.get(option) or {}
    if isinstance(base, str):
        base = json_object(option, base)
    return merge(dict(base), found), rest


def _refuse_block_size(rest: list[str], file: dict[str, Any], config: Settings) -> None:
    volume = config.cube_volume
    block_size = value_of(rest, "--block-size") or file.get("--block-size")
    if block_size is not None and str(block_size) != str(volume):
        raise UsageError(
            f"--block-size {block_size} does not match cube={list(config.cube)}, which holds "
            f"{volume} tokens; leave --block-size out, set it to {volume}, or choose another --cube"
        )


def _plugins(http: bool) -> dict[str, str]:
    """VLLM_PLUGINS, if it must change.

    vLLM loads endpoint plugins only if it names them; but once set it names all plugins of all
    kinds, so those that loaded without it are named too.
    """
    present = os.environ.get("VLLM_PLUGINS")
    if present is None and not http:
        return {}
    if present is None:
        found = {point.name for group in OPEN_GROUPS for point in entry_points(group=group)}
        names = sorted(found - {PLUGIN})
    else:
        names = [name for name in present.split(",") if name]
    wanted = [PLUGIN, HTTP_PLUGIN] if http else [PLUGIN]
    others = [name for name in names if name not in (PLUGIN, HTTP_PLUGIN)]
    return {"VLLM_PLUGINS": ",".join([*wanted, *others])}


def _executable() -> tuple[list[str], list[str]]:
    """vLLM's command of this Python installation, and how to write it in a shell."""
    if find_spec("vllm") is None:
        raise CommandError(
            "vLLM is not installed; pip install 'vllm-adaspark[gpu]', or on a CPU machine see "
            "deploy/cpu/README.md"
        )
    beside = Path(sys.executable).with_name("vllm")
    if not beside.exists():
        module = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
        return module, module
    found = shutil.which("vllm")
    on_path = found is not None and Path(found).resolve() == beside.resolve()
    return [str(beside)], ["vllm" if on_path else str(beside)]
