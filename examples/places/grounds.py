"""Haystacks: what a video shows besides its marks, and whole videos of scenes.

- calm: a still picture with a few shapes that drift.  What changes is a mark, so dropping what does
  not change finds it: the control.
- pan: the camera moves over a cluttered world.  cuts: every temporal patch is another place.
- crowd: many small things move, letters and plain cards among them.
- swarm: in every window letters and plain cards come and go all the time, like marks without digit.
"""

import shared  # noqa: F401, puts the needle model's modules on the path

# isort: split

import cv2
import footage
import glyphs
import marks
import numpy as np
from places import ACROSS, SIDE, WINDOW, WINDOWS, Scene

MARGIN = 48  # pixels of a world around the frame


def frames(scene: Scene) -> np.ndarray:
    """All frames of a scene, RGB uint8 [2 × patches, 224, 224, 3]."""
    rng = np.random.default_rng((scene.seed, 1))
    pictures = ground(rng, scene.haystack, scene.patches)
    for number, mark in enumerate(scene.marks):
        # Each mark has its own generator: moving one does not redraw the others.
        marks.put(np.random.default_rng((scene.seed, 2, number)), pictures, mark)
    return grained(rng, pictures)


def grained(rng, pictures: np.ndarray) -> np.ndarray:
    """With a camera's noise, as uint8."""
    grain = rng.integers(-5, 6, (len(pictures), SIDE // 2, SIDE // 2, 1)).astype(np.float32)
    return np.clip(pictures + grain.repeat(2, 1).repeat(2, 2), 0, 255).astype(np.uint8)


def write_mp4(scene: Scene, path):
    """Write the scene's video at two frames a second; the path."""
    return footage.write_mp4(frames(scene), path)


def ground(rng, haystack: str, patches: int) -> np.ndarray:
    """A haystack, float32 [2 × patches, 224, 224, 3]."""
    if haystack == "pan":
        return _pan(rng, patches)
    if haystack == "cuts":
        return np.concatenate([_still(_crop(rng, world(rng, 320)), 1) for _ in range(patches)])
    if haystack == "swarm":
        return _swarm(rng, patches)
    return _moving(rng, patches, crowd=haystack == "crowd")


def world(rng, side: int = 640) -> np.ndarray:
    """A cluttered place, uint8 [side, side, 3]."""
    fields = int(rng.integers(3, 14))
    coarse = rng.integers(0, 256, (fields, fields, 3)).astype(np.float32)
    smooth = cv2.INTER_LINEAR if rng.random() < 0.7 else cv2.INTER_NEAREST
    picture = cv2.resize(coarse, (side, side), interpolation=smooth)
    cells = int(rng.integers(40, 160))
    grain = rng.normal(0, rng.uniform(5, 35), (cells, cells, 3)).astype(np.float32)
    picture += cv2.resize(grain, (side, side))
    for _ in range(int(rng.integers(24, 70) * (side / 640) ** 2) + 4):
        _shape(rng, picture)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _shape(rng, picture: np.ndarray) -> None:
    x, y = (int(value) for value in rng.integers(0, len(picture), 2))
    reach, paint = int(rng.uniform(4, 40)), _paint(rng)
    kind = int(rng.integers(4))
    if kind == 0:
        cv2.circle(picture, (x, y), reach, paint, -1)
    elif kind == 1:
        high = int(reach * rng.uniform(0.3, 1))
        cv2.rectangle(picture, (x - reach, y - reach), (x + reach, y + high), paint, -1)
    elif kind == 2:
        corners = [(x, y - reach), (x - reach, y + reach), (x + reach, y + reach)]
        cv2.fillPoly(picture, [np.array(corners, np.int32)], paint)
    else:
        end = x + int(rng.normal(0, 60)), y + int(rng.normal(0, 60))
        cv2.line(picture, (x, y), end, paint, int(rng.integers(1, 5)))


def _paint(rng) -> list[float]:
    """A mark's colour four times in ten, so that colour alone does not make a mark."""
    if rng.random() < 0.4:
        return marks.RGB[rng.integers(len(marks.RGB))].tolist()
    return rng.integers(0, 256, 3).astype(float).tolist()


def _crop(rng, picture: np.ndarray) -> np.ndarray:
    top, left = rng.integers(0, len(picture) - SIDE + 1, 2)
    return picture[top : top + SIDE, left : left + SIDE].astype(np.float32)


def _still(picture: np.ndarray, patches: int) -> np.ndarray:
    return np.repeat(picture[None], 2 * patches, 0)


def _pan(rng, patches: int) -> np.ndarray:
    whole = world(rng)
    whole = np.concatenate([whole, whole[::-1]])
    whole = np.concatenate([whole, whole[:, ::-1]], 1)  # without a seam when it is rolled
    pace, angle, at = rng.uniform(4, 20), rng.uniform(0, 2 * np.pi), rng.uniform(0, len(whole), 2)
    pictures = np.empty((2 * patches, SIDE, SIDE, 3), np.float32)
    for number in range(2 * patches):
        angle += rng.normal(0, 0.05)
        at += pace * np.array([np.sin(angle), np.cos(angle)])
        rows, columns = ((int(first) + np.arange(SIDE)) % len(whole) for first in at)
        pictures[number] = whole[rows[:, None], columns]
    return pictures


def _swarm(rng, patches: int) -> np.ndarray:
    pictures = _moving(rng, patches, crowd=False)
    for patch in range(patches):
        for window in range(WINDOWS):
            corner = np.array(divmod(window, ACROSS)) * WINDOW
            for _ in range(int(rng.choice(3, p=(0.15, 0.45, 0.4)))):
                thing = letter_or_plain(rng)
                top, left = corner + marks.corner(rng)
                there = pictures[2 * patch : 2 * patch + 2]
                there[:, top : top + len(thing), left : left + len(thing)] = thing
    return pictures


def letter_or_plain(rng) -> np.ndarray:
    """A card that is no mark, float32 [28, 28, 3]."""
    letter = glyphs.LETTERS[rng.integers(len(glyphs.LETTERS))] if rng.random() < 0.75 else None
    return marks.card(rng, int(rng.integers(len(marks.RGB))), letter)


def _moving(rng, patches: int, crowd: bool) -> np.ndarray:
    """A still picture with shapes that drift, or with many things that come and go."""
    picture = _crop(rng, world(rng, 320))
    things = [_Thing(rng, crowd) for _ in range(36 if crowd else 4)]
    pictures = _still(picture, patches)
    for number in range(2 * patches):
        for index, thing in enumerate(things):
            thing.draw(pictures[number])
            if crowd and thing.life < 0:
                things[index] = _Thing(rng, crowd)
    return pictures


class _Thing:
    """A disc, a box, a letter card or a plain card that moves and lives a while."""

    def __init__(self, rng, crowd: bool):
        self.kind = int(rng.integers(4)) if crowd else 0
        self.at = rng.uniform(0, SIDE, 2)
        self.pace = rng.normal(0, 3.0 if crowd else 2.0, 2)
        self.life = int(rng.integers(8, 40))
        self.reach = int(rng.uniform(8, 26))
        self.paint = marks.RGB[rng.integers(len(marks.RGB))].tolist()
        self.picture = letter_or_plain(rng)

    def draw(self, frame: np.ndarray) -> None:
        x, y = self.at.astype(int).tolist()
        if self.kind == 0:
            cv2.circle(frame, (x, y), self.reach, self.paint, -1)
        elif self.kind == 1:
            ends = (x - self.reach, y - self.reach), (x + self.reach, y + self.reach)
            cv2.rectangle(frame, *ends, self.paint, -1)
        else:
            half = len(self.picture) // 2
            top, left = max(0, y - half), max(0, x - half)
            there = frame[top : top + len(self.picture), left : left + len(self.picture)]
            there[:] = self.picture[: there.shape[0], : there.shape[1]]
        self.at += self.pace
        self.pace[(self.at < 0) | (self.at > SIDE)] *= -1
        self.life -= 1
