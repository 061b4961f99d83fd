"""The haystack: clips of moving shapes over a texture, calm or busy.

In a calm clip little changes from frame to frame, so that a card is a sudden event. In a busy clip
everything changes all the time: the camera pans fast, the picture flickers or is noisy, or every
temporal patch is a new scene. A method that keeps what changes finds a card in the calm clip for
free, and has no such help in the busy one.
"""

import cards
import cv2
import numpy as np

MOTIONS = ("calm", "busy")
_BUSY = ("pan", "noise", "cuts", "crowd")


def clip(rng, size, patches: int, motion: str) -> np.ndarray:
    """Frames of one clip, RGB uint8 [2 × patches, height, width, 3].

    Raises:
        ValueError: `motion` is not one of `MOTIONS`.
    """
    if motion not in MOTIONS:
        raise ValueError(f"motion={motion!r}: must be one of {', '.join(MOTIONS)}")
    style = "calm" if motion == "calm" else _BUSY[rng.integers(len(_BUSY))]
    if style == "cuts":
        return np.concatenate([_shapes(rng, size, 2, "pan") for _ in range(patches)])
    if style == "crowd":
        return np.concatenate([_crowd(rng, size) for _ in range(patches)])
    return _shapes(rng, size, 2 * patches, style)


def flicker(rng, picture: np.ndarray) -> np.ndarray:
    """A still picture as the two frames of a temporal patch, with a little noise each."""
    height, width = picture.shape[:2]
    noise = rng.integers(-6, 7, (2, (height + 1) // 2, (width + 1) // 2, 1), dtype=np.int8)
    noise = noise.repeat(2, 1).repeat(2, 2)[:, :height, :width]
    return np.clip(picture[None] + noise, 0, 255).astype(np.uint8)


def _crowd(rng, size) -> np.ndarray:
    """A distractor card or a scene of its own, as in a crowd of cards."""
    if rng.random() < 0.6:
        return flicker(rng, cards.distractor(rng, size))
    return _shapes(rng, size, 2, "pan")


def _shapes(rng, size, frames: int, style: str) -> np.ndarray:
    height, width = size
    side = min(size)
    pace = {"calm": 0.02, "pan": 0.16, "noise": 0.06}[style] * side  # pixels a frame
    canvas = _mirrored(cards.texture(rng, size))
    drift, offset = rng.normal(0, pace, 2), np.zeros(2)
    count = int(rng.integers(1, 6))
    centres = rng.random((count, 2)) * (width, height)
    speeds = rng.normal(0, max(pace, 0.045 * side), (count, 2))
    radii = (rng.uniform(0.05, 0.3, count) * side).astype(int)
    kinds = rng.integers(0, 3, count)
    paints = [_paint(rng) for _ in range(count)]
    grain = rng.uniform(15, 50) if style == "noise" else 0.0
    pictures = np.empty((frames, height, width, 3), np.uint8)
    for number in range(frames):
        offset += drift
        picture = np.roll(canvas, offset.astype(int), (0, 1))[:height, :width].astype(np.float32)
        for kind, centre, radius, paint in zip(kinds, centres, radii, paints, strict=True):
            _draw(picture, kind, centre, int(radius), paint)
        centres += speeds
        speeds[(centres < 0) | (centres > (width, height))] *= -1
        centres = np.clip(centres, 0, (width, height))
        if grain:
            coarse = rng.normal(0, grain, (height // 2, width // 2, 3)).astype(np.float32)
            picture += cv2.resize(coarse, (width, height)) + rng.normal(0, grain)
        pictures[number] = np.clip(picture, 0, 255)
    return pictures


def _mirrored(picture: np.ndarray) -> np.ndarray:
    """Twice as high and wide, without a seam when it is rolled."""
    rows = np.concatenate([picture, picture[::-1]])
    return np.concatenate([rows, rows[:, ::-1]], axis=1)


def _paint(rng) -> list[float]:
    """A card's colour more often than not, so that colour alone does not make a card."""
    if rng.random() < 0.6:
        return [float(x) for x in list(cards.COLOURS.values())[rng.integers(len(cards.COLOURS))]]
    return rng.integers(0, 256, 3).astype(float).tolist()


def _draw(picture: np.ndarray, kind: int, centre: np.ndarray, radius: int, paint: list) -> None:
    x, y = centre.astype(int).tolist()
    if kind == 0:
        cv2.circle(picture, (x, y), radius, paint, -1)
    elif kind == 1:
        cv2.rectangle(picture, (x - radius, y - radius), (x + radius, y + radius), paint, -1)
    else:
        corners = [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)]
        cv2.fillPoly(picture, [np.array(corners, np.int32)], paint)
