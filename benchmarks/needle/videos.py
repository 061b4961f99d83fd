"""The videos: held-out scenes whose needles lie at every depth alike, written to mp4 once.

A scene's needle positions come from its seed, so seeds are searched: of many candidates the one is
taken whose questions fill the emptiest depths.  The search is deterministic, and the first n videos
of a list are balanced for every even n.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import footage
import scenes

from .beds import NEEDLE_BED, Bed, Size

MOTIONS = NEEDLE_BED.haystacks
DEPTHS = 6  # bins of equal width
# In HELD_OUT_SEEDS; examples/needle and other benchmarks take theirs before FIRST or after LAST.
FIRST, LAST = 20_000_000, 40_000_000
SEEDS = 5_000  # of each length and haystack
CANDIDATES = 80  # scenes looked at for each video


@dataclass(frozen=True)
class Cell:
    """What the videos of a cell have in common.

    Attributes:
        patches: temporal patches (two frames each) in all.
        size: height and width of a frame in pixels.
        parts: videos that they are dealt out to, one after the other in one prompt.
        bed: where their scenes come from.
    """

    patches: int
    size: Size = NEEDLE_BED.size
    parts: int = 1
    bed: Bed = NEEDLE_BED

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
    asked: tuple

    @property
    def key(self) -> str:
        """Names this video in files, rows and messages."""
        height, width = self.cell.size
        return f"{self.motion}-{self.cell.patches}x{width}x{height}x{self.cell.parts}-{self.seed}"

    @cached_property
    def scene(self):
        """What the video shows, as its bed says it."""
        cell = self.cell
        return cell.bed.make(self.seed, cell.patches, cell.size, self.motion)

    def depth(self, question) -> float:
        """Where in the video the last thing lies that a question hinges on, 0 to 1."""
        return (self.cell.bed.patch(self.scene, question) + 0.5) / self.cell.patches


def depth_bin(depth: float) -> int:
    return min(int(depth * DEPTHS), DEPTHS - 1)


def choose(cell: Cell, count: int) -> list[Video]:
    """``count`` videos of a cell, haystack after haystack in turn.

    Raises:
        ValueError: there are not seeds enough for so many.
    """
    haystacks = cell.bed.haystacks
    most = len(haystacks) * (SEEDS // CANDIDATES)
    if not 0 < count <= most:
        raise ValueError(f"videos={count}: must be from 1 to {most}")
    chosen: list[Video] = []
    pickers = [_Picker(cell, haystack) for haystack in haystacks]
    for number in range(count):
        chosen.append(pickers[number % len(pickers)].next())
    return chosen


class _Picker:
    """Takes scene after scene of one cell and haystack, each where questions are still missing."""

    def __init__(self, cell: Cell, motion: str) -> None:
        self._cell, self._motion = cell, motion
        haystacks = cell.bed.haystacks
        start = FIRST + SEEDS * (len(haystacks) * cell.patches + haystacks.index(motion))
        assert start + SEEDS <= LAST, f"patches={cell.patches}: more seeds than are set aside"
        self._seeds = iter(scenes.HELD_OUT_SEEDS[start : start + SEEDS])
        self._asked: Counter = Counter()

    def next(self) -> Video:
        best: tuple[int, Video] | None = None
        for _ in range(CANDIDATES):
            video = self._one_of_each(next(self._seeds))
            if video is not None:
                cost = sum(self._cost(video, question) for question in video.asked)
                if best is None or cost < best[0]:
                    best = cost, video
        if best is None:
            raise RuntimeError(f"{self._cell}: no scene of {CANDIDATES} has all skills")
        video = best[1]
        self._asked.update(mark for asked in video.asked for mark in self._marks(video, asked))
        return video

    def _one_of_each(self, seed: int) -> Video | None:
        """The scene with the most wanted question of each skill; None if it lacks a skill."""
        video = Video(self._cell, self._motion, seed, ())
        by_skill = {skill: [] for skill in self._cell.bed.skills}
        for question in self._cell.bed.questions(video.scene):
            by_skill[question.skill].append(question)
        if not all(by_skill.values()):
            return None
        wanted = (min(some, key=partial(self._cost, video)) for some in by_skill.values())
        return replace(video, asked=tuple(wanted))

    def _cost(self, video: Video, question) -> int:
        return sum(self._asked[mark] for mark in self._marks(video, question))

    def _marks(self, video: Video, question) -> list[tuple]:
        """What a list of videos should have equally many of."""
        marks = [(question.skill, depth_bin(video.depth(question)))]
        if question.skill == "count":
            marks.append((question.skill, question.answer))  # most colours appear once
        return marks


def write(video: Video, folder: Path) -> list[Path]:
    """The video's mp4 files, one for each part; drawn unless they are there."""
    parts = video.cell.parts
    paths = [folder / f"{video.key}-{part}.mp4" for part in range(parts)]
    if not all(path.exists() for path in paths):
        cell = video.cell
        frames = cell.bed.frames(video.scene)
        edges = [2 * (cell.patches * part // parts) for part in range(parts + 1)]
        for path, start, end in zip(paths, edges, edges[1:]):
            half_done = path.with_suffix(".part.mp4")
            footage.write_mp4(frames[start:end], half_done)
            half_done.rename(path)
    return paths
