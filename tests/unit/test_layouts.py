"""What models tell of themselves: where their videos lie, how frames are taken, what is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_adaspark import ARCHITECTURES
from vllm_adaspark.accounts.cost import PRESETS, cost
from vllm_adaspark.cli import UsageError
from vllm_adaspark.cli.checkpoints import architecture_of
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.models.layout import LAYOUTS, LayoutError, Sampling, Video, layout_class
from vllm_adaspark.models.llava_onevision_layout import LlavaFrames, LlavaOnevisionLayout
from vllm_adaspark.requests import Prompt
from vllm_adaspark.video.order import block_spread, cube_order

CUBE, RASTER = AdaSparkConfig(), AdaSparkConfig().override({"order": "raster"})


def onevision(text: str = "qwen2") -> LlavaOnevisionLayout:
    """The published model's layout: 384 pixels, 27 x 27 patches, 14 x 14 tokens."""
    vision = SimpleNamespace(image_size=384, patch_size=14)
    text_config = SimpleNamespace(model_type=text)
    config = SimpleNamespace(vision_config=vision, get_text_config=lambda: text_config)
    return LlavaOnevisionLayout(config)


def video_at(offset: int, frames: int) -> SimpleNamespace:
    place = SimpleNamespace(offset=offset, length=frames * 196 + 1, is_embed=None)
    return SimpleNamespace(mm_position=place)


def test_every_model_has_an_architecture_and_a_layout() -> None:
    assert LAYOUTS.keys() == ARCHITECTURES.keys()
    for model_type, architecture in ARCHITECTURES.items():
        layout = layout_class(model_type)
        assert (layout.model_type, layout.architecture) == (model_type, architecture)
    with pytest.raises(LayoutError, match="'clip': not a model of ours"):
        layout_class("clip")


def test_the_newline_after_a_video_is_no_video() -> None:
    videos = [video_at(3, 2), video_at(3 + 393 + 1, 1)]
    places = {"video": [video.mm_position for video in videos], "image": [videos[0].mm_position]}
    prompt = Prompt(700, places, onevision().after_video)
    mask = prompt.of(("video",))
    expected = np.zeros(700, bool)
    expected[3 : 3 + 392] = expected[397 : 397 + 196] = True
    assert (mask == expected).all()
    assert prompt.of(("image",)).sum() == 393, "an image has no newline of this kind"
    assert [onevision().grid(video) for video in videos] == [(2, 14, 14), (1, 14, 14)]


def test_tokens_in_cube_order_keep_their_positions() -> None:
    layout, videos = onevision(), [video_at(3, 5), video_at(1000, 1)]
    positions = layout.positions(1300, videos, CUBE)
    assert sorted(positions) == list(range(1300))
    for start, frames in ((3, 5), (1000, 1)):
        token_order = cube_order((frames, 14, 14), (4, 4, 4))
        assert (positions[start : start + len(token_order)] == start + token_order).all()
        assert positions[start + len(token_order)] == start + len(token_order), "the newline"
    assert layout.positions(1300, videos, RASTER) is None


@pytest.mark.parametrize("cube, worst", [((4, 4, 4), 4.6), ((2, 4, 4), 3.35), ((8, 4, 4), 9.1)])
def test_cubes_are_compact_on_its_grid(cube, worst) -> None:
    """14 is no multiple of 4; raster order has 20 to 31."""
    for frames in (4, 31, 32, 33, 100):
        for phase in (0, 7, 21):
            block = cube[0] * cube[1] * cube[2]
            assert block_spread((frames, 14, 14), cube, block, phase=phase) < worst


def test_takes_the_frames_that_stock_vllm_takes() -> None:
    from vllm.multimodal.video import VideoBackend
    from vllm.multimodal.video_decoders import VideoSourceMetadata, VideoTargetMetadata

    from vllm_adaspark.video.sampling import Evenly

    rng = np.random.default_rng(0)
    for total in [1, 2, 31, 32, 33, *rng.integers(1, 5000, 40).tolist()]:
        for number, fps in ((32, None), (1, None), (7, 0.5), (100, 2.0)):
            seconds = total / 25
            theirs = VideoBackend.compute_frames_index_to_sample(
                VideoSourceMetadata(total, 25.0, seconds),
                VideoTargetMetadata(number, -1 if fps is None else fps, 300),
            )
            times = np.arange(total) / 25
            contents = SimpleNamespace(frames=total, seconds=seconds, times=times, constant=True)
            assert Evenly(number, fps).sample(contents).numbers == theirs
            video = Video(total, 25.0, 100, 100)
            told = LlavaFrames().sampled(video, Sampling(fps=fps, max_frames=number))
            assert told == len(theirs)


