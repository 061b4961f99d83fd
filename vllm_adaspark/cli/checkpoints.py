"""Which of our models a checkpoint is, without asking a network, and without importing torch."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from .. import ARCHITECTURES
from ..methods import OF_ARCHITECTURE
from . import UsageError


def config_of(model: str, revision: str | None = None) -> dict[str, Any]:
    """A checkpoint's config.json, if it is on this machine; {} where only vLLM will know."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    path = Path(os.path.expanduser(model)) / "config.json"
    try:
        cached = (
            None
            if os.path.exists(path)
            else try_to_load_from_cache(model, path.name, None, revision)
        )
        config = json.loads(Path(cached or path).read_text())
    except (OSError, ValueError, TypeError, HFValidationError):
        return {}
    return config if isinstance(config, dict) else {}


def trained_for(model: str, config: dict[str, Any]) -> str | None:
    """The architecture of a checkpoint that was trained for one method; None for any other.

    By its config.json, or where that is not at hand by its name.
    """
    if config:
        named = config.get("architectures") or []
        return next((name for name in named if name in OF_ARCHITECTURE), None)
    found = (name for name, method in OF_ARCHITECTURE.items() if method in _squeezed(model))
    return next(found, None)


def _squeezed(model: str) -> str:
    return re.sub(r"[\W_]", "", model.lower())


def architecture_of(model: str, config: dict[str, Any]) -> str:
    """Our name for a model, by its config.json, or where that is not at hand by its own name.

    A wrong guess is refused when vLLM has the configuration, see startup.py.

    Raises:
        UsageError: it is no model of ours.
    """
    if trained := trained_for(model, config):
        return trained
    model_type = config.get("model_type")
    if model_type is None:
        squeezed = _squeezed(model)
        named = (kind for kind in ARCHITECTURES if kind.replace("_", "") in squeezed)
        model_type = next(named, next(iter(ARCHITECTURES)))
    if model_type not in ARCHITECTURES:
        raise UsageError(
            f"MODEL {model!r}: config.json says model_type {model_type!r}; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[model_type]
