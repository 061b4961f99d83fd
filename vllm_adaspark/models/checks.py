"""What a request may ask of the processor: every limit whose breach would end the engine.

An exception in a worker ends the engine for everybody, so whatever a worker would stumble over is
refused here, in the API server's process, where an error is an HTTP 400.  Stock vLLM 0.32.0 lets
these requests through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..settings import shown

PIXELS = ("min_pixels", "max_pixels")
SIZE = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
MOST_PIXELS = 1 << 26  # of a frame: 8192 x 8192; Qwen2.5-VL's own limit is a fifth of it
# Options of the video loader.  Frames are sampled before the processor sees them, so here they
# change nothing; clients written for other servers send them.
LOADER_NUMBERS = ("fps", "num_frames", "min_frames", "max_frames")
MOST = 10**9  # of them; an integer of JSON may be too large for a float
SCOPES = ("images_kwargs", "videos_kwargs")  # Hugging Face's names for "only for images", "videos"


def check_processor_kwargs(kwargs: Mapping[str, Any], ours: str, *, sizes: bool) -> None:
    """Refuse keys of ``mm_processor_kwargs`` that the model cannot follow, and values out of range.

    Args:
        kwargs: those of one request.
        ours: our own key, whose value is checked elsewhere.
        sizes: whether the model takes frames of any size, so that a request may bound theirs.

    Raises:
        ValueError: names the key, the value and what is allowed.
    """
    named = {key: value for key, value in kwargs.items() if key != ours}
    _check_scope(named, "mm_processor_kwargs", ours, sizes)


def _check_scope(kwargs: Mapping[str, Any], where: str, ours: str | None, sizes: bool) -> None:
    scopes = SCOPES if ours else ()
    of_sizes = (*PIXELS, "size") if sizes else ()
    allowed = [*([ours] if ours else []), *of_sizes, *LOADER_NUMBERS, *scopes]

    def refuse(key: str, value: Any, why: str) -> None:
        raise ValueError(f"{where}.{str(key)[:80]}={shown(value)}: {why}")

    for key, value in kwargs.items():
        if key not in (*allowed, "do_sample_frames"):
            refuse(key, value, f"not a setting of this server; allowed: {', '.join(allowed)}")
        if value is None:
            continue
        if key in scopes:
            if not isinstance(value, Mapping):
                refuse(key, value, "expected an object")
            _check_scope(value, f"{where}.{key}", None, sizes)
        elif key in PIXELS:
            if not _is_whole(value) or not 1 <= value <= MOST_PIXELS:
                refuse(key, value, f"expected a whole number of pixels from 1 to {MOST_PIXELS}")
        elif key == "size":
            if not isinstance(value, Mapping) or set(value) != set(SIZE):
                refuse(
                    key, value, f"expected an object with {' and '.join(SIZE)}, no less, no more"
                )
            for edge, pixels in value.items():
                if not _is_whole(pixels) or not 1 <= pixels <= MOST_PIXELS:
                    why = f"expected a whole number of pixels from 1 to {MOST_PIXELS}"
                    refuse(f"size.{edge}", pixels, why)
        elif key == "do_sample_frames":
            if value is not False:
                refuse(key, value, "frames are sampled already, by media_io_kwargs; leave it out")
        elif not _is_number(value) or not 0 < value <= MOST:
            refuse(key, value, f"expected a number above 0 and at most {MOST}")
    # Either name may be used, and both are kept, so they must not contradict each other.
    size = kwargs.get("size") or {}
    least, most = (
        [v for v in (kwargs.get(name), size.get(edge)) if v is not None]
        for edge, name in SIZE.items()
    )
    if least and most and max(least) > min(most):
        refuse("min_pixels", max(least), f"more than max_pixels={min(most)}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
