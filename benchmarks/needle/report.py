"""Puts the tables of a result into docs/quality.md; NAME of a place is one of tables.TABLES."""

from __future__ import annotations

import shutil
from pathlib import Path

from pages import refill  # benchmarks

from .tables import TABLES, Result


def write(result: Result, page: Path, template: Path) -> None:
    """Fill ``page``, which begins as a copy of ``template`` if it is not there.

    Raises:
        ValueError: the page has no place for a table, or for one that is not known.
    """
    if not page.exists():
        page.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(template, page)
    refill(page, "needle", {name: table(result) for name, table in TABLES.items()})
