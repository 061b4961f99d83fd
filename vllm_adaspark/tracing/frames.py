"""Small JPEGs of the frames a model saw, made back from the patches its vision tower got.

Qwen2.5-VL's processor resizes, normalises and cuts a video into patches of two frames; here that is
undone for the first frame of each pair.  So a picture shows what the model saw, not what was sent.

A thread makes them (:class:`FrameMaker`): a long video's take seconds, and a step must not wait.
"""

from __future__ import annotations

import io
import queue
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..observing import observing

MAX_WIDTH = 320  # pixels
QUALITIES = (75, 50, 30, 15)  # the first at which a frame fits its room
PIXELS_PER_BYTE = 4  # of a frame's room; photographs take about an eighth of a byte per pixel
LEAST_ROOM = 2048  # bytes; a JPEG's tables alone take 600
MAX_WAITING = 8  # traces whose frames are still to be made; each holds on to its videos' pixels


@dataclass(frozen=True)
class PatchShape:
    """How the processor cut and normalised frames."""

    patch: int  # side in pixels
    frames: int  # frames in a patch
    merge: int  # patches along a merged token's side
    mean: Sequence[float]
    std: Sequence[float]

    def thumbnail_size(self, grid: tuple[int, int, int]) -> tuple[int, int]:
        """(width, height) in pixels of the pictures of a video of ``grid`` (t, h, w) patches."""
        width, height = grid[2] * self.patch, grid[1] * self.patch
        shrink = min(1.0, MAX_WIDTH / width, 4 * MAX_WIDTH / height)
        return max(1, round(width * shrink)), max(1, round(height * shrink))


def unpatchify(patches: Any, grid: tuple[int, int, int], shape: PatchShape) -> np.ndarray:
    """The first frame of each patch in time.

    NumPy throughout: a thread's first torch operation would start a team of threads of its own.

    Args:
        patches: torch tensor ``[t * h * w, 3 * frames * patch * patch]``: normalised floats, or
            uint8 where the vision tower normalises by itself.
        grid: (t, h, w) patches.
        shape: how they were made.

    Returns:
        ``[t, h * patch, w * patch, 3]`` uint8, RGB.
    """
    t, h, w = grid
    merge, side = shape.merge, shape.patch
    patches = patches.cpu()
    values = (patches.float() if patches.is_floating_point() else patches).numpy()
    cut = values.reshape(t, h // merge, w // merge, merge, merge, 3, shape.frames, side, side)
    # [t, h / merge, merge, patch, w / merge, merge, patch, 3]
    first = cut[..., 0, :, :].transpose(0, 1, 3, 6, 2, 4, 7, 5)
    image = first.reshape(t, h * side, w * side, 3)
    if image.dtype == np.uint8:
        return image
    image = image * np.array(shape.std, np.float32) + np.array(shape.mean, np.float32)
    return (image * 255).round().clip(0, 255).astype(np.uint8)


class Frames:
    """A trace's pictures, by video and frame pair, in a room that is known before they are made.

    Args:
        videos: per video its patches and their grid (see :func:`unpatchify`), or None where the
            rank has no patches, or is not the one that keeps pictures.
        shape: how the patches were made.
        limit: bytes for all pictures.
    """

    def __init__(
        self,
        videos: Sequence[tuple[Any, tuple[int, int, int]] | None] = (),
        shape: PatchShape | None = None,
        limit: int = 0,
    ) -> None:
        self._shape = shape
        self._sources = dict(enumerate(videos))
        self._made: dict[tuple[int, int], bytes] = {}
        self._numbers: list[int] = []
        self._rooms: list[int] = []  # bytes for a picture of each video
        for video in videos:
            grid = video[1] if video is not None else (0, 0, 0)
            self._rooms.append(frame_room(grid, shape) if grid[0] else LEAST_ROOM)
            self._numbers.append(min(grid[0], limit // self._rooms[-1]))
            limit -= self._numbers[-1] * self._rooms[-1]
        self.room = sum(n * room for n, room in zip(self._numbers, self._rooms))

    def number(self, video: int) -> int:
        """How many pictures of a video there are, or will be: those of its first frame pairs."""
        return self._numbers[video] if video < len(self._numbers) else 0

    @property
    def number_of_all(self) -> int:
        return sum(self._numbers)

    @property
    def nbytes(self) -> int:
        """Of those that were made."""
        return sum(map(len, list(self._made.values())))

    def get(self, video: int, frame: int) -> bytes | None:
        """A JPEG, made now if need be; None if there is no such picture."""
        if not 0 <= frame < self.number(video):
            return None
        jpeg = self._made.get((video, frame))
        source = self._sources.get(video)
        if jpeg is None and source is not None:
            jpeg = self._made[video, frame] = self._make(*source, frame, self._rooms[video])
        return jpeg

    def make_all(self) -> None:
        """Make those that nobody has asked for, and let the patches go."""
        try:
            for video, number in enumerate(self._numbers):
                for frame in range(number):
                    self.get(video, frame)
        finally:
            self._sources = {}

    def forget(self) -> None:
        """Let the patches go, and what was not made with them."""
        self._numbers, self._sources = [0] * len(self._numbers), {}

    def _make(self, patches: Any, grid: tuple[int, int, int], frame: int, room: int) -> bytes:
        from PIL import Image

        _, h, w = grid
        piece = patches[frame * h * w : (frame + 1) * h * w]
        image = Image.fromarray(unpatchify(piece, (1, h, w), self._shape)[0])
        image = image.resize(self._shape.thumbnail_size(grid), reducing_gap=2.0)
        for quality in QUALITIES:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= room:
                break
        return buffer.getvalue()


def frame_room(grid: tuple[int, int, int], shape: PatchShape) -> int:
    """Bytes for one picture of a video."""
    width, height = shape.thumbnail_size(grid)
    return max(LEAST_ROOM, width * height // PIXELS_PER_BYTE)


class FrameMaker:
    """A thread that makes the pictures of one trace after the other."""

    def __init__(self) -> None:
        # Weak: pictures of a trace that was evicted or deleted are not made.
        self._waiting: queue.Queue[weakref.ref[Frames]] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None

    def submit(self, frames: Frames) -> None:
        """Have a trace's pictures made; with too many traces waiting it stays without."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="AdaSparkFrames", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(weakref.ref(frames))
        except queue.Full:
            frames.forget()

    def _run(self) -> None:
        while True:
            frames = self._waiting.get()()
            if frames is not None:
                with observing("making a trace's frames"):
                    frames.make_all()
            del frames
