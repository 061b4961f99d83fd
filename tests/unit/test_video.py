"""Reading videos: which frames of which files, with each decoder, and what is said of bad ones."""

from __future__ import annotations

import io
import logging
import re
import sys
import tracemalloc
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
import video as demo_video  # examples/demo
from PIL import Image
from transformers.video_utils import VideoMetadata
from video_files import can_encode, encode, number_of, picture, sound
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, Qwen2VLVideoBackend

from vllm_adaspark.cli import UsageError
from vllm_adaspark.cli.media import probe
from vllm_adaspark.models.layout import Sampling
from vllm_adaspark.models.qwen2_5_vl_layout import QwenFrames
from vllm_adaspark.video import decode
from vllm_adaspark.video.container import scan
from vllm_adaspark.video.load import (
    DECORD_LOADER,
    LOADER,
    OPENCV_LOADER,
    DecordVideoLoader,
    OpenCVVideoLoader,
    VideoLoader,
)
from vllm_adaspark.video.sampling import QWEN_FRAMES, Options

ROOT = Path(__file__).resolve().parents[2]
NO_DECORD = pytest.mark.skipif(find_spec("decord") is None, reason="decord is not installed")
OTHERS = [OpenCVVideoLoader, pytest.param(DecordVideoLoader, marks=NO_DECORD)]
ALL = [VideoLoader, *OTHERS]

# Container, codec and how to write it: the table of docs/video.md.
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov"}
FORMATS = {
    "mp4, H.264": ("mp4", "libx264", {"b_frames": 2}),
    "mp4, HEVC": ("mp4", "libx265", {}),
    "mp4, AV1": ("mp4", "libsvtav1", {}),
    "mp4, VP9": ("mp4", "libvpx-vp9", {}),
    "mp4, MPEG-4": ("mp4", "mpeg4", {"b_frames": 2}),
    "mp4, MJPEG": ("mp4", "mjpeg", {}),
    "fragmented mp4, H.264": ("mp4", "libx264", {"container_options": FRAGMENTED}),
    "mov, H.264": ("mov", "libx264", {}),
    "mov, ProRes": ("mov", "prores_ks", {"pixels": "yuv422p10le"}),
    "mkv, H.264": ("matroska", "libx264", {"b_frames": 2}),
    "mkv, HEVC": ("matroska", "libx265", {"b_frames": 2}),
    "mkv, FFV1": ("matroska", "ffv1", {}),
    "webm, VP8": ("webm", "libvpx", {}),
    "webm, VP9": ("webm", "libvpx-vp9", {}),
    "webm, AV1": ("webm", "libsvtav1", {}),
    "ts, H.264": ("mpegts", "libx264", {"b_frames": 2}),
    "ts, HEVC": ("mpegts", "libx265", {}),
    "ts, MPEG-2": ("mpegts", "mpeg2video", {"b_frames": 2, "rate": 25}),
    "mpg, MPEG-2": ("mpeg", "mpeg2video", {"b_frames": 2, "rate": 25}),
    "avi, MPEG-4": ("avi", "mpeg4", {}),
    "avi, MPEG-4 with B-frames": ("avi", "mpeg4", {"b_frames": 2}),
    "avi, H.264 with B-frames": ("avi", "libx264", {"b_frames": 2}),
    "avi, MJPEG": ("avi", "mjpeg", {}),
    "flv, H.264": ("flv", "libx264", {}),
    "GIF": ("gif", "gif", {}),
    "bare H.264": ("h264", "libx264", {"b_frames": 2, "rate": 25}),
}
# 30 frames a second for ten seconds, then one every two.
UNEVEN = [number / 30 for number in range(300)] + [10 + 2.0 * number for number in range(25)]


def shown(data: bytes, loader=VideoLoader, **options) -> tuple[list[int], VideoMetadata]:
    """The numbers that the pictures read from a file show, and its metadata."""
    frames, metadata = loader.load_bytes(data, **options)
    assert frames.dtype == np.uint8 and len(frames) == len(metadata["frames_indices"])
    del metadata["do_sample_frames"]
    return [number_of(frame) for frame in frames], VideoMetadata(**metadata)


def seconds_apart(metadata: VideoMetadata) -> float:
    """Between two frames that were taken, as Hugging Face's processor has it."""
    return 1 / metadata.sampled_fps


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What is logged as a warning: vLLM's loggers do not propagate, and tests may silence them."""
    logger = logging.getLogger("vllm.adaspark")
    logger.addHandler(caplog.handler)
    monkeypatch.setattr(logger, "disabled", False)
    caplog.set_level(logging.WARNING, logger.name)
    yield lambda: caplog.text
    logger.removeHandler(caplog.handler)


