"""Reads a video's frames by number, with PyAV, and decodes no more than that takes.

A group of pictures begins at a keyframe.  Groups without a wanted frame are passed over, which
needs no index and no seeking in the file, so it works in every container.  Only the wanted frames
become pictures in memory; what is decoded on the way to them is dropped.

Colours: what is not RGB is converted by the matrix and range that the file states (BT.601, limited
range, where it states none) to 8-bit RGB.  Nothing is tone-mapped: HDR keeps its code values.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import av
import numpy as np

from .container import Contents, VideoError, opened, packets


def read(
    data: bytes,
    contents: Contents,
    wanted: Sequence[int],
    *,
    check_size: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, list[int]]:
    """Frames as a player shows them: where one is damaged, the one before it stays.

    Args:
        data: the file.
        contents: what ``container.scan`` says of it.
        wanted: numbers of frames, ascending; may repeat.
        check_size: called with a frame's width and height before any memory is taken for them;
            may raise.

    Returns:
        (frames uint8 ``[n, h, w, 3]`` RGB, the number of the frame that each is).  ``n`` is less
        than was wanted if nothing could be decoded from some frame on, or up to one.

    Raises:
        VideoError: not one could be decoded.
    """
    picker = _Picker(wanted, check_size)
    needed = _needed(contents, picker.wanted)
    for number, frame in _decoded(data, contents, needed, picker.wanted):
        if picker.take(number, frame):
            break
    if not picker.exact and not needed.all():
        # A keyframe that was none, or damage: decode without a gap, and in one thread, which
        # loses nothing beside what is damaged.
        picker = _Picker(wanted, check_size)
        everything = np.ones_like(needed)
        for number, frame in _decoded(data, contents, everything, None):
            if picker.take(number, frame):
                break
    if picker.frames is None:
        raise _nothing(contents)
    return picker.result()


def ends(data: bytes, contents: Contents) -> tuple[np.ndarray, int, int]:
    """(first picture uint8 ``[h, w, 3]``, its number, the last frame's number) that can be decoded.

    Decodes two groups of pictures of a sound file, and all of a damaged one.

    Raises:
        VideoError: not one can be decoded.
    """
    last = contents.frames - 1
    both = np.array([0, last])
    for wanted, needed in (
        (both, _needed(contents, both)),
        (None, np.ones(len(contents.numbers), bool)),
    ):
        picture, seen = None, []
        for number, frame in _decoded(data, contents, needed, wanted):
            if picture is None:
                picture = _rgb(frame, frame.width, frame.height, _orientation(frame))
            seen = [*seen[:1], number]
        if seen and (seen[0], seen[-1]) == (0, last):
            break
    if picture is None:
        raise _nothing(contents)
    return picture, seen[0], seen[-1]


def _nothing(contents: Contents) -> VideoError:
    return VideoError(
        f"none of the video's {contents.frames} frames could be decoded: "
        "the file is damaged, or its codec is not supported"
    )


class _Picker:
    """Puts decoded frames where they are wanted."""

    def __init__(
        self, wanted: Sequence[int], check_size: Callable[[int, int], None] | None
    ) -> None:
        self.wanted = np.asarray(wanted, dtype=np.int64)
        self.frames: np.ndarray | None = None
        self.sources = np.full(len(self.wanted), -1)
        self._check_size = check_size
        self._at = 0  # the first wanted frame that is not there yet
        self._held: Any = None  # the last frame that was shown
        self._held_number = -1

    def take(self, number: int, frame: Any) -> bool:
        """Whether this was the last that is wanted."""
        last = len(self.wanted)
        before = int(np.searchsorted(self.wanted, number, side="left"))
        if before > self._at:  # wanted, and not decodable: the frame before them stays
            self._put(before)
        self._held, self._held_number = frame, number
        upto = int(np.searchsorted(self.wanted, number, side="right"))
        if upto > self._at:
            self._put(upto)
        return self._at >= last

    @property
    def exact(self) -> bool:
        """Whether all frames are the very ones that were wanted."""
        return bool((self.sources == self.wanted).all())

    def result(self) -> tuple[np.ndarray, list[int]]:
        there = np.flatnonzero(self.sources >= 0)
        first, last = there[0], there[-1] + 1
        return self.frames[first:last], self.sources[first:last].tolist()

    def _put(self, upto: int) -> None:
        at, self._at = self._at, upto
        if self._held is None:
            return  # nothing was shown yet
        if self.frames is None:
            turn = _orientation(self._held)
            width, height = self._held.width, self._held.height
            if self._check_size is not None:
                self._check_size(width, height)
            shape = (width, height) if turn[0] else (height, width)
            self._size, self._turn = (width, height), turn
            self.frames = np.empty((len(self.wanted), *shape, 3), np.uint8)
        self.frames[at:upto] = _rgb(self._held, *self._size, self._turn)
        self.sources[at:upto] = self._held_number


def _needed(contents: Contents, wanted: np.ndarray) -> np.ndarray:
    """bool [packets]: those to decode, from a keyframe to each wanted frame."""
    numbers, size = contents.numbers, len(contents.numbers)
    place = np.empty(contents.frames, np.int64)
    visible = np.flatnonzero(numbers >= 0)
    place[numbers[visible]] = visible
    if contents.counted:  # only when all before it is decoded is a frame's number known
        return np.ones(size, bool)
    ends = place[wanted]
    keys = np.flatnonzero(contents.keys)
    if not len(keys):
        return np.arange(size) <= ends.max()
    # The last keyframe that is both decoded and shown no later: what follows a keyframe in the
    # file and precedes it on the screen needs the group before.
    by_place = np.searchsorted(keys, ends, side="right") - 1
    by_number = np.searchsorted(np.maximum.accumulate(numbers[keys]), wanted, side="right") - 1
    index = np.minimum(by_place, by_number)
    starts = np.where(index >= 0, keys[np.maximum(index, 0)], 0)
    steps = np.zeros(size + 1, np.int64)
    np.add.at(steps, starts, 1)
    np.add.at(steps, ends + 1, -1)
    return np.cumsum(steps[:-1]) > 0


def _decoded(
    data: bytes,
    contents: Contents,
    needed: np.ndarray,
    wanted: np.ndarray | None,
) -> Iterator[tuple[int, Any]]:
    """(number, frame) of what the needed packets hold, as shown.

    With ``wanted``, quickly: several threads, and without frames that are neither wanted nor
    needed for another.
    """
    last, count = int(np.flatnonzero(needed)[-1]), 0
    with opened(data) as (container, stream):
        codec = stream.codec_context
        if wanted is not None:
            codec.thread_type = "AUTO"
        # In H.264 a frame that no other needs is marked, reliably; in other codecs it may not be.
        skips = wanted is not None and codec.name == "h264" and not contents.counted
        is_wanted = np.isin(contents.numbers, wanted) if skips else None

        def frames(packet: Any) -> Iterator[tuple[int, Any]]:
            nonlocal count
            try:
                decoded = codec.decode(packet)
            except av.FFmpegError:  # this frame is damaged, the next may not be
                return
            for frame in decoded:
                number = count if contents.counted else frame.pts
                count += 1
                if number is not None and 0 <= number < contents.frames:
                    yield number, frame

        running = False
        for index, (packet, _) in enumerate(packets(container, stream)):
            if index > last:
                break
            if needed[index]:
                # The decoder hands on whatever is here with the frame.
                packet.pts = int(contents.numbers[index])
                if skips:
                    codec.skip_frame = "DEFAULT" if is_wanted[index] else "NONREF"
                running = True
                yield from frames(packet)
            elif running:
                yield from frames(None)  # what the decoder still holds
                codec.flush_buffers()
                running = False
        yield from frames(None)


def _orientation(frame: Any) -> tuple[bool, bool, bool]:
    """(transposed, upside down, mirrored): how a picture is turned before it is shown.

    From the display matrix [a b; c d] (ISO 14496-12, 8.3.2): a camera held otherwise or a mirrored
    picture.  Angles between are as good as none.
    """
    for side in frame.side_data:
        if side.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = struct.unpack("<5i", bytes(side)[:20])
            if abs(a) + abs(d) < abs(b) + abs(c):
                return True, b < 0, c < 0
            return False, d < 0, a < 0
    return False, False, False


def _rgb(frame: Any, width: int, height: int, turn: tuple[bool, bool, bool]) -> np.ndarray:
    """[h, w, 3], turned; frames of another size than the first are scaled to it."""
    picture = frame.to_ndarray(format="rgb24", width=width, height=height)
    transposed, upside_down, mirrored = turn
    if transposed:
        picture = picture.transpose(1, 0, 2)
    return picture[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
