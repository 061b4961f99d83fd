"""vLLM's video loaders for our models: PyAV, OpenCV or decord, a clear choice of frames and errors.

* ``adaspark`` reads with PyAV; startup.StartupCheck makes it the default for models that take
  frames by time, and ``adaspark_uniform`` for those that take a number of them.
* ``adaspark_opencv`` and ``adaspark_decord`` read the same frames with OpenCV and decord; chosen
  with ``--media-io-kwargs '{"video": {"video_backend": "adaspark_opencv"}}'``, or by a request.
  What they cannot read, or number otherwise, is read with PyAV after all, and logged.

How many frames is set by ``fps``, ``max_frames`` and ``min_frames``, or by ``num_frames`` and
``fps``, in ``media_io_kwargs.video`` of the server or of a request.  A bad one is a ValueError,
which is HTTP 400; so is a video that cannot be used.
"""

from __future__ import annotations

import inspect
from functools import partial
from io import BytesIO
from typing import Any, ClassVar

import numpy as np
from vllm.logger import init_logger
from vllm.multimodal.media.video import VideoMediaIO
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY
from vllm.multimodal.video import VideoLoader as StockLoader
from vllm.multimodal.video_decoders import check_frame_pixel_limit
from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin

from . import decode
from .container import Contents, VideoError, scan
from .sampling import EVEN_FRAMES, MAX_FRAMES, Evenly, Options, metadata, refuse

logger = init_logger("vllm.adaspark")

LOADER = "adaspark"  # names for media_io_kwargs.video.video_backend
UNIFORM_LOADER = "adaspark_uniform"
OPENCV_LOADER = "adaspark_opencv"
DECORD_LOADER = "adaspark_decord"

# vLLM hands a loader this num_frames if nobody sets one; -1 is its word for "all".
UNSET_NUM_FRAMES = (inspect.signature(VideoMediaIO.__init__).parameters["num_frames"].default, -1)
DECORD_SEEKS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi")  # FFmpeg's names
SAME_TIME = 0.4  # of the shortest time between two frames: the same frame, by two clocks


MAX_GIB = 8  # of a video's decoded frames: a small file may hold very many large ones


def check_size(frames: int, width: int, height: int) -> None:
    """Refuse frames that are too large, or too large together, before memory is taken for them.

    Raises:
        ValueError: says what they would take, and what to change.
    """
    check_frame_pixel_limit(width, height)
    gib = frames * width * height * 3 / 2**30
    if gib > MAX_GIB:
        raise VideoError(
            f"{frames} frames of {width}x{height} take {gib:.1f} GiB, and a video may take "
            f"{MAX_GIB}: take fewer (media_io_kwargs.video.fps or max_frames), or send smaller ones"
        )


class _Unreadable(Exception):
    """OpenCV or decord cannot read a file as PyAV does; says why."""


