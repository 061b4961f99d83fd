"""Single windows to train the tower on, with what each of their four tokens should tell.

Windows do not attend to each other, so the tower can be trained on windows alone: 56×56 pixels, two
frames, a crop of a cluttered world with a mark in it, or with something that looks like one.
"""

import shared  # noqa: F401, puts the needle model's modules on the path

# isort: split

from dataclasses import dataclass

import cv2
import glyphs
import grounds
import marks
import numpy as np
import torch
from places import CARD, WINDOW

NO_DIGIT, NO_COLOUR = 10, 8  # classes of tokens that show no mark
NOT_ASKED = -100
FAINTEST = 0.4  # strength of a mark that fades in; it is not trained to tell fainter ones


@dataclass(frozen=True)
class Stage:
    """How hard a batch is; training turns it up.

    fonts: how many of the fonts are used.  between: share of cards that may lie between tokens, and
    of boards.  changing: share of marks that fade in or come nearer.  others: share of windows with
    other cards, and of cards with a letter.
    """

    fonts: int = marks.FONTS
    between: float = 1.0
    changing: float = 0.3
    others: float = 0.4

    @classmethod
    def at(cls, opened: float) -> "Stage":
        """Between the easiest, at 0, and what videos show, at 1."""
        return cls(
            fonts=1 + int(min(1.0, opened / 0.5) * (marks.FONTS - 1)),
            between=min(1.0, opened / 0.3),
            changing=0.3 * max(0.0, (opened - 0.5) / 0.5),
            others=0.4 * max(0.0, (opened - 0.2) / 0.8),
        )


def worlds(seed: int, count: int = 150) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [grounds.world(rng) for _ in range(count)]


def batch(rng, pool: list[np.ndarray], count: int, stage: Stage):
    """A training batch.

    Returns:
        Frames uint8 [count, 2, 56, 56, 3], and int64 [count, 4] classes of each token: the digit
        (`NO_DIGIT`: there is none) and the colour (`NOT_ASKED`
        where a card is that is no mark).
    """
    frames = np.empty((count, 2, WINDOW, WINDOW, 3), np.float32)
    digits = np.full((count, 4), NO_DIGIT)
    colours = np.full((count, 4), NO_COLOUR)
    for index in range(count):
        _crop(rng, pool, frames[index])
        if rng.random() < stage.others:
            for _ in range(int(rng.integers(1, 3))):
                _other(rng, frames[index], colours[index])
        if rng.random() < 0.8:
            _mark(rng, frames[index], digits[index], colours[index], stage)
        frames[index] += rng.integers(-5, 6, (2, 28, 28, 1)).repeat(2, 1).repeat(2, 2)
    frames = np.clip(frames, 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        frames = _compressed(rng, frames)
    return frames, torch.from_numpy(digits), torch.from_numpy(colours)


def content(frames: np.ndarray) -> torch.Tensor:
    """What else a token should tell: its mean colours in 4×4 cells, of both frames.

    Without it the tokens of all grounds may be alike, and a method that keeps what differs from
    before would find marks for free.

    Returns:
        float32 [count, 4, 96], of about unit variance.
    """
    cells = torch.from_numpy(frames).float()
    cells = cells.view(len(frames), 2, 2, 4, 7, 2, 4, 7, 3).mean(
        (4, 7)
    )  # n, frame, ty, 4, tx, 4, 3
    return (cells.permute(0, 2, 4, 1, 3, 5, 6).reshape(len(frames), 4, 96) - 120) / 65


def _crop(rng, pool, into: np.ndarray) -> None:
    """Two crops of a world, the second moved."""
    world = pool[rng.integers(len(pool))]
    pace = rng.choice((0, 1, 4, 10, 16))
    drift = np.clip(rng.normal(0, 1, 2) * pace, -38, 38).astype(int)
    at = rng.integers(40, len(world) - WINDOW - 40, 2)
    for frame, (top, left) in zip(into, (at, at + drift)):
        frame[:] = world[top : top + WINDOW, left : left + WINDOW]


def _other(rng, frames, colours) -> None:
    """A letter or a plain card: where marks may lie, or anywhere, as those that move."""
    picture = grounds.letter_or_plain(rng)
    anywhere = rng.random() < 0.3
    top, left = rng.integers(0, WINDOW - CARD + 1, 2) if anywhere else marks.corner(rng)
    frames[:, top : top + CARD, left : left + CARD] = picture
    colours[marks.shares(top, left, CARD).ravel() > 0] = NOT_ASKED


def _mark(rng, frames, digits, colours, stage: Stage) -> None:
    """A mark, or a letter that is about to turn into one, and what is asked of each token."""
    full = CARD
    if rng.random() < stage.between:
        full = WINDOW if rng.random() < 0.15 else CARD
        top, left = marks.corner(rng, full)
    else:
        top, left = (int(at) for at in rng.integers(0, 2, 2) * CARD)
    side, alpha = full, np.float32(1)
    if full == CARD and rng.random() < stage.changing:
        if rng.random() < 0.5:
            alpha = np.float32(rng.uniform(FAINTEST, 1))
        else:
            side = int(rng.integers(20, CARD))
    letter = full == CARD and rng.random() < stage.others / 2
    digit, colour = int(rng.integers(10)), int(rng.integers(8))
    text = glyphs.LETTERS[rng.integers(len(glyphs.LETTERS))] if letter else glyphs.DIGITS[digit]
    inset = (full - side) // 2
    there = frames[:, top + inset :, left + inset :][:, :side, :side]
    there += alpha * (marks.card(rng, colour, text, side, stage.fonts) - there)
    touched = marks.shares(top, left, full).ravel() > 0
    colours[touched] = colour
    digits[touched] = NO_DIGIT if letter else digit


def _compressed(rng, frames: np.ndarray) -> np.ndarray:
    """The batch through lossy compression, as one mosaic."""
    count, rows = len(frames), 16 if len(frames) % 16 == 0 else 1
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(40, 96))]
    flat = frames.reshape(rows, -1, WINDOW, WINDOW, 3).transpose(0, 2, 1, 3, 4)
    shape = flat.shape
    mosaic = np.ascontiguousarray(flat.reshape(rows * WINDOW, -1, 3))
    mosaic = cv2.imdecode(cv2.imencode(".jpg", mosaic, quality)[1], 1)
    return mosaic.reshape(shape).transpose(0, 2, 1, 3, 4).reshape(count, 2, WINDOW, WINDOW, 3)
