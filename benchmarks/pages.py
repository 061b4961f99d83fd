"""Puts what was measured into the pages that show it; the prose around it stays.

A page marks a place with ``<!-- SERIES: NAME -->`` and ``<!-- end -->``; SERIES is the benchmark's,
NAME one of its tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path


def fill(text: str, series: str, tables: Mapping[str, str]) -> str:
    """``text`` with today's tables in the places of one series.

    Raises:
        ValueError: a mark names no table, or there is no mark of this series.
    """
    place = re.compile(rf"(<!-- {series}: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

    def table(found: re.Match) -> str:
        name = found["name"]
        if name not in tables:
            raise ValueError(f"<!-- {series}: {name} -->: no such table; there are: {[*tables]}")
        return f"{found[1]}{tables[name]}\n{found[3]}"

    filled, places = place.subn(table, text)
    if not places:
        raise ValueError(f"no place for a table: <!-- {series}: NAME --> ... <!-- end -->")
    return filled


def refill(path: Path, series: str, tables: Mapping[str, str]) -> None:
    """``fill`` a file.

    Raises:
        ValueError: as `fill`; the message begins with the file's path.
    """
    try:
        text = fill(path.read_text(encoding="utf-8"), series, tables)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    path.write_text(text, encoding="utf-8")
