"""The test beds: where scenes, questions and frames come from.

Both are examples with a checkpoint of their own.  "needle" hides cards that fill the picture, and
its tokens know the whole picture; in "places" marks are small and tokens stand for places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import footage
import grounds
import numpy as np
import places
import scenes

from . import NEEDLE, PLACES

Size = tuple[int, int]


@dataclass(frozen=True)
class Bed:
    """
    Attributes:
        name: of its series of tables and pictures.
        checkpoint: the folder of its model.
        skills: one question of each is asked about a video.
        haystacks: what videos show besides what is asked.
        size: height and width of a frame in pixels.
        make: the scene of (seed, patches, size, haystack).
        questions: all that can be asked about a scene.
        patch: the temporal patch at which what (scene, question) hinges on begins.
        frames: of a scene, RGB uint8 [2 × patches, height, width, 3].
    """

    name: str
    checkpoint: Path = field(compare=False)
    skills: tuple[str, ...]
    haystacks: tuple[str, ...]
    size: Size
    make: Callable[[int, int, Size, str], Any] = field(compare=False)
    questions: Callable[[Any], list] = field(compare=False)
    patch: Callable[[Any, Any], int] = field(compare=False)
    frames: Callable[[Any], np.ndarray] = field(compare=False)


NEEDLE_BED = Bed(
    name="needle",
    checkpoint=NEEDLE / "checkpoint",
    skills=scenes.SKILLS,
    haystacks=("calm", "busy"),
    size=(112, 112),
    make=scenes.make,
    questions=scenes.questions,
    patch=lambda scene, question: question.needles[-1],
    frames=footage.frames,
)
PLACES_BED = Bed(
    name="places",
    checkpoint=PLACES / "checkpoint",
    skills=places.SKILLS,
    haystacks=places.HAYSTACKS,
    size=(places.SIDE, places.SIDE),
    make=lambda seed, patches, size, haystack: places.make(seed, patches, haystack),
    questions=places.questions,
    patch=lambda scene, question: scene.marks[question.needles[-1]].start,
    frames=grounds.frames,
)
