"""Write a real mp4: shapes moving over a textured background, at times a card with a digit.

    python examples/demo/video.py .demo/video.mp4 --seconds 30

The same arguments give the same frames. Encoded as MPEG-4, which every decoder has.
"""

import argparse
import math
from pathlib import Path

import cv2
import numpy as np

CARD_SECONDS = 1.0
CARD_EVERY_SECONDS = 5.0


def frames(*, seconds: float, fps: float, width: int, height: int, seed: int = 0):
    """Yield the video's frames, BGR uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    scale = min(width, height)
    background = _texture(rng, width, height)
    colors = rng.integers(40, 256, (4, 3))
    centers = rng.uniform(0.2, 0.8, (4, 2)) * (width, height)
    speeds = rng.normal(0, 0.25, (4, 2)) * scale  # pixels a second
    sizes = (rng.uniform(0.08, 0.2, 4) * scale).astype(int)
    digits = rng.integers(0, 10, math.ceil(seconds / CARD_EVERY_SECONDS))
    for number in range(round(seconds * fps)):
        second = number / fps
        frame = np.roll(background, round(second * scale * 0.05), axis=1)
        for kind in range(4):
            center = _bounce(centers[kind] + speeds[kind] * second, (width, height))
            _draw(frame, kind, center, int(sizes[kind]), colors[kind].tolist())
        period, into = divmod(second, CARD_EVERY_SECONDS)
        if into >= CARD_EVERY_SECONDS - CARD_SECONDS:
            _card(frame, str(digits[int(period)]))
        yield frame


def write_mp4(
    path: str | Path,
    *,
    seconds: float = 10,
    fps: float = 8,
    width: int = 224,
    height: int = 224,
    seed: int = 0,
) -> Path:
    """Write the video to `path` and return it.

    Raises:
        RuntimeError: OpenCV cannot write mp4 files here.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height))
    if not writer.isOpened():
        raise RuntimeError(f"OpenCV cannot write {path}: no MPEG-4 encoder, or no such folder")
    for frame in frames(seconds=seconds, fps=fps, width=width, height=height, seed=seed):
        writer.write(frame)
    writer.release()
    return path


def _texture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    coarse = rng.integers(0, 160, (5, 7, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def _bounce(point: np.ndarray, size: tuple[int, int]) -> tuple[int, int]:
    """Reflect a point that flies straight on back into the frame."""
    period = 2 * np.asarray(size)
    folded = np.abs((point % period + period) % period)
    x, y = np.minimum(folded, period - folded).astype(int)
    return int(x), int(y)


def _draw(frame: np.ndarray, kind: int, center: tuple[int, int], size: int, color: list) -> None:
    x, y = center
    if kind == 0:
        cv2.circle(frame, center, size, color, -1)
    elif kind == 1:
        cv2.rectangle(frame, (x - size, y - size), (x + size, y + size), color, -1)
    elif kind == 2:
        corners = np.array([(x, y - size), (x - size, y + size), (x + size, y + size)], np.int32)
        cv2.fillPoly(frame, [corners], color)
    else:
        cv2.line(frame, (x - size, y - size), (x + size, y + size), color, max(2, size // 3))


def _card(frame: np.ndarray, digit: str) -> None:
    """A white card in the middle with a black digit."""
    height, width = frame.shape[:2]
    half = min(width, height) // 4
    x, y = width // 2, height // 2
    cv2.rectangle(frame, (x - half, y - half), (x + half, y + half), (255, 255, 255), -1)
    font, scale, thickness = cv2.FONT_HERSHEY_SIMPLEX, half / 15, max(1, half // 8)
    (text_width, text_height), _ = cv2.getTextSize(digit, font, scale, thickness)
    origin = (x - text_width // 2, y + text_height // 2)
    cv2.putText(frame, digit, origin, font, scale, (0, 0, 0), thickness, cv2.LINE_AA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="mp4 file to write")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--fps", type=float, default=8)
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--height", type=int, default=224)
    parser.add_argument("--seed", type=int, default=0)
    print(write_mp4(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
