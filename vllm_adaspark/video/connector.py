"""Lists of JPEGs (``data:video/jpeg;base64,...,...``) by the same rules as files, and clear errors.

vLLM 0.32 decodes these lists in VideoMediaIO, past every video loader: it keeps the first 32
frames, drops the rest without a word and checks no option.  Its one seam is the registry of media
connectors, where startup.StartupCheck puts ours in the place of the default one.  Ours is vLLM's,
except for videos that one of our loaders reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import requests
from vllm.exceptions import VLLMUnprocessableEntityError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.base import MediaIO, MediaWithBytes
from vllm.multimodal.media.video import VideoMediaIO

from .container import VideoError
from .load import VideoLoader, check_backend, check_size
from .sampling import ONE_FRAME, PAIR, Options, at_constant_rate, refuse

DEFAULT = "http"  # vLLM's name for its own, which VLLM_MEDIA_CONNECTOR may replace by another
# No server was found, or it did not let us in; not what may pass, as its timeouts and its 500s.
UNREACHABLE = (aiohttp.ClientConnectorError, requests.exceptions.ConnectionError)
LONGEST_URL = 200  # characters of it in an error
LIST_FPS = 1.0  # vLLM's, for a list that comes without
MOST = 10**9  # frames of such a video, and its seconds
# What a client may say of the video that its list was taken from, as in vLLM.
LIST_OPTIONS = ("frames_indices", "total_num_frames", "duration", "do_sample_frames")


def use_connector() -> None:
    """Serve this process's media by our connector, unless VLLM_MEDIA_CONNECTOR names another."""
    MEDIA_CONNECTOR_REGISTRY.register(DEFAULT)(AdaSparkConnector)


class AdaSparkConnector(MediaConnector):
    """vLLM's, with our lists of JPEGs, and errors of the client's that are 400 instead of 500."""

    def fetch_video(self, video_url: str, **options: Any):
        self._check_backend()
        return super().fetch_video(video_url, **options)

    async def fetch_video_async(self, video_url: str, **options: Any):
        self._check_backend()
        return await super().fetch_video_async(video_url, **options)

    def load_from_url(self, url: str, *args: Any, **options: Any):
        try:
            return super().load_from_url(url, *args, **options)
        except UNREACHABLE as error:
            raise _unreachable(url) from error

    async def load_from_url_async(self, url: str, *args: Any, **options: Any):
        try:
            return await super().load_from_url_async(url, *args, **options)
        except UNREACHABLE as error:
            raise _unreachable(url) from error

    def _check_backend(self) -> None:
        check_backend(self.media_io_kwargs.get("video", {}))

    def _load_data_url(self, url: str, media_io: MediaIO):
        if isinstance(media_io, VideoMediaIO) and isinstance(media_io.video_loader, VideoLoader):
            media_io = _VideoMediaIO(media_io)
        return super()._load_data_url(url, media_io)

    def _load_file_url(self, url_spec: Any, media_io: MediaIO):
        try:
            return super()._load_file_url(url_spec, media_io)
        except OSError as error:
            raise ValueError(f"file://{url_spec.path}: {error.strerror or error}") from None


def _unreachable(url: str) -> Exception:
    """What vLLM says of a URL that its server does not know (HTTP 422), of one without a server.

    vLLM itself tries again some times, and then answers with a 500: as if the fault were the
    engine's, so that clients ask again and operators are called.
    """
    why = "Failed to fetch media from URL: no connection to its server"
    return VLLMUnprocessableEntityError(why, parameter="url", value=url[:LONGEST_URL])


class _VideoMediaIO(MediaIO):
    """Data URLs of videos: lists of JPEGs by our rules, all else by vLLM's class."""

    def __init__(self, stock: VideoMediaIO) -> None:
        self._stock = stock

    def load_base64(self, media_type: str, data: str):
        if media_type.lower() != "video/jpeg":
            return self._stock.load_base64(media_type, data)
        stock = self._stock
        most = stock.video_loader.most_of_list(stock.num_frames, stock.kwargs)
        parts = data.split(",")
        taken, metadata = _taken(len(parts), most, stock.kwargs)
        frames = None
        for nth, at in enumerate(taken):
            picture = np.asarray(_picture(stock.image_io, parts[at], at))
            height, width = picture.shape[:2]
            if frames is None:
                check_size(len(taken), width, height)
                frames = np.empty((len(taken), *picture.shape), np.uint8)
            if picture.shape != frames.shape[1:]:
                raise VideoError(
                    f"data:video/jpeg: frame {at} is {width}x{height} and the first is "
                    f"{frames.shape[2]}x{frames.shape[1]}; send frames of one size"
                )
            frames[nth] = picture
        return MediaWithBytes((frames, metadata), data.encode())

    def load_bytes(self, data: bytes):
        return self._stock.load_bytes(data)

    def load_file(self, filepath: Path):
        return self._stock.load_file(filepath)


def _taken(sent: int, most: int, options: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
    """(places in the list of the frames that are used, metadata).

    All are used unless there are more than ``most``.  ``fps`` is the rate of the video that the
    client took its frames from; ``frames_indices`` and ``total_num_frames`` say which of its frames
    they are, and without them the list is the whole video.
    """
    Options.checked(options, also=LIST_OPTIONS)
    if sent < PAIR:
        raise VideoError(f"data:video/jpeg: a list of {sent} frame(s) is no video; {ONE_FRAME}")
    indices = options.get("frames_indices", list(range(sent)))
    whole = isinstance(indices, list) and all(type(index) is int for index in indices)
    if not whole or indices != sorted(indices) or min(indices, default=0) < 0:
        refuse("frames_indices", indices, "expected whole numbers, ascending")
    if len(indices) != sent:
        refuse("frames_indices", indices, f"expected {sent} numbers, one a frame of the list")
    total = options.get("total_num_frames", max(sent, indices[-1] + 1))
    if type(total) is not int or not indices[-1] < total <= MOST:
        why = f"expected a whole number, above {indices[-1]} and at most {MOST}"
        refuse("total_num_frames", total, why)
    fps = float(options.get("fps", LIST_FPS))
    duration = options.get("duration", total / fps)
    if type(duration) not in (int, float) or not 0 <= duration <= MOST:
        refuse("duration", duration, f"expected seconds, at most {MOST}")
    taken = list(range(sent))
    if sent > most:
        taken = at_constant_rate(sent, max(PAIR, most // PAIR * PAIR))
    return taken, {
        "total_num_frames": total,
        "fps": fps,
        "duration": duration,
        "video_backend": "jpeg_sequence",
        "frames_indices": [indices[at] for at in taken],
        "do_sample_frames": options.get("do_sample_frames", False),
    }


def _picture(image_io: Any, data: str, at: int) -> Any:
    try:
        return image_io.load_base64("image/jpeg", data).media.convert("RGB")
    except ValueError as error:
        raise VideoError(f"data:video/jpeg: frame {at} is not a base64 picture: {error}") from None
