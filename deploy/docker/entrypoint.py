#!/usr/bin/env python3
"""Container entry: check the settings, then become the server.

    docker run vllm-adaspark [MODEL] [options of `vllm-adaspark serve` and of `vllm serve`]

Read from the environment; an empty variable counts as unset:

    MODEL               model name or folder, where no argument names one
    METHOD              adaspark, adatp or videonsa; by default what the checkpoint was trained for
    ADASPARK            the method's settings as a JSON object, or one word: "off" is dense
    HTTP                1 (default): cost in the usage, AdaSpark's metrics, viewer; 0: none of it
    HOST, PORT          where to listen; default 0.0.0.0 and 8000
    VLLM_ARGS           further options, quoted as for a shell
    VLLM_API_KEY_FILE   file that holds the API key (or VLLM_API_KEY itself)
    HF_TOKEN_FILE       file that holds the Hugging Face token (or HF_TOKEN itself)

A wrong setting ends the container at once with exit code 2 and a message that names the variable,
not minutes later with a traceback.  Else it becomes `vllm-adaspark serve`, and that becomes vLLM:
the same process all along, so signals reach the server.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from vllm_adaspark.cli import UsageError
from vllm_adaspark.cli import main as vllm_adaspark
from vllm_adaspark.cli.redact import redact_text
from vllm_adaspark.cli.settings import method_named
from vllm_adaspark.methods import built_in, settings_class
from vllm_adaspark.settings import SettingsError

KEY_FILES = {"VLLM_API_KEY_FILE": "VLLM_API_KEY", "HF_TOKEN_FILE": "HF_TOKEN"}
READ = ("MODEL", "METHOD", "ADASPARK", "HTTP", "HOST", "PORT", "VLLM_ARGS")
MAY_BE_EMPTY = {*READ, *KEY_FILES, *KEY_FILES.values()}  # as compose passes what nobody set
WRONG_SETTING = 2


class SettingError(ValueError):
    """A variable or argument that cannot be used; the message names it, its value and the fix."""


def command(arguments: list[str], env: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The arguments of `vllm-adaspark`, and keys to add to the environment.

    Args:
        arguments: the container's arguments; the first is the model unless it is an option.
        env: the container's environment.

    Raises:
        SettingError: something is missing, contradicts itself or is out of range.
    """
    env = {name: value for name, value in env.items() if value or name not in MAY_BE_EMPTY}
    model, options = _model(arguments, env)
    options += _split(env)
    options += _method(options, env)
    ours = [*_http(env), *_additional_config(model, options, env), *_address(options, env)]
    return ["serve", model, *ours, *options], _keys(env)


def _model(arguments: list[str], env: Mapping[str, str]) -> tuple[str, list[str]]:
    named = env.get("MODEL")
    if arguments and not arguments[0].startswith("-"):
        given, *options = arguments
        if named and named != given:
            raise SettingError(
                f"MODEL={named!r} and the first argument {given!r} name different models: "
                "leave one of them out"
            )
        return given, options
    if not named:
        raise SettingError(
            "no model: set MODEL, or give its name as the first argument, "
            "e.g. Qwen/Qwen2.5-VL-7B-Instruct"
        )
    return named, list(arguments)


def _split(env: Mapping[str, str]) -> list[str]:
    text = env.get("VLLM_ARGS", "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise SettingError(f"VLLM_ARGS={text!r}: {error}; quote it as for a shell") from None


def _http(env: Mapping[str, str]) -> list[str]:
    http = env.get("HTTP", "1")
    if http not in ("0", "1"):
        raise SettingError(f"HTTP={http!r}: expected 1 or 0")
    return ["--http" if http == "1" else "--no-http"]


def _method(options: list[str], env: Mapping[str, str]) -> list[str]:
    """The option that carries METHOD, if it is set."""
    named = env.get("METHOD")
    if named is None:
        return []
    if _has(options, "--method"):
        raise SettingError(f"METHOD={named!r} and --method are both set: leave one of them out")
    if named not in built_in() and ":" not in named:
        raise SettingError(f"METHOD={named!r}: expected one of {', '.join(built_in())}")
    return ["--method", named]


def _additional_config(model: str, options: list[str], env: Mapping[str, str]) -> list[str]:
    """The option that carries ADASPARK, if it is set; the method's own class checks its values."""
    text = env.get("ADASPARK")
    if text is None:
        return []
    try:
        method = settings_class(method_named(options, model))
    except (SettingsError, UsageError) as error:
        raise SettingError(str(error)) from None
    word = text.strip()
    try:
        settings = {word: True} if word in method.words else json.loads(text)
    except json.JSONDecodeError as error:
        words = ", ".join(map(repr, method.words))
        raise SettingError(
            f"ADASPARK={text!r}: neither JSON nor {words} ({error}); "
            f"""write for example ADASPARK='{{"cube": [4, 4, 4]}}'"""
        ) from None
    try:
        method().override(settings, source="ADASPARK")
    except SettingsError as error:
        raise SettingError(str(error)) from None
    return ["--additional-config", json.dumps({"adaspark": settings})]


def _address(options: list[str], env: Mapping[str, str]) -> list[str]:
    port = env.get("PORT", "8000")
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise SettingError(f"PORT={port!r}: expected a number from 1 to 65535")
    if _has(options, "--port"):
        raise SettingError("--port: set PORT instead, which the health check reads too")
    host = [] if _has(options, "--host") else ["--host", env.get("HOST", "0.0.0.0")]
    return [*host, "--port", port]


def _has(options: list[str], name: str) -> bool:
    """Whether an option is given, in any of vLLM's spellings: `-` or `_`, `=`, dotted keys."""
    names = (re.split("[=.]", option, maxsplit=1)[0].replace("_", "-") for option in options)
    return name in names


def _keys(env: Mapping[str, str]) -> dict[str, str]:
    """Keys out of mounted files, so that they need not stand in the container's definition."""
    keys = {}
    for variable, key in KEY_FILES.items():
        path = env.get(variable)
        if path is None:
            continue
        if env.get(key):
            raise SettingError(f"{variable}={path!r} and {key} are both set: leave one of them out")
        try:
            keys[key] = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingError(f"{variable}={path!r}: cannot be read ({error})") from None
        if not keys[key]:
            raise SettingError(f"{variable}={path!r}: the file is empty")
    return keys


def main() -> int:
    try:
        arguments, keys = command(sys.argv[1:], os.environ)
    except SettingError as error:
        print(f"entrypoint: {redact_text(str(error))}", file=sys.stderr)
        return WRONG_SETTING
    for name in (*READ, *KEY_FILES):  # read; vLLM would warn of those that begin as its own do
        os.environ.pop(name, None)
    os.environ |= keys
    return vllm_adaspark(arguments)  # does not come back: it becomes vLLM


if __name__ == "__main__":
    sys.exit(main())
