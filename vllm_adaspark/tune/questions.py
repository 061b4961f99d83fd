"""What is asked about which video: a file of questions, or stock ones about a folder of videos.

A file has one JSON object a line, as examples/finetune.py reads them::

    {"video": "clips/a.mp4", "question": "What does the man hold?", "answer": "a cup"}
    {"video": "clips/a.mp4", "question": "Where is he?", "options": ["inside", "outside"],
     "answer": "B"}

``answer`` may be left out; then answers can only be compared with the dense model's.  It may be a
list of answers that are all right.  With ``options`` the model is asked for a letter, and the
answer is that letter or the option's text.  Numbers may stand for words.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import string
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import lines

SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts"),
    *(".flv", ".wmv", ".ogv", ".3gp"),
)
KEYS = ("video", "question", "answer", "options")
# Short answers, so that the same answer is said in the same words.
STOCK = (
    "What does this video show? Answer in at most five words.",
    "How many people appear in this video? Answer with a number.",
    "At which second does the most important thing happen? Answer with a number.",
)
LETTERS = string.ascii_uppercase
CHOOSE = "Answer with the option's letter."
# A letter at an answer's beginning that names an option; "A man" and "I see" are words.
NAMED = r"\W*(?:option\s+)?([{letters}])(?!\w)(?!(?<=[aAiI]) +[^\W\d_])"
# What may stand around an answer's words: not a number's sign or point, nor the end of "C++".
BEFORE = re.compile(r"(?:(?!(?<!\.)-?\.?\d)[\W_])+")
AFTER = re.compile(r"(?:[^\w+#]|_)+$")


class QuestionsError(ValueError):
    """The videos or the questions cannot be used; says which, where, and what to do."""


@dataclass(frozen=True)
class Question:
    """One question about one video.

    Attributes:
        video: its file.
        name: of the video, relative to the folder of videos.
        text: the question.
        answers: those that are right; none where nobody said.
        options: to choose from; none where the answer is free.
    """

    video: Path
    name: str
    text: str
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """What the model is asked."""
        listed = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options)]
        return "\n".join([self.text, *listed, CHOOSE]) if listed else self.text

    def chosen(self, answer: str) -> str | None:
        """The letter of the option that an answer names: by its words, or else by its letter."""
        letters, said = LETTERS[: len(self.options)], plain(answer)
        for letter, option in zip(letters, self.options):
            if plain(option) == said:
                return letter
        named = re.match(NAMED.format(letters=letters or "-"), answer, re.IGNORECASE)
        return named[1].upper() if named else None

    def same(self, one: str, other: str) -> bool:
        """Whether two answers say the same."""
        if self.options:
            chosen = self.chosen(one)
            return chosen == self.chosen(other) and (
                chosen is not None or plain(one) == plain(other)
            )
        return plain(one) == plain(other)

    def right(self, answer: str) -> bool | None:
        """Whether an answer is right; None where nobody said what is."""
        if not self.answers:
            return None
        if self.options:
            return self.chosen(answer) in self.answers
        return plain(answer) in {plain(each) for each in self.answers}


def plain(answer: str) -> str:
    """An answer in small letters, without what is around its words, a full stop for example.

    Of one of signs alone, "+" for example, they stay.
    """
    text = " ".join(unicodedata.normalize("NFKC", answer).casefold().split())
    text = text.replace("\u2212", "-")  # the sign of minus
    bare = text[found.end() if (found := BEFORE.match(text)) else 0 :]
    return AFTER.sub("", bare) or text.strip(".?! ")


def find_videos(source: Path) -> list[Path]:
    """The video itself, or all videos in a folder and its folders, in order of their names.

    Raises:
        QuestionsError: there is none.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise QuestionsError(f"VIDEOS {str(source)!r}: no such folder or file")
    found = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise QuestionsError(
            f"VIDEOS {str(source)!r}: no videos in it; names must end in one of "
            f"{' '.join(SUFFIXES)}"
        )
    return found


def stock(videos: Iterable[Path], source: Path) -> list[Question]:
    """The stock questions about each video."""
    folder = folder_of(source)
    return [Question(video, _name(video, folder), text) for video in videos for text in STOCK]


