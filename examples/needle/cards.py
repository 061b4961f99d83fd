"""What appears in a video besides the haystack: cards, frames, signs and distractors.

Each fills the picture for one temporal patch (two frames). Every function returns one RGB picture,
float32 [height, width, 3], and draws only from the generator it is given.

- number card: one ground colour and a large digit. What most questions are about.
- frame: a border of one colour around a patch of another. "The red frame names blue."
- sign: a white figure on black. It opens a part of the video.
- distractors: letters and blank cards on ground colours, digits on a multi-coloured ground.
"""

from dataclasses import dataclass

import cv2
import glyphs
import numpy as np

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 70, 215),
    "yellow": (230, 215, 50),
    "cyan": (50, 205, 215),
    "magenta": (215, 50, 205),
    "orange": (240, 135, 30),
    "gray": (125, 125, 125),
}
COLOUR_NAMES = tuple(COLOURS)
_RGB = np.array(list(COLOURS.values()), np.float32)
SIGNS = ("star", "cross", "ring", "arrow")


@dataclass
class Difficulty:
    """How varied the glyphs are; training turns it up step by step."""

    shift: float = 0.12  # farthest from the middle, as a share of the shorter side
    fonts: int = len(glyphs.FONTS)
    black: float = 0.5  # share of black glyphs; the others are white


FULL = Difficulty()


def number_card(rng, size, colour: int, digit: int, difficulty: Difficulty = FULL) -> np.ndarray:
    return _write(_ground(rng, size, colour), glyphs.DIGITS[digit], rng, difficulty)


def frame(rng, size, colour: int, named: int) -> np.ndarray:
    """A border of `colour` around a patch of the colour `named`."""
    picture = _ground(rng, size, colour)
    height, width = size
    border = rng.uniform(0.2, 0.28) * min(size)
    top, left = (int(border + rng.uniform(-0.04, 0.04) * min(size)) for _ in range(2))
    inside = slice(top, height - int(border)), slice(left, width - int(border))
    picture[inside] = _RGB[named] + rng.integers(-14, 15, 3)
    return picture


def sign(rng, size, figure: int) -> np.ndarray:
    picture = np.full((*size, 3), rng.integers(0, 24), np.float32)
    unit = rng.uniform(0.3, 0.42) * min(size)
    centre = np.array(size[::-1]) / 2 + rng.uniform(-0.08, 0.08, 2) * min(size)
    white = (int(rng.integers(225, 256)),) * 3
    name = SIGNS[figure]
    if name == "ring":
        thickness = int(unit * rng.uniform(0.25, 0.45))
        cv2.circle(picture, centre.astype(int).tolist(), int(unit * 0.8), white, thickness)
    else:
        turn = rng.uniform(-0.2, 0.2)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        corners = centre + unit * _FIGURES[name] @ rotation.T
        cv2.fillPoly(picture, [corners.astype(np.int32)], white)
    return picture


def letter_card(rng, size, difficulty: Difficulty = FULL) -> np.ndarray:
    ground = _ground(rng, size, int(rng.integers(len(COLOURS))))
    return _write(ground, glyphs.LETTERS[rng.integers(len(glyphs.LETTERS))], rng, difficulty)


def blank_card(rng, size) -> np.ndarray:
    return _ground(rng, size, int(rng.integers(len(COLOURS))))


def stray_digit(rng, size, difficulty: Difficulty = FULL) -> np.ndarray:
    """A digit on no card: its ground has many colours."""
    return _write(texture(rng, size), glyphs.DIGITS[rng.integers(10)], rng, difficulty)


def distractor(rng, size, difficulty: Difficulty = FULL) -> np.ndarray:
    kind = rng.choice(3, p=(0.45, 0.2, 0.35))
    if kind == 1:
        return blank_card(rng, size)
    return (letter_card, None, stray_digit)[kind](rng, size, difficulty)


def texture(rng, size) -> np.ndarray:
    """Blurred or sharp-edged fields of random colours."""
    fields = int(rng.integers(2, 6))
    coarse = rng.integers(0, 256, (fields, fields, 3)).astype(np.float32)
    smooth = rng.random() < 0.7
    edges = cv2.INTER_LINEAR if smooth else cv2.INTER_NEAREST
    return cv2.resize(coarse, size[::-1], interpolation=edges)


def _ground(rng, size, colour: int) -> np.ndarray:
    shade = _RGB[colour] + rng.integers(-14, 15, 3)
    return np.broadcast_to(shade, (*size, 3)).astype(np.float32)


def _write(ground, character: str, rng, difficulty: Difficulty) -> np.ndarray:
    height, width = ground.shape[:2]
    side = min(height, width)
    varied = difficulty.shift > 0.02
    tall = int(side * (rng.choice((0.72, 0.8, 0.88)) if varied else 0.88))
    glyph = glyphs.mask(character, int(rng.integers(difficulty.fonts)), height, width, tall)
    reach = int(difficulty.shift * side)
    across = reach + int((width - side) / 2 * 0.8) * varied
    down = reach + int((height - side) / 2 * 0.8) * varied
    shift = int(rng.integers(-down, down + 1)), int(rng.integers(-across, across + 1))
    glyph = np.roll(glyph, shift, (0, 1))[..., None]
    ink = 12.0 if rng.random() < difficulty.black else 245.0
    return ground * (1 - glyph) + np.float32(ink) * glyph


def _star() -> np.ndarray:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2, 0.42, 1.0)
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], 1)


_FIGURES = {  # corners, the figure's half side is 1
    "star": _star(),
    "cross": np.array(
        [
            *[(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)],
            *[(0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
        ]
    ),
    "arrow": np.array(
        [(-1, -0.28), (0.1, -0.28), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.28), (-1, 0.28)]
    ),
}
