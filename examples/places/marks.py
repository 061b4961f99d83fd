"""Drawing marks into frames, patch by patch."""

import shared  # noqa: F401, puts the needle model's modules on the path

# isort: split

import cards
import glyphs
import numpy as np
from places import ACROSS, CARD, TOKEN, WINDOW, Mark

RGB = np.array(list(cards.COLOURS.values()), np.float32)
LUMA = np.array((0.299, 0.587, 0.114), np.float32)
SMALLEST = 12  # pixels, of a mark that comes nearer
STEP = 14  # pixels: cards lie on the grid of the tower's patches, which makes digits easy to learn
FONTS = 4  # of the glyphs' fonts: the plain ones
TALL = 1.15  # side of a glyph's square over that of its card
BRIGHT = 122  # grounds brighter than this have black characters, the others white ones


def card(rng, colour: int, character: str | None, side=CARD, fonts: int = FONTS) -> np.ndarray:
    """A coloured square with a character (or none), float32 [side, side, 3].

    Args:
        fonts: how many of the fonts may be used; training begins with one.
    """
    picture = np.broadcast_to(RGB[colour] + rng.integers(-14, 15, 3), (side, side, 3))
    picture = picture.astype(np.float32)
    if character is None:
        return picture
    tall = int(side * TALL)
    glyph = glyphs.mask(character, int(rng.integers(fonts)), tall, tall, tall)
    edge = (tall - side) // 2
    glyph = glyph[edge : edge + side, edge : edge + side, None]
    ink = np.float32(12.0 if RGB[colour] @ LUMA > BRIGHT else 245.0)
    return picture * (1 - glyph) + ink * glyph


def corner(rng, side: int = CARD) -> tuple[int, int]:
    """Top and left of a card or board in its window; half of the cards lie in a single token."""
    step = TOKEN if rng.random() < 0.5 else STEP
    top, left = rng.integers(0, (WINDOW - side) // step + 1, 2) * step
    return int(top), int(left)


def shares(top: int, left: int, side: int) -> np.ndarray:
    """Share of a mark's area in each token of its window, [2, 2]."""
    edges = np.arange(2) * TOKEN

    def overlap(at: int) -> np.ndarray:
        return np.clip(np.minimum(at + side, edges + TOKEN) - np.maximum(at, edges), 0, None) / side

    return overlap(top)[:, None] * overlap(left)[None]


def put(rng, frames: np.ndarray, mark: Mark) -> tuple[int, int]:
    """Draw a mark into float32 frames [2 × patches, height, width, 3]; where in its window it lies.

    Patches outside of the frames are left out.
    """
    top, left = corner(rng, mark.side)
    seed = int(rng.integers(1 << 31))
    letter = glyphs.LETTERS[int(rng.integers(len(glyphs.LETTERS)))]
    row, column = mark.window // ACROSS * WINDOW, mark.window % ACROSS * WINDOW
    for number in range(mark.length):
        at = mark.start + number
        if not 0 <= at < len(frames) // 2:
            continue
        come = min(1.0, (number + 1) / (mark.change + 1))  # 1 when it is wholly there
        alpha = come if mark.kind == "fade" else 1.0
        side = mark.side
        if mark.kind == "near":
            side = int(SMALLEST + come * (mark.side - SMALLEST))
        character = glyphs.DIGITS[mark.digit]
        if mark.kind == "turn" and come < 1:
            character = letter
        # The same ground, font and ink in all patches.
        picture = card(np.random.default_rng(seed), mark.colour, character, side)
        y = row + top + (mark.side - side) // 2
        x = column + left + (mark.side - side) // 2
        there = frames[2 * at : 2 * at + 2, y : y + side, x : x + side]
        there += np.float32(alpha) * (picture - there)
    return top, left
