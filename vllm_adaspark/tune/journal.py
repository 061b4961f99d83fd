"""What was answered so far: one JSON line for each contender and video, so that a run can go on.

The first line says of what the file is: model, grid, questions and options.  A run of anything else
must not be mixed with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "answers.jsonl"
ENDS = 1 << 20  # bytes at each end of a file of weights that tell it from another
WHAT = {
    "model": "another model",
    "grid": "another grid",
    "reference": "another grid",
    "questions": "other questions or videos",
    "videos": "other videos",
    "options": "other options",
}

Line = dict[str, Any]


class JournalError(ValueError):
    """The folder holds another run, or cannot be written; says what to do."""


class Journal:
    """The file, in memory and on disk.

    Args:
        folder: that it lies in; made if it is not there.
        about: what the run is of, by the keys of ``WHAT``; JSON-ready.

    Raises:
        JournalError: the folder holds a run that differs in one of them.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.path = folder / NAME
        about = json.loads(json.dumps(about))  # as it is read back
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = _whole_lines(self.path)
        except OSError as error:
            raise JournalError(f"--out {folder}: {error.strerror}") from None
        self._lines = {(line["contender"], line["video"]): line for line in lines[1:]}
        if self._lines:
            _refuse_another(lines[0]["about"], about, folder)
        elif not lines or lines[0]["about"] != about:  # a run that never answered binds nobody
            self._write({"about": about}, "w")

    def __len__(self) -> int:
        return len(self._lines)

    def find(self, contender: str, video: str) -> Line | None:
        """What a contender answered about a video."""
        return self._lines.get((contender, video))

    def add(self, line: Line) -> None:
        """Remember, on disk too."""
        self._lines[line["contender"], line["video"]] = line
        self._write(line, "a")

    def _write(self, line: Line, mode: str) -> None:
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise JournalError(f"{self.path} cannot be written: {error.strerror}") from None


def _whole_lines(path: Path) -> list[Line]:
    """The lines of a file; one that was cut off, because the run was killed, is taken out of it."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    try:
        lines = [json.loads(line) for line in whole.split("\n")[:-1]]
    except ValueError as error:
        raise JournalError(f"{path} is damaged: {error}; give another --out") from None
    for number, line in enumerate(lines, start=1):
        keys = {"contender", "video"} if number > 1 else {"about"}
        if not isinstance(line, dict) or not keys <= line.keys():
            raise JournalError(f"{path} is damaged: line {number} is not ours; give another --out")
    return lines


def _refuse_another(there: Any, about: Mapping[str, Any], folder: Path) -> None:
    there = there if isinstance(there, dict) else {}
    for key, words in WHAT.items():
        if there.get(key) != about.get(key):
            raise JournalError(
                f"--out {folder} holds a run with {words} ({_difference(there, about, key)}): give "
                "another --out, or the same arguments to go on with that run"
            )


def _difference(there: Mapping[str, Any], about: Mapping[str, Any], key: str) -> str:
    """The first thing that differs, in a few words."""
    old, new = there.get(key), about.get(key)
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *new]:
            if old.get(name) != new.get(name):
                return f"{name}: {_short(old.get(name))} there, {_short(new.get(name))} here"
    if isinstance(old, list) and isinstance(new, list):
        for here, others in ((old, new), (new, old)):
            for each in here:
                if each not in others:
                    return f"{_short(each)} only {'there' if here is old else 'here'}"
    return f"{_short(old)} there, {_short(new)} here"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."


def fingerprint(folder: Path) -> str:
    """Tells a checkpoint on disk from another: its config, and both ends of its weights' files."""
    digest = hashlib.sha256()
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    for path in (each for each in files if each.exists()):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read(ENDS))
    return digest.hexdigest()[:16]
