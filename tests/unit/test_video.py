"""The video loaders: both choose the same frames, options are checked, bad files are named."""

from __future__ import annotations

import struct
import sys
from fractions import Fraction
from io import BytesIO

import numpy as np
import pytest
import video as demo_video  # examples/demo
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, Qwen2VLVideoBackend

from vllm_adaspark.video import DECORD_LOADER, LOADER, QWEN_FRAMES, DecordVideoLoader, VideoLoader

WIDTH, HEIGHT = 96, 64
ROTATIONS = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}


@pytest.fixture
def decord():
    return pytest.importorskip("decord")


def mp4(tmp_path, seconds: float, fps: float, **size) -> bytes:
    size = {"width": WIDTH, "height": HEIGHT} | size
    path = tmp_path / "video.mp4"
    return demo_video.write_mp4(path, seconds=seconds, fps=fps, **size).read_bytes()


def rotated(data: bytes, degrees: int) -> bytes:
    """The mp4 with another display matrix in its track header (ISO 14496-12, 8.3.2)."""
    header = data.index(b"tkhd")
    matrix = header + 4 + 4 + (20 if data[header + 4] == 0 else 32) + 16
    a, b, c, d = (65536 * n for n in ROTATIONS[degrees])
    return data[:matrix] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[matrix + 36 :]


def h264(durations_ms: list[int], *, b_frames: int = 0, first_shown: int = 0) -> bytes:
    """An H.264 mp4 whose frames last so long; an edit list hides those before ``first_shown``.

    Keyframes are ten frames apart, so a cut between two needs frames that are not shown.
    """
    av = pytest.importorskip("av")
    file, ms = BytesIO(), Fraction(1, 1000)
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        coder = stream.codec_context
        coder.time_base, coder.max_b_frames, coder.gop_size = ms, b_frames, 10
        made = demo_video.frames(
            seconds=len(durations_ms) / 25, fps=25, width=WIDTH, height=HEIGHT, seed=2
        )
        start = -sum(durations_ms[:first_shown])
        packets = []
        at = 0
        for bgr, duration in zip(made, durations_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(bgr), format="bgr24")
            frame.pts, frame.time_base = at, ms
            at += duration
            packets += stream.encode(frame)
        for packet in [*packets, *stream.encode()]:
            shift = int(start * ms / packet.time_base)
            packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
            container.mux(packet)
    return file.getvalue()


def both(data: bytes, **options):
    """What the two loaders make of it."""
    return VideoLoader.load_bytes(data, **options), DecordVideoLoader.load_bytes(data, **options)


def assert_same(data: bytes, **options) -> list[int]:
    (frames, metadata), (decord_frames, decord_metadata) = both(data, **options)
    assert metadata.pop("video_backend") == "opencv"
    assert decord_metadata.pop("video_backend") == "decord"
    assert decord_metadata == metadata
    assert decord_frames.shape == frames.shape and decord_frames.dtype == np.uint8
    # Another build of the same decoder may round a colour differently; another frame differs more.
    assert np.abs(decord_frames.astype(int) - frames).mean() < 1.0
    return metadata["frames_indices"]


# -- the same frames ----------------------------------------------------------------------------


def test_names_are_registered() -> None:
    assert isinstance(VIDEO_LOADER_REGISTRY.load(LOADER), VideoLoader)
    assert isinstance(VIDEO_LOADER_REGISTRY.load(DECORD_LOADER), DecordVideoLoader)


@pytest.mark.usefixtures("decord")
@pytest.mark.parametrize("fps", [1, 8, 12.5, 23.976, 25, 29.97, 60])
@pytest.mark.parametrize("seconds", [2, 5.3])
def test_same_frames_at_any_rate_and_length(tmp_path, fps, seconds) -> None:
    data = mp4(tmp_path, seconds, fps)
    indices = assert_same(data)
    assert indices == sorted(set(indices)) and len(indices) >= 2
    assert len(assert_same(data, fps=1, max_frames=4)) <= 5
    assert_same(data, fps=30, max_frames=6)


