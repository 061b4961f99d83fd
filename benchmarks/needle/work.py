"""What was already asked: one JSON line per contender, server and video, so that a run can go on.

Lines of another checkpoint do not count.  Lines measured with other code do: whether a change
matters is for people to say, with ``--fresh``; `other_code` counts them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from . import ROOT

Record = dict[str, Any]


class Work:
    """The work file, in memory and on disk.

    Args:
        path: of the file; made at the first record.
        checkpoint: sha256 of the weights.
    """

    def __init__(self, path: Path, checkpoint: str) -> None:
        self._path, self._checkpoint, self._code = path, checkpoint, code_hash()
        self._records: dict[tuple, Record] = {}
        for record in _read(path):
            if record["checkpoint"] == checkpoint:
                self._records[_key(record)] = record

    def find(self, contender: str, server: str, settings: dict | None, video: str) -> Record | None:
        asked = dict(contender=contender, server=server, settings=settings, video=video)
        return self._records.get(_key(asked))

    def add(self, record: Record) -> None:
        """Remember, on disk too."""
        record = {"checkpoint": self._checkpoint, "code": self._code, **record}
        self._records[_key(record)] = record
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    @property
    def other_code(self) -> int:
        """Records that were measured with other code than today's."""
        return sum(record["code"] != self._code for record in self._records.values())


def _read(path: Path) -> list[Record]:
    """The records of a file; one that was cut off, because the run was killed, is left out."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.split("\n")[:-1]]


def _key(record: Record) -> tuple:
    settings = json.dumps(record["settings"], sort_keys=True)
    return record["contender"], record["server"], settings, record["video"]


def file_hash(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_hash() -> str:
    """Of the plugin's source, shortened."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "vllm_adaspark").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
