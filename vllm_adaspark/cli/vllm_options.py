"""Reading and merging vLLM's own options in an argument list, without importing vLLM.

vLLM takes an option as ``--name value`` or ``--name=value``, with dashes or underscores, JSON ones
also piecewise (``--name.key value``), and options of a YAML file through ``--config``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import UsageError


def value_of(arguments: list[str], option: str) -> str | None:
    """The last value given for ``option``, "" if it has none, None if it is not there."""
    value = None
    for index, argument in enumerate(arguments):
        name, equals, text = argument.partition("=")
        if not argument.startswith("--") or name.replace("_", "-") != option:
            continue
        following = arguments[index + 1] if index + 1 < len(arguments) else ""
        value = text if equals else ("" if following.startswith("--") else following)
    return value


def take_json(arguments: list[str], option: str) -> tuple[dict[str, Any], list[str]]:
    """The object that ``option`` gives in all its forms, and the arguments without them.

    Raises:
        UsageError: not a JSON object.
    """
    found: dict[str, Any] = {}
    rest, words = [], iter(arguments)
    for argument in words:
        name, equals, value = argument.partition("=")
        key = name.partition(".")[0].replace("_", "-")
        if not argument.startswith("--") or key != option:
            rest.append(argument)
            continue
        if not equals:
            value = next(words, None)
            if value is None:
                raise UsageError(f"{option}: expected a value")
        if "." in name:
            merge(found, _nested(name.split(".")[1:], value))
        else:
            merge(found, json_object(option, value))
    return found, rest


def json_object(option: str, text: str) -> dict[str, Any]:
    """``text`` as a JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"{option} {text!r}: expected a JSON object, e.g. '{{\"name\": 1}}'")
    return value


def from_config_file(arguments: list[str]) -> dict[str, Any]:
    """The options of the YAML file that ``--config`` names, by option; {} without one.

    Raises:
        UsageError: the file cannot be read.
    """
    name = value_of(arguments, "--config")
    if name is None:
        return {}
    import yaml

    try:
        options = yaml.safe_load(Path(name).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"--config {name}: cannot be read: {error}") from None
    if not isinstance(options, Mapping):
        raise UsageError(f"--config {name}: expected options and their values")
    return {"--" + str(key).lstrip("-").replace("_", "-"): value for key, value in options.items()}


def merge(into: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """``more`` laid over ``into``, object by object."""
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value
    return into


def _nested(keys: list[str], text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    for key in reversed(keys):
        value = {key: value}
    return value
