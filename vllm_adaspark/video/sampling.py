"""Which frames of a video are taken, and what the processor is told of their times.

A request says how many frames a second it wants (``fps``), and between how many and how many in all
(``min_frames``, ``max_frames``).  At a constant rate the choice is that of vLLM and Hugging Face's
Qwen2-VL, frame for frame.  At a variable rate frames are taken at even times: at each, the frame
that a player would show then, so one that stays long is taken several times.

A model that knows no time, as LLaVA-OneVision, takes a number of frames instead (``num_frames``),
evenly from the first to the last, or fewer with ``fps``: as vLLM takes them, frame for frame.

Hugging Face's processor computes the seconds between pairs of frames, from which a token's time
position follows, as ``2 * total_num_frames / (frames taken * fps)`` of the metadata.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..settings import shown
from .container import Contents, VideoError

PAIR = 2  # frames that Qwen2.5-VL merges into one
MAX_FPS = 30  # more is refused
FPS = 2.0
MIN_FRAMES = 4
QWEN_FRAMES = 768  # unless max_frames says otherwise, as Qwen and vLLM have it
EVEN_FRAMES = 32  # unless num_frames says otherwise, as vLLM has it
MAX_FRAMES = 32768  # nine hours at one frame a second
ONE_FRAME = "send a single frame as an image (image_url)"


@dataclass(frozen=True)
class Sample:
    """The frames to take of a video, and the time between two of them."""

    numbers: list[int]
    step: float  # seconds


@dataclass(frozen=True)
class Options:
    """How many frames are taken."""

    fps: float = FPS
    max_frames: int = QWEN_FRAMES
    min_frames: int = MIN_FRAMES  # if max_frames and the video have so many

    @classmethod
    def checked(cls, options: dict[str, Any], *, also: tuple[str, ...] = ()) -> Options:
        """From ``media_io_kwargs.video``; ``also`` are keys that mean something to the caller.

        Raises:
            ValueError: names the key, its value and what is allowed.
        """
        fps = _checked_fps(options, FPS)
        _refuse_unknown(options, ("fps", "max_frames", "min_frames", *also))
        for name in ("max_frames", "min_frames"):
            value = options.get(name, PAIR)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not PAIR <= value <= MAX_FRAMES:
                refuse(name, value, f"expected a whole number from {PAIR} to {MAX_FRAMES}")
        most = options.get("max_frames", QWEN_FRAMES)
        if options.get("min_frames", 0) > most:
            refuse("min_frames", options["min_frames"], f"more than max_frames={most}")
        return cls(fps, most, options.get("min_frames", MIN_FRAMES))

    def sample(self, contents: Contents) -> Sample:
        """Choose the frames to take.

        Raises:
            VideoError: no pair of frames can be taken.
        """
        most = most_frames(contents)
        number = number_of_frames(contents.frames, contents.fps, most, self)
        if number < PAIR or contents.frames < PAIR:
            raise VideoError(
                f"Qwen2.5-VL takes a video's frames in pairs, and of this one's {contents.frames} "
                f"no pair can be taken; {ONE_FRAME}"
            )
        if contents.constant:
            numbers = at_constant_rate(contents.frames, number)
            return Sample(numbers, contents.seconds / len(numbers))
        # The last frame, however short, fills the last pair: half of one would be half a picture.
        step = float(contents.times[-1]) / max(number - PAIR, 1)
        return Sample(at_times(contents, np.arange(number) * step), step)


@dataclass(frozen=True)
class Evenly:
    """A number of frames, evenly from the first to the last."""

    num_frames: int = EVEN_FRAMES  # if the video has so many
    fps: float | None = None  # no more than these

    @classmethod
    def checked(cls, options: dict[str, Any]) -> Evenly:
        """From ``media_io_kwargs.video``.

        Raises:
            ValueError: names the key, its value and what is allowed.
        """
        fps = _checked_fps(options, None)
        _refuse_unknown(options, ("num_frames", "fps"))
        number = options.get("num_frames", EVEN_FRAMES)
        whole = isinstance(number, int) and not isinstance(number, bool)
        if not whole or not 1 <= number <= MAX_FRAMES:
            refuse("num_frames", number, f"expected a whole number from 1 to {MAX_FRAMES}")
        return cls(number, fps)

    def number(self, frames: int, seconds: float) -> int:
        """How many frames to take of a video, at least one."""
        number = min(self.num_frames, frames)
        if self.fps is not None:
            number = min(number, math.floor(seconds * self.fps))
        return max(number, 1)

    def sample(self, contents: Contents) -> Sample:
        """Choose the frames to take."""
        number = self.number(contents.frames, contents.seconds)
        step = contents.seconds / number
        if contents.constant:
            return Sample(np.linspace(0, contents.frames - 1, number, dtype=int).tolist(), step)
        return Sample(at_times(contents, np.linspace(0, contents.times[-1], number)), step)


def _checked_fps(options: dict[str, Any], default: float | None) -> float | None:
    fps = options.get("fps", default)
    if "fps" in options and (not _is_number(fps) or not 0 < fps <= MAX_FPS):
        refuse("fps", fps, f"expected frames per second, above 0 and at most {MAX_FPS}")
    return fps


def _refuse_unknown(options: dict[str, Any], known: tuple[str, ...]) -> None:
    for name in options:
        if name not in known:
            allowed = ", ".join((*known, "video_backend"))
            refuse(name, options[name], f"unknown; allowed: {allowed}")


def refuse(name: str, value: Any, why: str) -> None:
    """Raise a ValueError about an option."""
    raise ValueError(f"media_io_kwargs.video.{str(name)[:80]}={shown(value)}: {why}")


def number_of_frames(frames: int, fps: float, most: int | None, options: Options) -> int:
    """An even number of frames to take of a video, 0 where that is impossible.

    Args:
        frames: it has.
        fps: at which they come, in the mean.
        most: where their rate varies, what ``most_frames`` says; None at a constant rate.
        options: what is asked for.
    """
    if most is None:
        wanted = frames / fps * options.fps
    else:  # from the first frame's time to the last one's, and the last one a whole pair
        wanted = (frames - 1) / fps * options.fps + PAIR
    limit = min(options.max_frames, most or frames) // PAIR * PAIR
    return int(min(max(wanted, options.min_frames), limit) // PAIR * PAIR)


def at_constant_rate(frames: int, number: int) -> list[int]:
    """Numbers of the frames that vLLM and Hugging Face take; one more than ``number`` at times.

    The call is theirs: its float32 steps may end on a frame past the last.
    """
    taken = torch.arange(0, frames, frames / number).int()
    return torch.clamp(taken, max=frames - 1).tolist()


def most_frames(contents: Contents) -> int | None:
    """Frames to tell all of it apart, the last one a pair; None at a constant rate."""
    if contents.constant:
        return None
    gaps = np.diff(contents.times)
    return PAIR + math.floor(contents.times[-1] / gaps[gaps > 0].min() + 0.5)


def at_times(contents: Contents, times: np.ndarray) -> list[int]:
    """Numbers of the frames that a player shows at these times, in seconds."""
    # A microsecond: the time of the last frame must find it.
    return (np.searchsorted(contents.times, times + 1e-6, side="right") - 1).tolist()


def metadata(contents: Contents, taken: Sample, read: list[int], backend: str) -> dict[str, Any]:
    """What Hugging Face's processor is told.

    Args:
        contents: of the file.
        taken: the frames that were to be read.
        read: numbers of those that were; fewer if the end or the beginning could not be decoded.
        backend: name of the decoder.
    """
    frames, fps = contents.frames, contents.fps
    if len(read) < len(taken.numbers):
        frames = read[-1] - read[0] + 1
    if len(read) < len(taken.numbers) or not contents.constant:
        fps = frames / (len(read) * taken.step)  # so that the time between frames comes out
    return {
        "total_num_frames": frames,
        "fps": fps,
        "duration": frames / fps,
        "video_backend": backend,
        "frames_indices": read,
        "do_sample_frames": len(read) == frames,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
