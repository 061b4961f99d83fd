"""Sparsity methods, a folder each: what the layers leave out, step by step.

``base`` is the protocol, and an essay to read before adding a method.  A method knows neither
vLLM's model runner nor a model.  Its folder's ``settings`` module imports nothing heavy, so that
the command line can name its settings without torch.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from .. import VIDEONSA_ARCHITECTURE
from ..settings import Settings

DEFAULT = "adaspark"
# Architectures of checkpoints that were trained for one method and cannot run with another.
OF_ARCHITECTURE = {VIDEONSA_ARCHITECTURE: "videonsa"}


def built_in() -> list[str]:
    """The names of the methods that are folders here; the default comes first."""
    folders = {module.name for module in pkgutil.iter_modules(__path__) if module.ispkg}
    return [DEFAULT, *sorted(folders - {DEFAULT})]


def settings_class(method: str) -> type[Settings]:
    """The settings of a method, by its name or by ``module:class``.

    Raises:
        SettingsError: there is no such method.
    """
    if method not in built_in():
        from .base import load

        return load(method).settings_class
    module = import_module(f"{__name__}.{method}.settings")
    (found,) = (
        each
        for each in vars(module).values()
        if isinstance(each, type)
        and issubclass(each, Settings)
        and each.__module__ == module.__name__
    )
    return found