def test_frames_of_a_varying_rate_are_taken_at_even_times() -> None:
    from vllm_adaspark.video.sampling import Evenly

    times = np.array([0, 20, 20.5, 21, 21.5, 40])
    contents = SimpleNamespace(frames=6, seconds=48.0, times=times, constant=False)
    assert Evenly(5).sample(contents).numbers == [0, 0, 1, 4, 5]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_frames": 0}, "num_frames=0: expected a whole number from 1 to 32768"),
        ({"num_frames": -1}, "num_frames=-1: expected"),
        ({"num_frames": True}, "num_frames=True: expected"),
        ({"fps": 0}, "fps=0: expected frames per second"),
        ({"max_frames": 8}, "max_frames=8: unknown; allowed: num_frames, fps, video_backend"),
    ],
)
def test_refuses_options_of_its_loader(options, words) -> None:
    from vllm_adaspark.video.load import UniformVideoLoader

    with pytest.raises(ValueError, match=f"media_io_kwargs.video.{words}"):
        UniformVideoLoader.options(options)


def test_what_a_video_costs() -> None:
    model = PRESETS["onevision-7b"]
    told = cost(model, Video(9000, 25.0, 1920, 1080), CUBE, Sampling(), text_tokens=60)
    assert (told.frames, told.resized, told.grid) == (32, (384, 384), (32, 14, 14))
    assert told.video_tokens == 6272 and told.prompt_tokens == 6272 + 1 + 60
    assert told.fits and told.host_bytes == 32 * 3 * (1920 * 1080 + 4 * 384 * 384)
    long = cost(model, Video(9000, 25.0, 1920, 1080), CUBE, Sampling(max_frames=300))
    assert not long.fits and long.fitting_pixels is None
    assert cost(
        model, Video(9000, 25.0, 1920, 1080), CUBE, Sampling(max_frames=long.fitting_frames)
    ).fits
    assert model.rules.flags(Sampling()) == []
    assert model.rules.flags(Sampling(fps=1.0, max_frames=64)) == [
        '--media-io-kwargs \'{"video": {"num_frames": 64, "fps": 1.0}}\''
    ]


def test_refuses_what_it_cannot_serve() -> None:
    assert onevision().refused({}) is None
    assert "text_config.model_type 'llama'" in onevision("llama").refused({})
    assert 'size": {"height": 1}' in onevision().refused({"size": {"height": 1}})


@pytest.mark.parametrize(
    "name, config, model_type",
    [
        ("any/name", {"model_type": "llava_onevision"}, "llava_onevision"),
        ("any/name", {"model_type": "qwen2_5_vl"}, "qwen2_5_vl"),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", {}, "llava_onevision"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", {}, "qwen2_5_vl"),
        ("my/own", {}, "qwen2_5_vl"),
    ],
)
def test_the_architecture_follows_from_the_checkpoint(name, config, model_type) -> None:
    assert architecture_of(name, config) == ARCHITECTURES[model_type]


def test_a_checkpoint_of_another_model_is_refused() -> None:
    with pytest.raises(UsageError, match="model_type 'clip'; supported: qwen2_5_vl, llava"):
        architecture_of("m", {"model_type": "clip"})


def test_presets_are_the_published_shapes() -> None:
    """Parameters of the shape, with embeddings and a vision tower of 0.4 billion."""
    for name in ("onevision-0.5b", "onevision-7b"):
        model = PRESETS[name]
        shape = replace(model.shape)
        layer = (shape.qkvo_flops_per_token + shape.ffn_flops_per_token) / 2
        embeddings = (1 if name.endswith("0.5b") else 2) * 151_936 * shape.hidden
        billions = (model.layers * layer + embeddings + 0.4e9) / 1e9
        assert model.weights / 2e9 == pytest.approx(billions, rel=0.03)