# -- containers and codecs -------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_reads_the_right_frames_of(name) -> None:
    container, codec, how = FORMATS[name]
    if not can_encode(codec):
        pytest.skip(f"this FFmpeg cannot encode {codec}")
    rate = how.get("rate", 10)
    numbers, metadata = shown(encode(container, codec, **how), fps=rate / 5, min_frames=8)
    assert numbers == metadata.frames_indices == list(range(0, 40, 5))
    assert metadata.total_num_frames == 40
    assert metadata.fps == pytest.approx(rate, abs=1e-3)
    assert seconds_apart(metadata) == pytest.approx(5 / rate)


def test_the_documentation_names_what_is_tested() -> None:
    text = (ROOT / "docs" / "video.md").read_text()
    table = text.partition("<!-- formats -->")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", table, re.M)
    assert rows[0] == ("container", "codec")
    listed = {
        f"{container}, {codec}" if codec != "-" else container
        for container, codecs in rows[1:]
        for codec in codecs.split(", ")
    }
    assert listed == set(FORMATS)


@pytest.mark.parametrize("size", [(16, 16), (3840, 2160), (95, 63)])
def test_sizes(size) -> None:
    frames, _ = VideoLoader.load_bytes(encode("matroska", "ffv1", size=size, frames=4))
    assert frames.shape == (4, size[1], size[0], 3)
    assert [number_of(frame) for frame in frames] == [0, 1, 2, 3]


@pytest.mark.parametrize("pixels", ["yuv444p", "yuv422p", "yuv420p10le", "gray"])
def test_pixel_formats(pixels) -> None:
    assert shown(encode(pixels=pixels))[0] == list(range(0, 40, 5))


