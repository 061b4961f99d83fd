"""Videos and models as the command line names them: files, URLs, data URLs; presets, folders, hubs.

Nothing here imports vLLM, so a wrong name is told before seconds of start-up.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

from ..accounts.cost import PRESETS, Model, read_model
from ..models.layout import FrameRules, LayoutError, Sampling, Video
from ..video import decode
from ..video.container import VideoError, scan
from ..video.sampling import MAX_FPS, MAX_FRAMES, most_frames
from . import CommandError, UsageError

FETCH_SECONDS = 60  # without a sign of life


def sampling(args: argparse.Namespace, rules: FrameRules) -> Sampling:
    """The flags' values, checked against what the model's ``rules`` allow."""
    if args.fps is not None and not 0 < args.fps <= MAX_FPS:
        raise UsageError(f"--fps {args.fps:g}: expected a number above 0 and at most {MAX_FPS}")
    least = rules.least_frames
    if args.max_frames is not None and not least <= args.max_frames <= MAX_FRAMES:
        raise UsageError(
            f"--max-frames {args.max_frames}: expected a whole number from {least} to {MAX_FRAMES}"
        )
    least = rules.least_pixels
    if args.max_pixels is not None and least is None:
        raise UsageError(
            f"--max-pixels {args.max_pixels}: this model gives all frames one size; leave it out"
        )
    if args.max_pixels is not None and args.max_pixels < least:
        raise UsageError(
            f"--max-pixels {args.max_pixels}: expected at least {least} (four tokens a frame)"
        )
    return Sampling(fps=args.fps, max_frames=args.max_frames, max_pixels=args.max_pixels)


def is_web_address(source: str) -> bool:
    """Whether a video is to be fetched."""
    return re.match(r"https?://", source, re.IGNORECASE) is not None


def local_path(source: str) -> Path | None:
    """The file that a path or a ``file:`` URL names; None for another URL.

    Raises:
        UsageError: no such file, or a folder.
    """
    if source[:5].lower() == "data:" or is_web_address(source):
        return None
    if source[:7].lower() == "file://":
        source = urllib.request.url2pathname(source[7:])
    path = Path(os.path.expanduser(source))
    if not os.path.exists(path):  # False for a name longer than any file's, too
        raise UsageError(
            f"VIDEO {source!r}: no such file; give a path, or an http(s):, file: or data: URL"
        )
    if not path.is_file():
        raise UsageError(f"VIDEO {source!r}: not a file")
    return path


def read_video(source: str) -> bytes:
    """The bytes of a video.

    Args:
        source: a path, or an ``http(s):``, ``file:`` or ``data:`` URL.

    Raises:
        UsageError: no such file, a folder, a data URL that is none.
        CommandError: it could not be fetched.
    """
    path = local_path(source)
    if path is not None:
        return path.read_bytes()
    return _fetch(source) if is_web_address(source) else _data_url(source)


def _data_url(source: str) -> bytes:
    head, comma, body = source.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("expected data:video/mp4;base64,...")
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        raise UsageError(f"VIDEO {source[:40]!r}...: not a base64 data URL: {error}") from None


def _fetch(url: str) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=FETCH_SECONDS) as response:
            return response.read()
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise CommandError(f"VIDEO {url!r} could not be fetched: {error}") from None


def probe(data: bytes, source: str) -> Video:
    """Frames, rate and size, after decoding a first and a last frame.

    Raises:
        UsageError: not a video, or one that cannot be decoded.
    """
    shown = source if len(source) < 100 else source[:97] + "..."
    if not data:
        raise UsageError(f"VIDEO {shown!r}: empty, 0 bytes")
    try:
        contents = scan(data)
        picture, first, last = decode.ends(data, contents)
    except VideoError as error:
        raise UsageError(f"VIDEO {shown!r}: {error}") from None
    remarks = [contents.cut_short] if contents.cut_short else []
    if last - first + 1 < contents.frames:
        remarks.append(
            f"of {contents.frames} frames only {first} to {last} can be decoded: the file is "
            "damaged, and what cannot be read is left out"
        )
    if not contents.constant:
        remarks.append("its frames come at a variable rate: they are taken at even times")
    return Video(
        frames=last - first + 1,
        fps=contents.fps,
        width=picture.shape[1],
        height=picture.shape[0],
        most_frames=most_frames(contents),
        remarks=tuple(remarks),
    )


def find_model(name: str, revision: str | None = None) -> Model:
    """What must be known of a model: a preset (``7b``), a checkpoint's folder, or a hub's name.

    Raises:
        UsageError: no such preset or folder, or not a model of ours.
        CommandError: the hub could not be asked.
    """
    preset = PRESETS.get(name.lower())
    if preset is not None:
        return preset
    try:
        folder = Path(os.path.expanduser(name))
        if os.path.isdir(folder):
            return read_model(name, lambda file: _existing(folder / file))
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise UsageError(
                f"--model {name!r}: no such folder; give a checkpoint's folder, a hub's name such "
                f"as {PRESETS['7b'].name}, or one of {', '.join(PRESETS)}"
            )
        return read_model(name, lambda file: _from_hub(name, file, revision))
    except LayoutError as error:
        raise UsageError(str(error)) from None


def _existing(path: Path) -> Path | None:
    return path if path.exists() else None


def _from_hub(name: str, file: str, revision: str | None) -> Path | None:
    if file == "model.safetensors":
        return None  # only its size is asked for, and that is not worth gigabytes
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except LocalEntryNotFoundError as error:  # no network; a cached model has all it needs
        if file != "config.json":
            return None
        short = str(error).splitlines()[0]
    except EntryNotFoundError:
        return None
    except Exception as error:  # no such model, no access
        short = str(error).splitlines()[0]
    preset = next((key for key, model in PRESETS.items() if model.name == name), None)
    hint = f"; without a network: --model {preset}" if preset else ""
    raise CommandError(f"--model {name!r}: {file} could not be fetched: {short}{hint}")
