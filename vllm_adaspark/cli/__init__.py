"""The command ``vllm-adaspark``: serve, ask, inspect, tune, doctor and analyze.

A subcommand's module is imported when it is called, and vLLM only when it is needed, so ``--help``
is quick and works without vLLM.  Such a module has ``add_parser(subparsers, arguments)``, which
sees the arguments because ``--method`` says which flags there are, and ``run(args)``, which returns
the exit code.  Exit codes: 0 done, 1 failed, 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from .redact import redact_text

PROGRAM = "vllm-adaspark"
COMMANDS = {
    "serve": "start an OpenAI-compatible server (vllm serve with a sparsity method)",
    "ask": "ask one question about a video, without a server",
    "inspect": "tell what a video costs: tokens, FLOPs, memory and the flags it needs",
    "tune": "find the cheapest setting for your model, your videos and questions",
    "doctor": "look for what is wrong with this installation, and say how to mend it",
    "analyze": "draw the paper's analysis plots for a model and a video",
}


class UsageError(Exception):
    """A wrong argument: its message goes to stderr, the exit code is 2."""


class CommandError(Exception):
    """Something failed: its message goes to stderr, the exit code is 1."""


class Parser(argparse.ArgumentParser):
    """argparse's, whose messages show no keys."""

    def error(self, message: str) -> NoReturn:
        super().error(redact_text(message))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {name: text for name, text in COMMANDS.items() if _exists(name)}
    parser = Parser(
        prog=PROGRAM,
        description="Long video on vLLM at a fraction of the FLOPs (Qwen2.5-VL, LLaVA-OneVision).",
        epilog=f"'{PROGRAM} COMMAND --help' tells more of each.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    chosen = argv[0] if argv and argv[0] in commands else None
    for name, text in commands.items():
        if name != chosen:
            subparsers.add_parser(name, help=text)
    if chosen is None:
        if argv and not argv[0].startswith("-"):
            parser.error(_unknown(argv[0], commands))
        if not argv:
            parser.print_help()
            return 2
        parser.parse_args(argv)
        return 2

    module = importlib.import_module(f"{__name__}.{chosen}")
    try:
        module.add_parser(subparsers, argv)
        args, args.rest = parser.parse_known_args(argv)
        if args.rest and not getattr(module, "PASSES_ON", False):  # to vLLM
            own = subparsers.choices[chosen]
            own.error(_unrecognized(args.rest, own))
        return module.run(args)
    except UsageError as error:
        print(f"{PROGRAM} {chosen}: error: {redact_text(str(error))}", file=sys.stderr)
        return 2
    except (CommandError, OSError) as error:  # a file that may not be read, a full disk
        print(f"{PROGRAM} {chosen}: {redact_text(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _exists(name: str) -> bool:
    return importlib.util.find_spec(f"{__name__}.{name}") is not None


def _unrecognized(words: list[str], parser: argparse.ArgumentParser) -> str:
    known = [name for action in parser._actions for name in action.option_strings]
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    close = [m for name in options for m in difflib.get_close_matches(name, known, n=1)]
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"unrecognized arguments: {' '.join(words)}{hint}"


def _unknown(word: str, commands: dict[str, str]) -> str:
    close = difflib.get_close_matches(word, commands, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown command {word!r}{hint}; commands: {', '.join(commands)}"
