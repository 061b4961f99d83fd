"""What a video file holds: how many frames, and when each is shown, told by its packets.

A container's header may leave out the number of frames, the length and the rate, or claim more than
the file has; frames may come at uneven times.  So all packets of the video are read once, without
decoding any: some microseconds each.  PyAV (FFmpeg's libraries) reads the containers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from typing import Any

import av
import numpy as np

DEFAULT_RATE = Fraction(25)  # of a bare stream, which says nothing of time; FFmpeg's default too
BUFFER_BYTES = 1 << 20
ERRORS_IN_A_ROW = 16  # unreadable packets after which the rest of a file is given up
JUMP_SECONDS = 1  # decoding times that jump back by more begin anew, as in joined recordings
HDR_TRANSFERS = (16, 18)  # SMPTE ST 2084 (PQ) and ARIB STD-B67 (HLG), by ITU-T H.273
SHORT_OF_CLAIM = 0.95  # a file that shows less of the length it claims is worth a word


class VideoError(ValueError):
    """A video that cannot be used; says why, and what to do."""


@dataclass(frozen=True)
class Contents:
    """A video's frames, in the order they are shown; number 0 is the first."""

    times: np.ndarray  # float64 [frames]: seconds after frame 0, ascending
    fps: float  # frames per second; the mean where the rate varies
    constant: bool  # whether frame k is shown at k / fps
    claimed_seconds: float | None  # the length that the container states
    container: str  # its name in FFmpeg
    whole: bool  # nothing in the container is missing or damaged
    hdr: bool  # its colours are coded for HDR screens (PQ or HLG)
    # By packet, in the order of decoding:
    numbers: np.ndarray  # int64 [packets]: of the frame it holds, -1 for one that is never shown
    keys: np.ndarray  # bool [packets]: decoding can start here
    counted: bool  # packets do not say which frame they hold: count what the decoder gives

    @property
    def frames(self) -> int:
        return len(self.times)

    @property
    def seconds(self) -> float:
        """How long it is, if the last frame stays as long as frames do in the mean."""
        return self.frames / self.fps

    @property
    def cut_short(self) -> str | None:
        """What to tell if the file holds clearly less than its container claims."""
        claimed = self.claimed_seconds
        if claimed is None or self.seconds >= SHORT_OF_CLAIM * claimed - 1:
            return None
        return (
            f"the container claims {claimed:.1f} s of video, and the file holds "
            f"{self.seconds:.1f} s ({self.frames} frames): it was cut off, or its sound is longer"
        )


def scan(data: bytes) -> Contents:
    """List the frames of a video file.

    Raises:
        VideoError: no video, or one without frames.
    """
    with opened(data) as (container, stream):
        shown, keys, order, faults = [], [], [], []
        for packet, ticks in packets(container, stream, faults):
            order.append(ticks)
            shown.append(not packet.is_discard)
            keys.append(packet.is_keyframe)
        claimed = _claimed_seconds(container, stream)
        rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
        rates = [rate for rate in rates if rate]
        base = stream.time_base
        name = container.format.name
        whole = not faults and len(order) >= (stream.frames or 0)
        hdr = stream.codec_context.color_trc in HDR_TRANSFERS
        # libavformat guesses the order of an AVI's frames, and guesses wrong.
        guessed = name == "avi" and bool(stream.codec_context.has_b_frames)
        counted = guessed or None in order or (len(order) > 1 and len(set(order)) == 1)
    if not any(shown):
        raise VideoError("the video has no frames")
    shown = np.array(shown)
    if counted:
        rate = rates[0] if rates else DEFAULT_RATE
        numbers = np.where(shown, np.cumsum(shown) - 1, -1)
        times = np.arange(shown.sum()) / float(rate)
    else:
        ticks, visible = np.array(order), np.flatnonzero(shown)
        visible = visible[np.argsort(ticks[visible], kind="stable")]
        numbers = np.full(len(ticks), -1)
        numbers[visible] = np.arange(len(visible))
        ticks = ticks[visible] - ticks[visible[0]]
        rate = _constant_rate(ticks, rates, base)
        times = ticks * float(base)
    return Contents(
        times=times,
        fps=float(rate) if rate is not None else (len(times) - 1) / times[-1],
        constant=rate is not None,
        claimed_seconds=claimed,
        container=name,
        whole=whole,
        hdr=hdr,
        numbers=numbers,
        keys=np.array(keys),
        counted=counted,
    )


@contextmanager
def opened(data: bytes) -> Iterator[tuple[Any, Any]]:
    """(container, video stream) of a file in memory.

    Raises:
        VideoError: not a video.
    """
    if not data:
        raise VideoError("the video is empty: 0 bytes")
    try:
        # A playlist or a session description must not make the server open what it names.
        container = av.open(
            BytesIO(data),
            buffer_size=BUFFER_BYTES,
            container_options={"protocol_whitelist": "none"},
            metadata_errors="replace",
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(
            f"Could not open video stream: {_reason(error)}; the file is not a video, its "
            "container is not supported, or a part of it that is needed is missing"
        ) from None
    with container:
        # A song's cover is a video stream of one picture.
        streams = [s for s in container.streams.video if not _is_cover(s)]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in container.streams}))
            raise VideoError("the file has no video" + (f", only {kinds}" if kinds else ""))
        best = container.streams.best("video")
        stream = best if best in streams else streams[0]
        if stream.codec_context is None:
            raise VideoError("the codec of the file's video is not supported")
        yield container, stream


def packets(
    container: Any, stream: Any, faults: list[str] | None = None
) -> Iterator[tuple[Any, int | None]]:
    """(packet, presentation time in ticks or None) of all there are, in the order of decoding.

    The same on each call for the same file.  Times go on where a joined recording begins anew.
    What cannot be read is left out, and said in ``faults``.
    """
    jump = JUMP_SECONDS / stream.time_base
    shift, last = 0, None
    for packet in _readable(container, stream, [] if faults is None else faults):
        dts = packet.dts if packet.dts is not None else packet.pts
        if dts is not None:
            if last is not None and dts + shift < last - jump:
                shift = last + (packet.duration or 0) - dts
            last = dts + shift
        yield packet, (packet.pts + shift if packet.pts is not None else None)


def _readable(container: Any, stream: Any, faults: list[str]) -> Iterator[Any]:
    """Packets that are whole; those that a damaged part swallows are passed over."""
    held, errors = None, 0
    while errors < ERRORS_IN_A_ROW:
        try:
            for packet in container.demux(stream):
                if not packet.size:  # PyAV's mark of the end
                    continue
                if held is not None:
                    yield held
                held, errors = packet, 0
            break
        except av.FFmpegError as error:
            faults.append(_reason(error))
            errors += 1
    # Where a file is cut off, the last packet is a part of one.
    if held is not None and held.is_corrupt:
        faults.append("the last packet is cut off")
    elif held is not None:
        yield held


def _constant_rate(ticks: np.ndarray, rates: list[Fraction], base: Fraction) -> Fraction | None:
    """The rate at which all frames come, as exactly as the container's clock ticks; or None."""
    if len(ticks) < 2:
        return rates[0] if rates else DEFAULT_RATE
    measured = (len(ticks) - 1) / (int(ticks[-1]) * base) if ticks[-1] else None
    for rate in [*rates, measured]:
        if rate:
            expected = np.arange(len(ticks)) * float(1 / (rate * base))
            if np.abs(ticks - expected).max() <= 1 + 1e-6:
                return rate
    return None


def _claimed_seconds(container: Any, stream: Any) -> float | None:
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None


def _is_cover(stream: Any) -> bool:
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
