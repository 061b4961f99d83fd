"""Puts the tables of a result into the pages that show them."""

from __future__ import annotations

import shutil
from pathlib import Path

from pages import refill  # benchmarks

from . import NEEDLE, ROOT
from .tables import TABLES, VIDEONSA_TABLES, Result, card, headline

PAGE = ROOT / "docs" / "quality.md"


def write(result: Result, page: Path) -> None:
    """Fill ``page``, which begins as a copy of PAGE if it is not there.

    Raises:
        ValueError: the page has no place for a table, or for one that is not known.
    """
    if not page.exists():
        page.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PAGE, page)
    series, tables = ("videonsa", VIDEONSA_TABLES) if "videonsa" in result else ("needle", TABLES)
    refill(page, series, {name: table(result) for name, table in tables.items()})


def write_summaries(result: Result, folder: Path = ROOT) -> None:
    """What the README and the model's card say of it.

    Raises:
        ValueError: as `write`.
    """
    refill(folder / "README.md", "needle", {"headline": headline(result)})
    model_card = folder / NEEDLE.relative_to(ROOT) / "README.md"
    refill(model_card, "needle", {"card": card(result)})