def folder_of(source: Path) -> Path:
    """The folder that videos are named in."""
    return source if source.is_dir() else source.parent


def read(path: Path, source: Path) -> list[Question]:
    """The questions of a file.

    Args:
        path: of the file.
        source: the folder of the videos, or one video.  Videos are looked for there, and then
            beside the file.

    Raises:
        QuestionsError: a line that cannot be used, by its number; no lines; a question twice.
    """
    entries = lines.read(path, "QUESTIONS", QuestionsError)
    if not source.exists():
        raise QuestionsError(f"VIDEOS {str(source)!r}: no such folder or file")
    folders = (folder_of(source), path.parent)
    asked: list[Question] = []
    numbers: dict[tuple[str, str], int] = {}
    for number, where, entry in entries:
        question = _question(entry, where, folders)
        first = numbers.setdefault((question.name, question.prompt), number)
        if first != number:
            raise QuestionsError(f"{where}: the same question as in line {first}; remove one")
        asked.append(question)
    if not asked:
        raise QuestionsError(f"{path}: no lines; expected one JSON object a line")
    return asked


def _question(entry: Any, where: str, folders: Sequence[Path]) -> Question:
    if not isinstance(entry, dict):
        raise QuestionsError(f"{where}: expected an object with video and question, got {entry!r}")
    for key in entry.keys() - set(KEYS):
        near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.7)
        if near and near[0] not in entry:  # any other key is somebody's own
            raise QuestionsError(f"{where}: unknown key {key!r} (did you mean {near[0]!r}?)")
    video, text = (_text(entry, key, where) for key in ("video", "question"))
    options = _options(entry, where)
    answers = _answers(entry, options, where)
    path = _existing(video, folders, where)
    return Question(path, _name(path, folders[0]), text, answers, options)


def _text(entry: dict[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise QuestionsError(f"{where}: {key}={value!r}: expected words")
    return value


def _words(value: Any) -> Any:
    """A number as words, anything else as it is."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if number else value


def _options(entry: dict[str, Any], where: str) -> tuple[str, ...]:
    options = entry.get("options") or []
    options = [_words(o) for o in options] if isinstance(options, list) else options
    words = isinstance(options, list) and all(isinstance(o, str) and o.strip() for o in options)
    if not words or (options and not 2 <= len(options) <= len(LETTERS)):
        raise QuestionsError(
            f"{where}: options={options!r}: expected a list of 2 to 26 options, in words"
        )
    if len({plain(option) for option in options}) < len(options):
        raise QuestionsError(f"{where}: options={options!r}: two of them are the same")
    return tuple(options)


def _answers(entry: dict[str, Any], options: tuple[str, ...], where: str) -> tuple[str, ...]:
    """What is right; with options their letters."""
    given = entry.get("answer")
    if given is None:
        return ()
    answers = given if isinstance(given, list) else [given]
    answers = [_words(answer) for answer in answers]
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise QuestionsError(
            f"{where}: answer={given!r}: expected words, or a list of them; leave it out if nobody "
            "knows it"
        )
    if not options:
        return tuple(answers)
    by_text = {plain(option): letter for letter, option in zip(LETTERS, options)}
    letters = {letter: letter for letter in LETTERS[: len(options)]}
    found = [by_text.get(plain(answer)) or letters.get(plain(answer).upper()) for answer in answers]
    if None in found:
        raise QuestionsError(
            f"{where}: answer={given!r}: neither one of its {len(options)} options nor a letter "
            f"from A to {LETTERS[len(options) - 1]}"
        )
    return tuple(found)


def _existing(video: str, folders: Sequence[Path], where: str) -> Path:
    for folder in folders:
        path = folder / video
        with contextlib.suppress(OSError):  # a name longer than any file's
            if path.is_file():
                return path
    searched = " and ".join(dict.fromkeys(str(folder) for folder in folders))
    raise QuestionsError(f"{where}: video={video!r}: no such file in {searched}")


def _name(video: Path, folder: Path) -> str:
    video, folder = video.absolute(), folder.absolute()
    name = str(video.relative_to(folder) if video.is_relative_to(folder) else video)
    return name.encode(errors="backslashreplace").decode()  # not all names of files are text