@VIDEO_LOADER_REGISTRY.register(LOADER)
class VideoLoader(StockLoader):
    """Reads with PyAV."""

    decoder: ClassVar[str] = "pyav"

    @classmethod
    def load_bytes(
        cls, data: bytes, num_frames: int = -1, **options: Any
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """(frames ``[n, h, w, 3]`` RGB uint8, metadata as Hugging Face's processor takes it).

        Raises:
            ValueError: an option or the video cannot be used; says which, and why.
        """
        if num_frames not in UNSET_NUM_FRAMES:
            options["num_frames"] = num_frames
        return cls._load(data, cls.options(options))

    @classmethod
    def _load(cls, data: bytes, options: Options | Evenly) -> tuple[np.ndarray, dict[str, Any]]:
        contents = scan(data)
        if contents.cut_short:
            logger.warning("AdaSpark: a video: %s", contents.cut_short)
        taken = options.sample(contents)
        frames, read, decoder = cls._read(data, contents, taken.numbers)
        _tell_what_is_missing(contents, taken.numbers, read)
        return frames, metadata(contents, taken, read, decoder)

    @classmethod
    def options(cls, given: dict[str, Any]) -> Options | Evenly:
        """Options of ``media_io_kwargs.video``, checked.

        Raises:
            ValueError: names the option, its value and what is allowed.
        """
        if given.get("num_frames", -1) != -1:
            why = "frames are sampled by time; use fps or max_frames"
            refuse("num_frames", given["num_frames"], why)
        return Options.checked({k: v for k, v in given.items() if k != "num_frames"})

    @classmethod
    def most_of_list(cls, num_frames: int, options: dict[str, Any]) -> int:
        """How many frames of a list of JPEGs are used at the most.

        Raises:
            ValueError: an option cannot be followed.
        """
        if num_frames not in UNSET_NUM_FRAMES:
            refuse("num_frames", num_frames, "all frames of a list are used; use max_frames")
        return options.get("max_frames", MAX_FRAMES)

    @classmethod
    def _read(
        cls, data: bytes, contents: Contents, numbers: list[int]
    ) -> tuple[np.ndarray, list[int], str]:
        """(frames, their numbers, the decoder's name)."""
        check = partial(check_size, len(numbers))
        frames, read = decode.read(data, contents, numbers, check_size=check)
        return frames, read, VideoLoader.decoder


@VIDEO_LOADER_REGISTRY.register(UNIFORM_LOADER)
class UniformVideoLoader(VideoLoader):
    """Reads with PyAV the frames that vLLM's own loader takes for models that know no time."""

    @classmethod
    def load_bytes(cls, data, num_frames=EVEN_FRAMES, **options):
        return cls._load(data, cls.options(options | {"num_frames": num_frames}))

    @classmethod
    def options(cls, given):
        return Evenly.checked(given)

    @classmethod
    def most_of_list(cls, num_frames, options):
        most = super().most_of_list(UNSET_NUM_FRAMES[0], options)
        return most if num_frames in UNSET_NUM_FRAMES else min(most, num_frames)


class _OtherDecoder(VideoLoader):
    """Reads plain files with another decoder, all else with PyAV."""

    @classmethod
    def _read(cls, data, contents, numbers):
        try:
            if contents.counted or contents.hdr or not contents.whole or contents.cut_short:
                # decord ends the process at some files that are cut off.
                raise _Unreadable("its times or its colours are not plain, or a part is missing")
            return cls._try(data, contents, numbers), numbers, cls.decoder
        except _Unreadable as reason:
            logger.warning("AdaSpark: read a video with PyAV, not %s: %s", cls.decoder, reason)
        return super()._read(data, contents, numbers)

    @classmethod
    def _try(cls, data: bytes, contents: Contents, numbers: list[int]) -> np.ndarray:
        """The frames, or _Unreadable if they cannot be had or may be others."""
        raise NotImplementedError


@VIDEO_LOADER_REGISTRY.register(OPENCV_LOADER)
class OpenCVVideoLoader(_OtherDecoder):
    """Reads with OpenCV, which decodes every frame on the way."""

    decoder = "opencv"

    @classmethod
    def _try(cls, data, contents, numbers):
        import cv2

        try:
            reader = OpenCVVideoBackendMixin.open_video_capture(data)
        except ValueError as error:
            raise _Unreadable(error) from None
        size = [
            int(reader.get(side)) for side in (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH)
        ]
        check_size(len(numbers), size[1], size[0])
        frames, at, told = np.empty((len(numbers), *size, 3), np.uint8), 0, []
        for number in range(numbers[-1] + 1):
            if not reader.grab():
                raise _Unreadable(f"it cannot read frame {number}")
            if number != numbers[at]:
                continue
            told.append((number, reader.get(cv2.CAP_PROP_POS_MSEC) / 1000))
            there, frame = reader.retrieve()
            if not there or frame.shape != frames.shape[1:]:
                raise _Unreadable(f"it cannot read frame {number}")
            first = at
            while at < len(numbers) and numbers[at] == number:
                at += 1
            frames[first:at] = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        _same_times(contents, told)
        return frames


@VIDEO_LOADER_REGISTRY.register(DECORD_LOADER)
class DecordVideoLoader(_OtherDecoder):
    """Reads with decord, which seeks to the keyframe before a frame."""

    decoder = "decord"

    @classmethod
    def _try(cls, data, contents, numbers):
        decord = require_decord()
        if contents.container not in DECORD_SEEKS:
            raise _Unreadable(f"it does not seek exactly in {contents.container}")
        distinct, where = np.unique(numbers, return_inverse=True)
        try:
            reader = decord.VideoReader(BytesIO(data))
            if len(reader) != contents.frames:
                raise _Unreadable(f"it counts {len(reader)} frames of {contents.frames}")
            check_size(len(numbers), *reader[0].shape[1::-1])
            starts = reader.get_frame_timestamp(distinct)[:, 0]
            _same_times(contents, list(zip(distinct, starts)))
            frames = reader.get_batch(distinct).asnumpy()
        except (decord.DECORDError, RuntimeError) as error:
            raise _Unreadable(str(error).strip().splitlines()[0]) from None
        return frames if len(distinct) == len(numbers) else frames[where]


def check_backend(options: dict[str, Any]) -> None:
    """Refuse a video_backend that vLLM does not know, which fails an assertion there.

    Raises:
        ValueError: names it.
    """
    name, known = options.get("video_backend"), VIDEO_LOADER_REGISTRY.name2class
    if name is not None and (not isinstance(name, str) or name not in known):
        refuse("video_backend", name, f"unknown; known: {', '.join(sorted(known))}")


def check_server_options(options: dict[str, Any]) -> None:
    """Refuse what every request would fail with: a server's ``--media-io-kwargs`` for videos.

    Raises:
        ValueError: an option is wrong, or decord was chosen and is not installed.
    """
    check_backend(options)
    options = dict(options)
    name = options.pop("video_backend")
    loader = VIDEO_LOADER_REGISTRY.name2class[name]
    if issubclass(loader, VideoLoader):
        loader.options(options)
        if name == DECORD_LOADER:
            require_decord()


def _same_times(contents: Contents, told: list[tuple[int, float]]) -> None:
    """Raise _Unreadable if another decoder shows a frame at another time: it is another frame."""
    gaps = np.diff(contents.times)
    tolerance = SAME_TIME * gaps[gaps > 0].min()
    shift = told[0][1] - contents.times[told[0][0]]
    for number, seconds in told:
        if abs(seconds - shift - contents.times[number]) > tolerance:
            raise _Unreadable(
                f"its frame {number} is at {seconds - shift:.3f} s, not at "
                f"{contents.times[number]:.3f} s"
            )


def _tell_what_is_missing(contents: Contents, wanted: list[int], read: list[int]) -> None:
    if len(read) < len(wanted):
        logger.warning(
            "AdaSpark: a video could be decoded from %.1f s to %.1f s of %.1f s: %d of %d frames",
            contents.times[read[0]],
            contents.times[read[-1]],
            contents.seconds,
            len(read),
            len(wanted),
        )
    elif missing := sum(one != other for one, other in zip(wanted, read)):
        logger.warning(
            "AdaSpark: %d of %d frames of a video are damaged; the frame before stays in the place "
            "of each",
            missing,
            len(wanted),
        )


def require_decord():
    """The module ``decord``, or a ValueError that says how to get it."""
    try:
        import decord
    except ImportError:
        raise ValueError(
            f"video_backend={DECORD_LOADER!r} needs decord, which is not installed on the server: "
            f"pip install 'vllm-adaspark[video]', or use video_backend={LOADER!r}"
        ) from None
    return decord