@pytest.mark.usefixtures("decord")
@pytest.mark.parametrize("degrees", ROTATIONS)
def test_same_frames_of_a_phone_held_otherwise(tmp_path, degrees) -> None:
    data = mp4(tmp_path, 3, 8)
    assert_same(rotated(data, degrees))
    frames, _ = DecordVideoLoader.load_bytes(rotated(data, degrees))
    upright, _ = DecordVideoLoader.load_bytes(data)
    turned = np.rot90(upright, -degrees // 90, axes=(1, 2))
    assert np.abs(frames.astype(int) - turned).mean() < 1.0, "the picture is turned the right way"


@pytest.mark.usefixtures("decord")
@pytest.mark.parametrize("b_frames", [0, 3])
def test_same_frames_of_h264(b_frames) -> None:
    assert_same(h264([40] * 77, b_frames=b_frames))


@pytest.mark.usefixtures("decord")
def test_same_frames_where_their_rate_varies() -> None:
    assert_same(h264([110, 20, 20] * 20))


@pytest.mark.usefixtures("decord")
def test_same_frames_where_an_edit_list_hides_some() -> None:
    """decord counts the hidden ones, so its numbers would name other frames."""
    import decord

    data = h264([40] * 60, first_shown=25)
    (frames, metadata), (decord_frames, decord_metadata) = both(data)
    assert len(decord.VideoReader(BytesIO(data))) > metadata["total_num_frames"], "a lead-in"
    assert decord_metadata["frames_indices"] == metadata["frames_indices"]
    np.testing.assert_array_equal(decord_frames, frames)


# -- which frames -------------------------------------------------------------------------------


@pytest.mark.parametrize("fps, seconds", [(8, 10), (29.97, 7), (2, 3)])
def test_frames_are_vllms_unless_asked_otherwise(tmp_path, fps, seconds) -> None:
    data = mp4(tmp_path, seconds, fps)
    frames, metadata = VideoLoader.load_bytes(data)
    stock_frames, stock_metadata = Qwen2VLVideoBackend.load_bytes(data)
    assert metadata == stock_metadata
    np.testing.assert_array_equal(frames, stock_frames)


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


# -- bad options --------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [VideoLoader, DecordVideoLoader])
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
    ],
)
def test_bad_options_name_themselves(tmp_path, loader, options, words) -> None:
    if loader is DecordVideoLoader:
        pytest.importorskip("decord")
    with pytest.raises(ValueError) as caught:
        loader.load_bytes(mp4(tmp_path, 3, 8), **options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"backend": "torchcodec"}, ["backend='torchcodec'", "adaspark_decord", "'adaspark'"]),
        ({"frame_recovery": True}, ["frame_recovery=true", "'adaspark'"]),
        ({"seek_mode": "exact"}, ["seek_mode"]),
    ],
)
def test_decord_refuses_options_of_other_decoders(tmp_path, options, words) -> None:
    with pytest.raises(ValueError) as caught:
        DecordVideoLoader.load_bytes(mp4(tmp_path, 3, 8), **options)
    for word in words:
        assert word in str(caught.value)


def test_without_decord_the_error_says_how_to_get_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ValueError, match=r"pip install 'vllm-adaspark\[video\]'"):
        DecordVideoLoader.load_bytes(mp4(tmp_path, 3, 8))


# -- bad files ----------------------------------------------------------------------------------


def damage(data: bytes, start: float, end: float) -> bytes:
    """The mp4 with this part of its coded frames blanked."""
    first, last = data.index(b"mdat") + 4, data.index(b"moov") - 4
    low, high = (first + int((last - first) * share) for share in (start, end))
    return data[:low] + bytes(high - low) + data[high:]


@pytest.mark.parametrize("loader", [VideoLoader, DecordVideoLoader])
@pytest.mark.parametrize(
    "name, words",
    [
        ("empty", ["the video is empty: 0 bytes"]),
        ("garbage", ["Could not open video stream"]),
        ("cut", ["Could not open video stream"]),
        ("one frame", ["frames in pairs", "send a single frame as an image"]),
        ("damaged", ["none of the video's 80 frames could be decoded", "the file is damaged"]),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, loader, name, words) -> None:
    if loader is DecordVideoLoader:
        pytest.importorskip("decord")
    good = mp4(tmp_path, 10, 8)
    data = {
        "empty": b"",
        "garbage": b"no video at all " * 100,
        "cut": good[: len(good) // 2],
        "one frame": mp4(tmp_path, 0.125, 8),
        "damaged": damage(good, 0, 1),
    }[name]
    with pytest.raises(ValueError) as caught:
        loader.load_bytes(data)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.usefixtures("decord")
@pytest.mark.parametrize("start, end", [(0.5, 1), (0.3, 0.4)])
def test_what_is_left_of_a_damaged_file_is_the_same(tmp_path, start, end) -> None:
    data = damage(mp4(tmp_path, 10, 8), start, end)
    (frames, metadata), (decord_frames, decord_metadata) = both(data)
    assert decord_metadata["frames_indices"] == metadata["frames_indices"]
    np.testing.assert_array_equal(decord_frames, frames)
