"""Puts the tables of a result into the pages that show them."""

from __future__ import annotations

import shutil
from pathlib import Path

from pages import refill  # benchmarks

from . import NEEDLE, ROOT
from .tables import SERIES, Result, card, headline, series

PAGE = ROOT / "docs" / "quality.md"
PLACES_PAGE = ROOT / "docs" / "places.md"


def write(result: Result, page: Path) -> None:
    """Fill ``page``, which begins as a copy of its series' page if it is not there.

    Raises:
        ValueError: the page has no place for a table, or for one that is not known.
    """
    name = series(result)
    if not page.exists():
        page.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PLACES_PAGE if name == "places" else PAGE, page)
    refill(page, name, {place: table(result) for place, table in SERIES[name].items()})


def write_summaries(result: Result, folder: Path = ROOT) -> None:
    """What the README and the model's card say of it.

    Raises:
        ValueError: as `write`.
    """
    refill(folder / "README.md", "needle", {"headline": headline(result)})
    model_card = folder / NEEDLE.relative_to(ROOT) / "README.md"
    refill(model_card, "needle", {"card": card(result)})
