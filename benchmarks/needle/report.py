"""Puts the tables of a result between the marks of docs/quality.md; the prose around them stays.

A table belongs between ``<!-- needle: NAME -->`` and ``<!-- end -->``, NAME as in tables.TABLES.
"""

from __future__ import annotations

import re
from pathlib import Path

from .tables import TABLES, Result

_PLACE = re.compile(r"(<!-- needle: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, result: Result) -> str:
    """``text`` with today's tables in their places.

    Raises:
        ValueError: a mark names no table, or there are no marks.
    """

    def table(place: re.Match) -> str:
        name = place["name"]
        if name not in TABLES:
            raise ValueError(f"<!-- needle: {name} -->: no such table; there are: {list(TABLES)}")
        return f"{place[1]}{TABLES[name](result)}\n{place[3]}"

    filled, places = _PLACE.subn(table, text)
    if not places:
        raise ValueError("no place for a table: <!-- needle: NAME --> ... <!-- end -->")
    return filled


def write(result: Result, page: Path, template: Path) -> None:
    """Fill ``page``, which begins as a copy of ``template`` if it is not there."""
    source = page if page.exists() else template
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(fill(source.read_text(), result))