@pytest.mark.parametrize("loader", ALL)
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_phone_held_otherwise(loader, degrees) -> None:
    upright, _ = VideoLoader.load_bytes(encode())
    frames, _ = loader.load_bytes(encode(rotation=degrees))
    turned = np.rot90(upright, degrees // 90, axes=(1, 2))
    assert frames.shape == turned.shape
    assert np.abs(frames.astype(int) - turned).mean() < 1.0


def test_an_animated_png() -> None:
    file = io.BytesIO()
    first, *others = [Image.fromarray(picture(number)) for number in range(10)]
    first.save(file, "PNG", save_all=True, append_images=others, duration=100)
    assert shown(file.getvalue())[0] == [0, 2, 5, 7]


# -- times -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", ALL)
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_variable_rate_is_sampled_at_even_times(container, loader) -> None:
    """At each time what a player shows then; the last frame is seen."""
    numbers, metadata = shown(encode(container, times=UNEVEN), loader)
    step = seconds_apart(metadata)
    assert step == pytest.approx(0.5)
    expected = np.searchsorted(UNEVEN, np.arange(len(numbers)) * step + 1e-3, side="right") - 1
    assert metadata.frames_indices == expected.tolist()
    assert numbers == [number % 256 for number in expected]
    assert metadata.frames_indices[0] == 0 and metadata.frames_indices[-2:] == [324, 324]
    assert {*range(300, 325)} <= set(metadata.frames_indices), "every frame of the sparse part"


def test_a_burst_among_few_frames_is_seen() -> None:
    """No fewer frames than fps asks for, though the file has fewer."""
    numbers, metadata = shown(encode(times=[0, 20, 20.5, 21, 21.5, 40]))
    assert set(numbers) == set(range(6))
    assert len(numbers) == 82 and seconds_apart(metadata) == pytest.approx(0.5)


def test_max_frames_of_a_variable_rate() -> None:
    numbers, metadata = shown(encode(times=UNEVEN), max_frames=8)
    assert len(numbers) == 8 and metadata.frames_indices[-1] == 324
    assert seconds_apart(metadata) == pytest.approx(58 / 6)


def test_a_clock_of_milliseconds_is_a_constant_rate() -> None:
    data = encode("matroska", rate=Fraction(30000, 1001), frames=100)
    contents = scan(data)
    assert contents.constant and contents.fps == pytest.approx(30000 / 1001)
    _, metadata = Qwen2VLVideoBackend.load_bytes(data)
    assert shown(data)[1].frames_indices == metadata["frames_indices"]


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libx264"])
def test_a_recording_without_a_length(codec) -> None:
    """As browsers write them: no duration, no index."""
    container = "webm" if codec == "libvpx-vp9" else "matroska"
    data = encode(container, codec, frames=80, container_options={"live": "1"})
    assert av.open(io.BytesIO(data)).duration is None
    assert shown(data)[0] == list(range(0, 80, 5))


@pytest.mark.parametrize("container", ["mp4", "mpegts"])
def test_frames_that_start_late(container) -> None:
    numbers, metadata = shown(encode(container, start=1.4, b_frames=2))
    assert numbers == list(range(0, 40, 5)) and metadata.duration == pytest.approx(4)


@pytest.mark.parametrize("loader", ALL)
def test_frames_that_an_edit_list_hides(loader) -> None:
    numbers, metadata = shown(encode(frames=60, first_shown=15), loader)
    assert metadata.total_num_frames == 45
    assert numbers == [15 + index for index in metadata.frames_indices]


def test_two_recordings_joined() -> None:
    part = encode("mpegts", frames=40)
    numbers, metadata = shown(part + part)
    assert numbers == 2 * list(range(0, 40, 5)) and metadata.total_num_frames == 80
    assert seconds_apart(metadata) == pytest.approx(0.5)


def test_an_hour_of_one_frame_a_minute() -> None:
    numbers, metadata = shown(encode(frames=60, rate=Fraction(1, 60)))
    assert numbers == list(range(60)) and seconds_apart(metadata) == pytest.approx(60)


# -- files that are cut off or damaged -------------------------------------------------------------


@pytest.mark.parametrize(
    "container, options",
    [
        ("mp4", {"movflags": "faststart"}),
        ("mp4", FRAGMENTED),
        ("matroska", {}),
        ("mpegts", {}),
        ("avi", {}),
    ],
)
@pytest.mark.parametrize("loader", ALL)
def test_half_a_file(container, options, loader, warnings) -> None:
    """What is there, at its own times."""
    codec = "mpeg4" if container == "avi" else "libx264"
    data = encode(container, codec, frames=128, rate=2, container_options=options)
    half = data[: len(data) * 55 // 100]
    numbers, metadata = shown(half, loader)
    assert numbers == list(range(len(numbers))) and 40 < len(numbers) < 100
    # Of an odd number of frames one is left out, as the model takes them in pairs.
    assert seconds_apart(metadata) == pytest.approx(0.5, rel=1.01 / len(numbers))
    assert metadata.duration == pytest.approx(len(numbers) / 2, abs=1)
    if "faststart" in options.values() or container == "matroska":
        assert "claims 64.0 s of video" in warnings()
        video = probe(half, "half.mp4")
        assert video.frames == metadata.total_num_frames
        assert "it was cut off" in video.remarks[0]


def damage(data: bytes, start: float, end: float) -> bytes:
    """The mp4 with this part of its coded frames blanked."""
    first, last = data.index(b"mdat") + 4, data.index(b"moov") - 4
    low, high = (first + int((last - first) * share) for share in (start, end))
    return data[:low] + bytes(high - low) + data[high:]


@pytest.mark.parametrize("loader", ALL)
def test_a_damaged_end_is_left_out(loader, warnings) -> None:
    data = damage(encode(codec="mpeg4", frames=80, gop=5), 0.5, 1)
    numbers, metadata = shown(data, loader)
    assert metadata.frames_indices == list(range(0, 5 * len(numbers), 5))
    assert numbers[:-1] == metadata.frames_indices[:-1], "half of the last one may be blank"
    assert 5 <= len(numbers) <= 10
    assert seconds_apart(metadata) == pytest.approx(0.5)
    assert "could be decoded from 0.0 s to" in warnings()
    video = probe(data, "damaged.mp4")
    assert 0 < video.frames - metadata.frames_indices[-1] <= 5
    assert "can be decoded" in video.remarks[0]


@pytest.mark.parametrize("loader", ALL)
def test_where_the_middle_is_damaged_the_last_picture_stays(loader, warnings) -> None:
    data = damage(encode(codec="mpeg4", frames=80, gop=5), 0.3, 0.6)
    numbers, metadata = shown(data, loader)
    assert metadata.frames_indices == sorted(metadata.frames_indices)
    wrong = [one for one, other in zip(numbers, metadata.frames_indices) if one != other]
    assert len(set(wrong)) <= 2, "half of the frames at the edges may be blank"
    assert len(numbers) == 16 and 5 <= len(set(metadata.frames_indices)) < 16
    assert seconds_apart(metadata) == pytest.approx(0.5)
    assert "frames of a video are damaged" in warnings()


def test_a_broadcast_that_is_joined_late() -> None:
    """Nothing before the first keyframe can be decoded: it is left out."""
    data = encode("mpegts", frames=100, gop=50)
    numbers, _ = shown(data[len(data) // 4 // 188 * 188 :])
    assert numbers[0] >= 25 and numbers == sorted(set(numbers)) and numbers[-1] >= 90


# -- what is decoded -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "codec, options",
    [
        ("libx264", {}),
        ("libx264", {"x264-params": "open-gop=1"}),
        ("libx265", {"x265-params": "log-level=none:open-gop=1"}),
        ("libvpx-vp9", {}),
        ("libsvtav1", {}),
    ],
)
def test_groups_without_a_wanted_frame_are_not_decoded(codec, options) -> None:
    if not can_encode(codec):
        pytest.skip(f"this FFmpeg cannot encode {codec}")
    b_frames = 3 if codec.startswith("libx26") else 0
    data = encode("matroska", codec, frames=200, gop=10, b_frames=b_frames, options=options)
    contents = scan(data)
    for wanted in ([0, 199], [3, 8, 9, 10, 11, 98, 101, 150], [57], [9, 10, 19, 29, 39]):
        frames, read = decode.read(data, contents, wanted)
        assert read == wanted == [number_of(frame) for frame in frames]
        decoded = decode._needed(contents, np.array(wanted)).sum()
        assert decoded <= 22 * len(wanted)
    assert decode._needed(contents, np.arange(200)).all()


def test_a_keyframe_that_is_none() -> None:
    """A container may call every frame a keyframe."""
    data = encode(frames=60, gop=60)
    contents = scan(data)
    lying = replace(contents, keys=np.ones_like(contents.keys))
    frames, read = decode.read(data, lying, [25, 45])
    assert read == [25, 45] == [number_of(frame) for frame in frames]


def test_only_wanted_frames_become_pictures_in_memory() -> None:
    size = (640, 360)
    data = encode(size=size, frames=100, options={"preset": "ultrafast"})
    tracemalloc.start()
    frames, _ = VideoLoader.load_bytes(data, max_frames=4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert frames.nbytes == 4 * 3 * size[0] * size[1]
    assert peak < 2 * frames.nbytes + len(data)


@pytest.mark.parametrize("loader", OTHERS)
def test_hdr_is_converted_in_one_way(loader) -> None:
    """By the file's matrix and no tone mapping, though OpenCV alone would do otherwise."""
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": 16}
    bars = np.zeros((64, 96, 3), np.uint8)
    for at, colour in enumerate([(200, 30, 30), (30, 200, 30), (30, 30, 200), (128, 128, 128)]):
        bars[:, 24 * at : 24 * at + 24] = colour
    data = encode(codec="libx265", pixels="yuv420p10le", tags=tags, pictures=[bars] * 4)
    frames, _ = VideoLoader.load_bytes(data)
    other, metadata = loader.load_bytes(data)
    np.testing.assert_array_equal(other, frames)
    assert metadata["video_backend"] == "pyav"
    tenbit = next(av.open(io.BytesIO(data)).decode(video=0))
    luma = tenbit.to_ndarray()[32, [12, 36, 60, 84]]
    blue, red = tenbit.to_ndarray()[64:].reshape(2, 32, 48)[:, 16, [6, 18, 30, 42]].astype(float)
    # ITU-R BT.2020, non-constant luminance, limited range of 10 bits.
    y, cb, cr = (luma.astype(float) - 64) / 876, (blue - 512) / 896, (red - 512) / 896
    green = y - 0.16455 * cb - 0.57135 * cr
    expected = np.stack([y + 1.4746 * cr, green, y + 1.8814 * cb], -1)
    assert np.abs(frames[0, 32, [12, 36, 60, 84]] - 255 * expected.clip(0, 1)).max() < 3


# -- the same with each decoder, and as vLLM -------------------------------------------------------


def test_names_are_registered() -> None:
    assert isinstance(VIDEO_LOADER_REGISTRY.load(LOADER), VideoLoader)
    assert isinstance(VIDEO_LOADER_REGISTRY.load(OPENCV_LOADER), OpenCVVideoLoader)
    assert isinstance(VIDEO_LOADER_REGISTRY.load(DECORD_LOADER), DecordVideoLoader)


def mp4(tmp_path, seconds: float, fps: float, **size) -> bytes:
    size = {"width": 96, "height": 64} | size
    path = tmp_path / "video.mp4"
    return demo_video.write_mp4(path, seconds=seconds, fps=fps, **size).read_bytes()


@pytest.mark.parametrize("fps", [1, 8, 12.5, 23.976, 25, 29.97, 60])
@pytest.mark.parametrize("seconds", [2, 5.3])
def test_plain_files_are_read_as_by_stock_vllm(tmp_path, fps, seconds) -> None:
    data = mp4(tmp_path, seconds, fps)
    for options in ({}, {"fps": 1, "max_frames": 4}, {"fps": 30, "max_frames": 6}):
        stock, stock_metadata = Qwen2VLVideoBackend.load_bytes(data, **options)
        del stock_metadata["video_backend"]
        for loader in (VideoLoader, OpenCVVideoLoader, DecordVideoLoader):
            if loader is DecordVideoLoader and find_spec("decord") is None:
                continue
            frames, metadata = loader.load_bytes(data, **options)
            assert metadata.pop("video_backend") == loader.decoder
            indices = metadata.pop("frames_indices")
            assert indices == stock_metadata["frames_indices"]
            assert metadata == pytest.approx(
                {key: value for key, value in stock_metadata.items() if key != "frames_indices"}
            )
            # Another build of the same decoder may round otherwise; another frame differs more.
            assert np.abs(frames.astype(int) - stock).mean() < 1.0


@pytest.mark.parametrize("loader", OTHERS)
@pytest.mark.parametrize("name", ["mp4, H.264", "mp4, HEVC", "webm, VP9", "mkv, H.264"])
def test_other_decoders_read_plain_files_themselves(name, loader) -> None:
    container, codec, how = FORMATS[name]
    data = encode(container, codec, **how)
    frames, metadata = loader.load_bytes(data)
    expected, ours = VideoLoader.load_bytes(data)
    assert metadata == {**ours, "video_backend": loader.decoder}
    assert np.abs(frames.astype(int) - expected).mean() < 1.0


@pytest.mark.parametrize("loader", OTHERS)
@pytest.mark.parametrize("name", ["webm, AV1", "ts, H.264", "mpg, MPEG-2", "bare H.264"])
def test_what_other_decoders_misread_is_read_right(name, loader) -> None:
    container, codec, how = FORMATS[name]
    if not can_encode(codec):
        pytest.skip(f"this FFmpeg cannot encode {codec}")
    rate = how.get("rate", 10)
    data = encode(container, codec, **how)
    assert shown(data, loader, fps=rate / 5, min_frames=8)[0] == list(range(0, 40, 5))


# -- how many frames -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, frames",
    [
        ({}, 20),
        ({"fps": 1}, 10),
        ({"fps": 0.5}, 4),
        ({"fps": 4}, 40),
        ({"max_frames": 8}, 8),
        ({"max_frames": 9}, 8),
        ({"max_frames": 2}, 2),
        ({"fps": 0.1, "min_frames": 12}, 12),
        ({"fps": 8, "max_frames": 1000}, 80),
        ({"num_frames": 32}, 20),
        ({"num_frames": -1}, 20),
    ],
)
def test_options_set_the_number_of_frames(tmp_path, options, frames) -> None:
    loaded, metadata = VideoLoader.load_bytes(mp4(tmp_path, 10, 8), **options)
    assert len(loaded) == len(metadata["frames_indices"]) == frames


def test_more_than_768_frames_only_where_asked_for(tmp_path) -> None:
    data = mp4(tmp_path, 100, 8, width=16, height=16)
    assert len(VideoLoader.load_bytes(data, fps=8)[0]) == QWEN_FRAMES
    assert len(VideoLoader.load_bytes(data, fps=8, max_frames=2000)[0]) == 800


@pytest.mark.parametrize("options", [{}, {"fps": 0.3}, {"fps": 8}, {"max_frames": 20}])
@pytest.mark.parametrize("times", [UNEVEN, [0, 20, 20.5, 21, 21.5, 40], None])
def test_inspect_counts_what_is_taken(times, options) -> None:
    data = encode(times=times, frames=77)
    video = probe(data, "video.mp4")
    assert (video.width, video.height) == (96, 64)
    taken = Options(**options).sample(scan(data)).numbers
    assert QwenFrames().sampled(video, Sampling(**options)) == len(taken)
    assert bool(video.remarks) == (times is not None)


# -- bad options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", ALL)
@pytest.mark.parametrize(
    "options, words",
    [
        ({"fps": 0}, ["video.fps=0", "above 0"]),
        ({"fps": -2}, ["video.fps=-2", "above 0"]),
        ({"fps": 31}, ["video.fps=31", "at most 30"]),
        ({"fps": "2"}, ["video.fps='2'", "frames per second"]),
        ({"fps": float("nan")}, ["video.fps=nan"]),
        ({"fps": True}, ["video.fps=True"]),
        ({"fps": None}, ["video.fps=None"]),
        ({"max_frames": 1}, ["video.max_frames=1", "from 2 to"]),
        ({"max_frames": 0}, ["video.max_frames=0", "from 2 to"]),
        ({"max_frames": 8.0}, ["video.max_frames=8.0", "whole number"]),
        ({"max_frames": "8"}, ["video.max_frames='8'", "whole number"]),
        ({"max_frames": 1 << 40}, ["video.max_frames=", "from 2 to 32768"]),
        ({"min_frames": 12, "max_frames": 8}, ["video.min_frames=12", "max_frames=8"]),
        ({"num_frames": 16}, ["video.num_frames=16", "use fps or max_frames"]),
        ({"max_frame": 8}, ["video.max_frame=8", "unknown", "max_frames"]),
        ({"backend": "torchcodec"}, ["video.backend='torchcodec'", "unknown", "video_backend"]),
        ({"frame_recovery": True}, ["video.frame_recovery=True", "unknown"]),
        ({"progress": 1}, ["video.progress=1", "unknown"]),
    ],
)
def test_bad_options_name_themselves(loader, options, words) -> None:
    with pytest.raises(ValueError) as caught:
        loader.load_bytes(encode(), **options)
    for word in words:
        assert word in str(caught.value)


def test_without_decord_the_error_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ValueError, match=r"pip install 'vllm-adaspark\[video\]'"):
        DecordVideoLoader.load_bytes(encode())


# -- bad files -------------------------------------------------------------------------------------


def image(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(3)).save(file, kind)
    return file.getvalue()


PAIRS = ["frames in pairs", "send a single frame as an image"]
BAD = {
    "empty": (lambda: b"", ["the video is empty: 0 bytes"]),
    "garbage": (lambda: b"no video at all " * 100, ["Could not open video stream"]),
    "cut before its index": (lambda: encode()[:2000], ["Could not open video stream"]),
    "zero frames": (lambda: encode(frames=0), ["the file has no video"]),
    "zero frames, fragmented": (
        lambda: encode(frames=0, container_options=FRAGMENTED),
        ["the video has no frames"],
    ),
    "sound": (sound, ["the file has no video, only audio"]),
    "one frame": (lambda: encode(frames=1), PAIRS),
    "PNG": (lambda: image("PNG"), PAIRS),
    "JPEG": (lambda: image("JPEG"), PAIRS),
    "WebP": (lambda: image("WEBP"), PAIRS),
    "still GIF": (lambda: image("GIF"), PAIRS),
    "damaged": (
        lambda: damage(encode(codec="mpeg4", frames=80), 0, 1),
        ["none of the video's 80 frames could be decoded", "the file is damaged"],
    ),
    # These name other files, or a port to listen at.
    "playlist": (
        lambda: f"ffconcat version 1.0\nfile '{ROOT / 'README.md'}'\n".encode(),
        ["Could not open video stream"],
    ),
    "session": (
        lambda: (
            b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
            b"m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
        ),
        ["Could not open video stream"],
    ),
}


@pytest.mark.parametrize("loader", ALL)
@pytest.mark.parametrize("name", BAD)
def test_bad_files_say_what_is_wrong(loader, name) -> None:
    make, words = BAD[name]
    data = make()
    with pytest.raises(ValueError) as caught:
        loader.load_bytes(data)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["garbage", "sound", "damaged", "zero frames, fragmented"])
def test_inspect_refuses_bad_files(name) -> None:
    make, words = BAD[name]
    with pytest.raises(UsageError, match=words[0]):
        probe(make(), "video.mp4")


def test_a_playlist_opens_nothing(tmp_path) -> None:
    (tmp_path / "secret.mp4").write_bytes(encode())
    for text in (
        f"ffconcat version 1.0\nfile '{tmp_path / 'secret.mp4'}'\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{tmp_path / 'secret.mp4'}\n"
        "#EXT-X-ENDLIST\n",
    ):
        with pytest.raises(ValueError, match="Could not open video stream"):
            VideoLoader.load_bytes(text.encode())
