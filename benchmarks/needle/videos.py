"""The videos: held-out scenes whose needles lie at every depth alike, written to mp4 once.

A scene's needle positions come from its seed, so seeds are searched: of many candidates the one is
taken whose questions fill the emptiest depths.  The search is deterministic, and the first n videos
of a list are balanced for every even n.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import footage
import scenes

MOTIONS = ("calm", "busy")
DEPTHS = 6  # bins of equal width
# In HELD_OUT_SEEDS; examples/needle and other benchmarks take theirs before FIRST or after LAST.
FIRST, LAST = 20_000_000, 40_000_000
SEEDS = 5_000  # of each length and motion
CANDIDATES = 80  # scenes looked at for each video


@dataclass(frozen=True)
class Cell:
    """What the videos of a cell have in common.

    Attributes:
        patches: temporal patches (two frames each) in all.
        size: height and width of a frame in pixels.
        parts: videos that they are dealt out to, one after the other in one prompt.
    """

    patches: int
    size: tuple[int, int] = (112, 112)
    parts: int = 1

    @property
    def tokens(self) -> int:
        """Video tokens in a prompt."""
        return self.patches * self.tokens_per_patch

    @property
    def tokens_per_patch(self) -> int:
        return self.size[0] * self.size[1] // 28**2

    @property
    def frame(self) -> str:
        """Width × height."""
        return f"{self.size[1]}×{self.size[0]}"


@dataclass(frozen=True)
class Video:
    """A scene and one question per skill about it."""

    cell: Cell
    motion: str
    seed: int
    asked: tuple[scenes.Question, ...]

    @property
    def key(self) -> str:
        """Names this video in files, rows and messages."""
        height, width = self.cell.size
        return f"{self.motion}-{self.cell.patches}x{width}x{height}x{self.cell.parts}-{self.seed}"

    def depth(self, question: scenes.Question) -> float:
        """Where in the video the last thing lies that a question hinges on, 0 to 1."""
        return _depth(self.cell, question)


def _depth(cell: Cell, question: scenes.Question) -> float:
    return (question.needles[-1] + 0.5) / cell.patches


def depth_bin(depth: float) -> int:
    return min(int(depth * DEPTHS), DEPTHS - 1)


def choose(cell: Cell, count: int) -> list[Video]:
    """``count`` videos of a cell, calm and busy in turn.

    Raises:
        ValueError: there are not seeds enough for so many.
    """
    most = len(MOTIONS) * (SEEDS // CANDIDATES)
    if not 0 < count <= most:
        raise ValueError(f"videos={count}: must be from 1 to {most}")
    chosen: list[Video] = []
    pickers = {motion: _Picker(cell, motion) for motion in MOTIONS}
    for number in range(count):
        chosen.append(pickers[MOTIONS[number % 2]].next())
    return chosen


class _Picker:
    """Takes scene after scene of one cell and motion, each where questions are still missing."""

    def __init__(self, cell: Cell, motion: str) -> None:
        self._cell, self._motion = cell, motion
        start = FIRST + SEEDS * (len(MOTIONS) * cell.patches + MOTIONS.index(motion))
        assert start + SEEDS <= LAST, f"patches={cell.patches}: more seeds than are set aside"
        self._seeds = iter(scenes.HELD_OUT_SEEDS[start : start + SEEDS])
        self._asked: Counter = Counter()

    def next(self) -> Video:
        best: tuple[int, Video] | None = None
        for _ in range(CANDIDATES):
            video = self._one_of_each(next(self._seeds))
            if video is not None:
                cost = sum(self._cost(question) for question in video.asked)
                if best is None or cost < best[0]:
                    best = cost, video
        if best is None:
            raise RuntimeError(f"{self._cell}: no scene of {CANDIDATES} has all skills")
        self._asked.update(mark for question in best[1].asked for mark in self._marks(question))
        return best[1]

    def _one_of_each(self, seed: int) -> Video | None:
        """The scene with the most wanted question of each skill; None if it lacks a skill."""
        scene = scenes.make(seed, self._cell.patches, self._cell.size, self._motion)
        by_skill = {skill: [] for skill in scenes.SKILLS}
        for question in scenes.questions(scene):
            by_skill[question.skill].append(question)
        if not all(by_skill.values()):
            return None
        asked = tuple(min(questions, key=self._cost) for questions in by_skill.values())
        return Video(self._cell, self._motion, seed, asked)

    def _cost(self, question: scenes.Question) -> int:
        return sum(self._asked[mark] for mark in self._marks(question))

    def _marks(self, question: scenes.Question) -> list[tuple]:
        """What a list of videos should have equally many of."""
        marks = [(question.skill, depth_bin(_depth(self._cell, question)))]
        if question.skill == "count":
            marks.append((question.skill, question.answer))  # most colours appear once
        return marks


def write(video: Video, folder: Path) -> list[Path]:
    """The video's mp4 files, one for each part; drawn unless they are there."""
    parts = video.cell.parts
    paths = [folder / f"{video.key}-{part}.mp4" for part in range(parts)]
    if not all(path.exists() for path in paths):
        cell = video.cell
        frames = footage.frames(scenes.make(video.seed, cell.patches, cell.size, video.motion))
        edges = [2 * (cell.patches * part // parts) for part in range(parts + 1)]
        for path, start, end in zip(paths, edges, edges[1:]):
            half_done = path.with_suffix(".part.mp4")
            footage.write_mp4(frames[start:end], half_done)
            half_done.rename(path)
    return paths
