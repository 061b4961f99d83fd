"""Small JPEGs of the frames a model saw, made back from the pixels its vision tower got.

A processor resizes and normalises frames, and may cut them into patches; the model's layout undoes
that (``Pictures`` in models/layout.py).  So a picture shows what the model saw, not what was sent.

A thread makes them (:class:`FrameMaker`): a long video's take seconds, and a step must not wait.
"""

from __future__ import annotations

import io
import queue
import threading
import weakref
from collections.abc import Sequence
from typing import Any

from ..models.layout import Pictures
from ..observing import observing

MAX_WIDTH = 320  # pixels
QUALITIES = (75, 50, 30, 15)  # the first at which a frame fits its bytes
PIXELS_PER_BYTE = 4  # reserved for a frame; photographs take about an eighth of a byte per pixel
LEAST_BYTES = 2048  # a JPEG's tables alone take 600
MAX_WAITING = 8  # traces whose frames are still to be made; each holds on to its videos' pixels
MAX_PIXEL_BYTES = 1 << 30  # that they hold on to in all; one alone may hold more


class Frames:
    """A trace's pictures, by video and place in time, in memory reserved before they are made.

    Args:
        videos: per video its pixels and the grid of its tokens, or None where the rank has no
            pixels, or is not the one that keeps pictures.
        pictures: makes frames of the pixels.
        limit: bytes for all pictures.
    """

    def __init__(
        self,
        videos: Sequence[tuple[Any, tuple[int, int, int]] | None] = (),
        pictures: Pictures | None = None,
        limit: int = 0,
    ) -> None:
        self._pictures = pictures
        self._sources = dict(enumerate(videos))
        self._made: dict[tuple[int, int], bytes] = {}
        self._numbers: list[int] = []
        self._reserved: list[int] = []  # bytes for a picture of each video
        for video in videos:
            grid = video[1] if video is not None else (0, 0, 0)
            self._reserved.append(frame_bytes(grid, pictures) if grid[0] else LEAST_BYTES)
            self._numbers.append(min(grid[0], limit // self._reserved[-1]))
            limit -= self._numbers[-1] * self._reserved[-1]
        self.reserved = sum(n * size for n, size in zip(self._numbers, self._reserved))

    def number(self, video: int) -> int:
        """How many pictures of a video there are, or will be: those of its first places in time."""
        return self._numbers[video] if video < len(self._numbers) else 0

    @property
    def number_of_all(self) -> int:
        return sum(self._numbers)

    @property
    def nbytes(self) -> int:
        """Of those that were made."""
        return sum(map(len, list(self._made.values())))

    @property
    def pixel_bytes(self) -> int:
        """Of the pixels that it holds on to, until all pictures are made."""
        return sum(source[0].nbytes for source in list(self._sources.values()) if source)

    def get(self, video: int, frame: int) -> bytes | None:
        """A JPEG, made now if need be; None if there is no such picture."""
        if not 0 <= frame < self.number(video):
            return None
        jpeg = self._made.get((video, frame))
        source = self._sources.get(video)
        if jpeg is None and source is not None:
            jpeg = self._made[video, frame] = self._make(*source, frame, self._reserved[video])
        return jpeg

    def make_all(self) -> None:
        """Make those that nobody has asked for, and let the pixels go."""
        try:
            for video, number in enumerate(self._numbers):
                for frame in range(number):
                    self.get(video, frame)
        finally:
            self._sources = {}

    def forget(self) -> None:
        """Let the pixels go, and what was not made with them."""
        self._numbers, self._sources = [0] * len(self._numbers), {}

    def _make(self, pixels: Any, grid: tuple[int, int, int], frame: int, most: int) -> bytes:
        from PIL import Image

        image = Image.fromarray(self._pictures.frame(pixels, grid, frame))
        image = image.resize(thumbnail_size(grid, self._pictures), reducing_gap=2.0)
        for quality in QUALITIES:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= most:
                break
        return buffer.getvalue()


def thumbnail_size(grid: tuple[int, int, int], pictures: Pictures) -> tuple[int, int]:
    """(width, height) in pixels of one picture of a video."""
    width, height = pictures.size(grid)
    shrink = min(1.0, MAX_WIDTH / width, 4 * MAX_WIDTH / height)
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def frame_bytes(grid: tuple[int, int, int], pictures: Pictures) -> int:
    """Bytes for one picture of a video."""
    width, height = thumbnail_size(grid, pictures)
    return max(LEAST_BYTES, width * height // PIXELS_PER_BYTE)


class FrameMaker:
    """A thread that makes the pictures of one trace after the other."""

    def __init__(self) -> None:
        # Weak: pictures of a trace that was evicted or deleted are not made.
        self._waiting: queue.Queue[weakref.ref[Frames]] = queue.Queue(MAX_WAITING)
        self._holding: weakref.WeakSet[Frames] = weakref.WeakSet()
        self._thread: threading.Thread | None = None

    def submit(self, frames: Frames) -> None:
        """Have a trace's pictures made; with too much waiting it stays without."""
        held = sum(each.pixel_bytes for each in self._holding)
        if held and held + frames.pixel_bytes > MAX_PIXEL_BYTES:
            frames.forget()
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="AdaSparkFrames", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(weakref.ref(frames))
            self._holding.add(frames)
        except queue.Full:
            frames.forget()

    def _run(self) -> None:
        while True:
            frames = self._waiting.get()()
            if frames is not None:
                with observing("making a trace's frames"):
                    frames.make_all()
            del frames
