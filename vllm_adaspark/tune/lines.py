"""Files of JSON objects, one a line, as people write them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read(path: Path, named: str, error: type[ValueError]) -> Iterator[tuple[int, str, Any]]:
    """Each line that is not blank: its number, where it is, and what JSON it holds.

    The file is read at once; a line is parsed when it is asked for.

    Args:
        path: of the file.
        named: what the file is called where users name it.
        error: raised where the file cannot be read or a line is not JSON.
    """
    try:
        # A string may hold any break of a line but this; a byte order mark may come first.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as failed:
        raise error(f"{named} {str(path)!r} cannot be read: {failed}") from None
    return _parsed(path, lines, error)


def _parsed(
    path: Path, lines: list[str], error: type[ValueError]
) -> Iterator[tuple[int, str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
            json.dumps(entry, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError) as failed:
            raise error(f"{where}: not JSON: {failed}") from None
        yield number, where, entry
