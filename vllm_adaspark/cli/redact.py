"""Keeps keys, tokens and passwords out of what the command line prints.

``serve`` prints the command that it becomes, and messages repeat what was given; both end up in
logs.  vLLM hides the values of ``api_key``, ``hf_token`` and ``watermark_config`` where it logs its
arguments, as ``***``.  This module does the same wherever a secret may stand in an argument: after
an option in each of vLLM's spellings (``--api-key A B``, ``--api_key=A``, ``--config.token A``), in
JSON at any depth, in ``NAME=value`` and ``Name: value``, in a URL.  What is a secret is told by its
name; a value too many is hidden rather than one too few.
"""

from __future__ import annotations

import json
import re
from typing import Any

HIDDEN = "***"

# vLLM's own list (entrypoints/serve/utils/api_utils.py) is these, of which its parser also takes
# the beginning, and watermark_config.
OPTIONS = ("--api-key", "--hf-token")

# A name is a secret's if one of its words is among the first, or its last word among the second.
WORDS = {
    *("secret", "secrets", "password", "passwords", "passwd", "passphrase", "credential"),
    *("credentials", "authorization", "apikey", "apikeys", "bearer", "signature"),
}
LAST_WORDS = {"key", "keys", "token", "auth"}
# Plural "tokens" are mostly numbers of tokens (--max-num-batched-tokens).
TOKENS_OF = {"access", "api", "auth", "bearer", "hf", "hub"}

NAMED = re.compile(r"""(?<![\w./-])([A-Za-z][\w.-]*)\\*["']?\s*[=:]\s*\\*""")
VALUE = re.compile(r"""(["'])(.*?)(?:\1|\Z)|[\[{].*|[^\s"',;&}]*""", re.DOTALL)
HEADER = re.compile(r"""(?i)(authorization["']?\s*[=:]\s*["']?)[^"'\n]+""")
SCHEME = re.compile(r"(?i)\b(bearer|basic)\s+[^\s\"']+")
IN_URL = re.compile(r"(\b\w+://)[^/\s@\"']+@")
OPTION = re.compile(r"(?<![\w-])(--[\w.+-]+)((?:[ =]+(?!-)\S+)+)")
SPECIAL_TOKEN = re.compile(r"<.*>|\[.*\]")  # of a tokenizer: "<|image_pad|>"


def is_secret(name: str) -> bool:
    """Whether a value of this name is to be hidden: an option, a JSON key or a variable."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    words = [word for word in re.split(r"[^a-z0-9]+", words) if word]
    if not words:
        return False
    tokens = words[-1] == "tokens" and not TOKENS_OF.isdisjoint(words)
    watermark = words[0] == "watermark" and len(words) > 1  # --watermark itself is a share
    return not WORDS.isdisjoint(words) or words[-1] in LAST_WORDS or tokens or watermark


def redact_arguments(arguments: list[str]) -> list[str]:
    """A copy of an argument list that can be shown."""
    shown, hiding = [], False
    for argument in arguments:
        if not argument.startswith("-"):
            shown.append(HIDDEN if hiding else _redact_value(argument))
            continue
        option, equals, value = argument.partition("=")
        hiding = _is_secret_option(option)
        if equals:
            value = HIDDEN if hiding else _redact_value(value)
        shown.append(option + equals + value)
    return shown


def redact_text(text: str) -> str:
    """A message that can be shown; it may hold options, JSON, headers and URLs."""
    text = OPTION.sub(_hide_after_option, text)
    text = HEADER.sub(rf"\1{HIDDEN}", text)
    text = SCHEME.sub(rf"\1 {HIDDEN}", text)
    text = IN_URL.sub(rf"\1{HIDDEN}@", text)
    return _hide_named(text)


def _is_secret_option(option: str) -> bool:
    whole = option.replace("_", "-")
    if len(whole) > 2 and any(secret.startswith(whole) for secret in OPTIONS):
        return True
    return any(map(is_secret, option.lstrip("-").rstrip("+").split(".")))


def _redact_value(text: str) -> str:
    """One argument that is no option, or what stands after an option's ``=``."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, (dict, list)):
        return redact_text(text)
    hidden = _hide_in(value)
    return text if hidden == value else json.dumps(hidden)  # as it was written, if it can be


def _hide_in(value: Any, secret: bool = False) -> Any:
    """JSON with its secrets hidden; ``secret``: it stands under a secret's name."""
    if isinstance(value, dict):
        return {key: _hide_in(one, secret or is_secret(key)) for key, one in value.items()}
    if isinstance(value, list):
        return [_hide_in(one, secret) for one in value]
    if isinstance(value, str):
        return _hidden(value) if secret else _redact_value(value)
    return value  # a number or a switch is no key


def _hidden(value: str) -> str:
    return value if not value or SPECIAL_TOKEN.fullmatch(value) else HIDDEN


def _hide_after_option(found: re.Match[str]) -> str:
    option, values = found.groups()
    return option + re.sub(r"[^ =]\S*", HIDDEN, values) if _is_secret_option(option) else found[0]


def _hide_named(text: str) -> str:
    """The text with ``***`` for what follows a secret's name and ``=`` or ``:``."""
    parts, at = [], 0
    while found := NAMED.search(text, at):
        value = VALUE.match(text, found.end()) if is_secret(found[1]) else None
        parts.append(text[at : found.end()])
        at = found.end()
        if value is not None:
            inside = value[0] if value[1] is None else value[2]
            parts.append(value[0].replace(inside, _hidden(inside), 1))
            at = value.end()
    return "".join([*parts, text[at:]])
