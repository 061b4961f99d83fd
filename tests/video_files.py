"""Video files made with PyAV, whose pictures show their own number.

A picture has two rows of four squares, black or white, from which ``number_of`` reads the number
back after any codec.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np

WIDTH, HEIGHT = 96, 64
BITS = 8
MS = Fraction(1, 1000)
QUIET = {"libx265": {"x265-params": "log-level=none"}, "libsvtav1": {"svtav1-params": "lp=1"}}
PIXELS = {"mjpeg": "yuvj420p", "gif": "rgb8"}


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """RGB uint8 [height, width, 3]."""
    bits = np.array([number >> bit & 1 for bit in range(BITS)], np.uint8).reshape(2, BITS // 2)
    rows = np.arange(height) * 2 // height
    columns = np.arange(width) * (BITS // 2) // width
    return np.repeat((40 + 180 * bits)[rows][:, columns, None], 3, axis=2).astype(np.uint8)


def number_of(shown: np.ndarray) -> int:
    """The number that a picture [height, width, 3] shows."""
    height, width = shown.shape[:2]
    rows = [height // 4, 3 * height // 4]
    columns = [(2 * at + 1) * width // BITS for at in range(BITS // 2)]
    bits = (shown[rows][:, columns].mean(axis=-1) > 128).ravel()
    return int(sum(1 << bit for bit in np.flatnonzero(bits)))


def encode(
    container: str = "mp4",
    codec: str = "libx264",
    *,
    frames: int = 40,
    rate: Fraction | int = 10,
    times: Sequence[float] | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    pixels: str | None = None,
    gop: int = 10,
    b_frames: int = 0,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    start: float = 0,
    first_shown: int = 0,
    tags: dict[str, Any] | None = None,
    rotation: int = 0,
    pictures: Sequence[np.ndarray] | None = None,
) -> bytes:
    """A video file.

    Args:
        container, codec: FFmpeg's names.
        frames: how many, at ``rate`` a second.
        times: or the seconds at which frames are shown.
        size: width and height.
        pixels: FFmpeg's name of the pixel format.
        gop: frames from one keyframe to the next.
        b_frames: frames in a row that need a later one.
        options, container_options: of the encoder and the muxer.
        start: seconds at which the first frame is shown.
        first_shown: an edit list hides the frames before.
        tags: attributes of the codec context, colours for example.
        rotation: degrees, counterclockwise, by which players turn it.
        pictures: what is shown, instead of numbers.
    """
    if pictures is not None:
        frames, size = len(pictures), (pictures[0].shape[1], pictures[0].shape[0])
    frames = len(times) if times is not None else frames
    clock = MS if times is not None else 1 / Fraction(rate)
    ticks = [round(at / float(MS)) for at in times] if times is not None else range(frames)
    folder = tempfile.TemporaryDirectory()  # some muxers read again what they wrote
    path = Path(folder.name) / "video"
    with folder, av.open(str(path), "w", format=container, options=container_options or {}) as made:
        encoder = {**QUIET.get(codec, {}), **(options or {})}
        stream = made.add_stream(codec, rate=Fraction(rate), options=encoder)
        stream.width, stream.height = size
        stream.pix_fmt = pixels or PIXELS.get(codec, "yuv420p")
        coder = stream.codec_context
        coder.time_base, coder.gop_size, coder.max_b_frames = clock, gop, b_frames
        for name, value in (tags or {}).items():
            setattr(coder, name, value)
        if rotation:
            stream.set_display_rotation(rotation)
        made.start_encoding()  # writes the header, of a file without frames too
        packets = []
        for number, at in enumerate(ticks):
            shown = picture(number, *size) if pictures is None else pictures[number]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(shown), format="rgb24")
            frame.pts, frame.time_base = at, clock
            packets += stream.encode(frame)
        hidden = ticks[first_shown] * clock if frames else 0
        for packet in [*packets, *(stream.encode() if frames else [])]:
            shift = round((Fraction(start) - hidden) / packet.time_base)
            packet.pts += shift
            packet.dts += shift
            made.mux(packet)
        made.close()
        _ordinary_priority()
        return path.read_bytes()


def _ordinary_priority() -> None:
    """Take back the real-time priority that SVT-AV1 gives a process of root.

    Every server that the process then starts would have it too, and starve all others.
    """
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def sound(container: str = "mp4", codec: str = "aac") -> bytes:
    """A second of silence."""
    file = BytesIO()
    with av.open(file, "w", format=container) as made:
        stream = made.add_stream(codec, rate=48000)
        stream.layout = "mono"
        for at in range(0, 48000, 1024):
            samples = np.zeros((1, 1024), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 48000, at
            made.mux(stream.encode(frame))
        made.mux(stream.encode(None))
    return file.getvalue()


def can_encode(codec: str) -> bool:
    """Whether this build of FFmpeg has the encoder."""
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True
