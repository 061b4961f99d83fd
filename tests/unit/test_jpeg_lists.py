"""Lists of JPEGs, which vLLM decodes past the video loaders: video/connector.py."""

from __future__ import annotations

import asyncio
import base64
import io

import numpy as np
import pytest
from PIL import Image
from transformers.video_utils import VideoMetadata
from video_files import encode, number_of, picture
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from vllm_adaspark.video import load as load_module
from vllm_adaspark.video.connector import AdaSparkConnector, use_connector
from vllm_adaspark.video.load import LOADER


def jpegs(count: int, size: tuple[int, int] = (96, 64)) -> list[str]:
    made = []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(picture(number, *size)).save(file, "JPEG")
        made.append(base64.b64encode(file.getvalue()).decode())
    return made


def load(pictures: list[str], **options) -> tuple[list[int], VideoMetadata]:
    """(numbers that the pictures show, metadata), through the connector, both its ways."""
    kwargs = {"video": {"video_backend": LOADER, **options}}
    url = "data:video/jpeg;base64," + ",".join(pictures)
    connector = AdaSparkConnector(kwargs)
    frames, metadata = connector.fetch_video(url)
    again, _ = asyncio.run(connector.fetch_video_async(url))
    np.testing.assert_array_equal(frames, again)
    del metadata["do_sample_frames"]
    return [number_of(frame) for frame in frames], VideoMetadata(**metadata)


@pytest.mark.parametrize("count", [2, 3, 32, 33, 100])
def test_all_frames_are_used(count) -> None:
    numbers, metadata = load(jpegs(count))
    assert numbers == list(range(count))
    assert metadata.total_num_frames == count and metadata.sampled_fps == 1


def test_the_rate_is_that_of_the_video() -> None:
    _, metadata = load(jpegs(10), fps=4)
    assert metadata.sampled_fps == pytest.approx(4)


def test_max_frames_spreads_them_evenly() -> None:
    numbers, metadata = load(jpegs(40), max_frames=8, fps=2)
    assert numbers == metadata.frames_indices == list(range(0, 40, 5))
    assert 1 / metadata.sampled_fps == pytest.approx(2.5)


def test_frames_of_a_larger_video() -> None:
    numbers, metadata = load(jpegs(4), frames_indices=[0, 30, 60, 90], total_num_frames=120, fps=30)
    assert numbers == [0, 1, 2, 3] and metadata.frames_indices == [0, 30, 60, 90]
    assert metadata.sampled_fps == pytest.approx(1)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"fps": 0}, "video.fps=0"),
        ({"fps": "fast"}, "video.fps='fast'"),
        ({"max_frames": 1}, "video.max_frames=1"),
        ({"min_frames": 9, "max_frames": 8}, "video.min_frames=9"),
        ({"num_frames": 3}, "video.num_frames=3"),
        ({"max_frame": 8}, "video.max_frame=8: unknown"),
        ({"frames_indices": [0, 1]}, "expected 4 numbers"),
        ({"frames_indices": [3, 2, 1, 0]}, "ascending"),
        ({"frames_indices": [0, 1, 2, 3.5]}, "whole numbers"),
        ({"total_num_frames": 3}, "video.total_num_frames=3"),
        ({"duration": -1}, "video.duration=-1"),
        ({"duration": 10**400}, "video.duration=1000"),
        ({"total_num_frames": 10**400}, "video.total_num_frames=1000"),
        ({"fps": 10**400}, "video.fps=1000"),
        ({"video_backend": "nothing"}, "video.video_backend='nothing': unknown"),
    ],
)
def test_bad_options_name_themselves(options, words) -> None:
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        load(jpegs(4), **options)


@pytest.mark.parametrize(
    "pictures, words",
    [
        (jpegs(1), "send a single frame as an image"),
        ([*jpegs(1), *jpegs(1, (84, 84))], "frame 1 is 84x84 and the first is 96x64"),
        ([*jpegs(1), ""], "frame 1 is not a base64 picture"),
        ([*jpegs(1), "@@@@"], "frame 1 is not a base64 picture"),
    ],
)
def test_bad_lists_are_named(pictures, words) -> None:
    with pytest.raises(ValueError, match=words):
        load(pictures)


def test_a_list_of_many_large_pictures_is_refused_at_the_first(monkeypatch) -> None:
    monkeypatch.setattr(load_module, "MAX_GIB", 4 * 96 * 64 * 3 / 2**30)
    assert len(load(jpegs(4))[0]) == 4
    with pytest.raises(ValueError, match="5 frames of 96x64 take"):
        load([*jpegs(1), "@@@@", *jpegs(3)])


def test_other_data_urls_are_files() -> None:
    url = "data:video/mp4;base64," + base64.b64encode(encode()).decode()
    frames, metadata = AdaSparkConnector({"video": {"video_backend": LOADER}}).fetch_video(url)
    assert len(frames) == 8 and metadata["video_backend"] == "pyav"


def test_other_loaders_are_vllms() -> None:
    """A stock model in the same process is served as ever."""
    url = "data:video/jpeg;base64," + ",".join(jpegs(40))
    for options in ({}, {"num_frames": -1}):
        kwargs = {"video": {"video_backend": "opencv", **options}}
        ours, stock = (
            kind(kwargs).fetch_video(url) for kind in (AdaSparkConnector, MediaConnector)
        )
        np.testing.assert_array_equal(ours[0], stock[0])
        assert ours[1] == stock[1]


def test_it_takes_the_place_of_vllms(monkeypatch) -> None:
    monkeypatch.setattr(
        MEDIA_CONNECTOR_REGISTRY, "name2class", dict(MEDIA_CONNECTOR_REGISTRY.name2class)
    )
    use_connector()
    assert isinstance(MEDIA_CONNECTOR_REGISTRY.load("http"), AdaSparkConnector)
