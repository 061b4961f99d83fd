"""What a video costs: the server's own rules for frames and sizes, and sums done by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import video as demo_video  # examples/demo

from vllm_adaspark.accounts.cost import PRESETS, cost, read_model
from vllm_adaspark.cli.media import probe
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.models.layout import LayoutError, Sampling, Video
from vllm_adaspark.models.qwen2_5_vl_layout import QwenFrames
from vllm_adaspark.video.prune import COLUMNS

CONFIG = AdaSparkConfig()
HD = Video(frames=108_000, fps=30.0, width=1280, height=720)  # an hour
CLIPS = {  # seconds, frames per second, width, height
    "square": (10, 8, 224, 224),
    "wide": (7.3, 12.5, 320, 120),
    "tall": (3.1, 29.97, 96, 260),
    "tiny": (1, 5, 32, 32),
    "long": (90, 2, 168, 140),
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    paths = {}
    for name, (seconds, fps, width, height) in CLIPS.items():
        path = folder / f"{name}.mp4"
        paths[name] = demo_video.write_mp4(
            path, seconds=seconds, fps=fps, width=width, height=height
        )
    return paths


@pytest.mark.parametrize("fps", [0.1, 1, 2, 2.5, 24, 30])
@pytest.mark.parametrize("limit", [2, 6, 768, 2000])
def test_samples_as_many_frames_as_the_loader(fps, limit):
    """vLLM's, with a higher limit than its own."""
    from vllm.multimodal.video import Qwen2VLVideoBackend
    from vllm.multimodal.video_decoders import VideoSourceMetadata, VideoTargetMetadata

    class Unlimited(Qwen2VLVideoBackend):
        _MAX_FRAMES = 1 << 20

    sampling = Sampling(fps=fps, max_frames=limit)
    rng = np.random.default_rng(0)
    for frames in [2, 3, 5, 451, *rng.integers(2, 20_000, 60).tolist()]:
        for source_fps in (30.0, 23.976, 8.0):
            taken = Unlimited.compute_frames_index_to_sample(
                VideoSourceMetadata(frames, source_fps, frames / source_fps),
                VideoTargetMetadata(-1, fps, 300),
                max_frames=limit,
                min_frames=min(4, limit),
            )
            mine = QwenFrames().sampled(Video(frames, source_fps, 100, 100), sampling)
            assert mine == len(taken), (frames, source_fps)


def test_a_single_frame_is_no_video():
    with pytest.raises(LayoutError, match="pairs"):
        QwenFrames().sampled(Video(1, 8.0, 100, 100), Sampling())


@pytest.mark.parametrize(
    "rules",
    [
        QwenFrames(),
        QwenFrames(max_pixels=256 * 28 * 28),
        QwenFrames(min_pixels=128 * 28 * 28, max_pixels=768 * 28 * 28),
        QwenFrames(cap_pixels_per_frame=True, max_video_tokens=900),
    ],
    ids=["qwen", "small", "class defaults", "capped"],
)
@pytest.mark.parametrize("name", CLIPS)
def test_counts_the_tokens_the_real_processor_makes(clips, name, rules):
    from transformers import Qwen2VLVideoProcessor

    from vllm_adaspark.video.load import VideoLoader

    data = clips[name].read_bytes()
    frames, _ = VideoLoader.load_bytes(data, fps=2)
    processor = Qwen2VLVideoProcessor(
        size={"shortest_edge": rules.min_pixels, "longest_edge": rules.max_pixels},
        cap_pixels_per_frame=rules.cap_pixels_per_frame,
        max_video_tokens=rules.max_video_tokens,
    )
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    grid = processor(videos=[tensor], return_tensors="pt")["video_grid_thw"][0].tolist()

    video = probe(data, name)
    told = cost(replace(PRESETS["7b"], rules=rules), video, CONFIG, Sampling())
    assert told.frames == len(frames)
    assert list(told.grid) == [grid[0], grid[1] // 2, grid[2] // 2]
    assert told.video_tokens == math.prod(grid) // 4


@pytest.mark.parametrize("name", CLIPS)
def test_probes_what_vllm_reads(clips, name):
    from vllm.multimodal.video_decoders.opencv import OpenCVVideoBackendMixin as Reader

    data = clips[name].read_bytes()
    theirs = Reader.get_video_metadata(Reader.open_video_capture(data))
    mine = probe(data, name)
    assert (mine.frames, mine.fps) == (theirs.total_frames_num, theirs.original_fps)
    assert (mine.width, mine.height) == CLIPS[name][2:]


def test_max_pixels_bounds_a_frame():
    high, wide = QwenFrames().resized(HD, 100, Sampling(max_pixels=100_000))
    assert high * wide <= 100_000
    assert QwenFrames().resized(HD, 100, Sampling()) == (728, 1288)
    with pytest.raises(LayoutError, match="200:1"):
        QwenFrames().resized(Video(10, 1.0, 4000, 10), 10, Sampling())


def test_memory_of_a_known_case():
    """7B, 16 bit: 28 layers x 2 x 4 heads x 128 x 2 bytes = 56 KiB a token."""
    video = Video(frames=120, fps=2.0, width=280, height=280)  # 60 x 10 x 10 tokens
    told = cost(PRESETS["7b"], video, CONFIG, Sampling(), text_tokens=100, answer_tokens=300)
    assert told.grid == (60, 10, 10) and told.cubes == 93
    assert told.kv_bytes == 6400 * 56 * 1024
    assert told.key_sum_bytes == 100 * 4 * 128 * 4 * 28
    assert told.encoder_cache_bytes == 6000 * 3584 * 2
    assert told.max_model_len == 7168 and told.max_num_batched_tokens == 6144
    fp8 = cost(
        PRESETS["7b"], video, CONFIG, Sampling(), text_tokens=100, answer_tokens=300,
        kv_element_bytes=1,
    )  # fmt: skip
    assert fp8.kv_bytes * 2 == told.kv_bytes


def test_dense_flops_of_a_known_case():
    """Counted without the help of accounts/account.py."""
    video = Video(frames=120, fps=2.0, width=280, height=280)
    told = cost(PRESETS["7b"], video, CONFIG, Sampling(), text_tokens=100)
    tokens, hidden, kv = 6100, 3584, 512
    weights = hidden * (hidden + 2 * kv) + hidden * hidden + 3 * hidden * 18944
    pairs = sum(range(1, tokens + 1))
    assert told.dense_flops == pytest.approx(28 * (2 * tokens * weights + 4 * pairs * hidden))


@pytest.mark.parametrize("size", ["3b", "7b", "32b", "72b"])
def test_presets_have_the_published_weights(size):
    """Parameters of the shape, with embeddings and a vision tower of 0.67 billion."""
    model = PRESETS[size]
    shape = model.shape
    layer = (shape.qkvo_flops_per_token + shape.ffn_flops_per_token) / 2
    embeddings = (1 if size == "3b" else 2) * 151_936 * shape.hidden  # 3B ties them
    billions = (model.layers * layer + embeddings + 0.67e9) / 1e9
    assert model.weights / 2e9 == pytest.approx(billions, rel=0.02)


def test_sparsity_costs_less_and_off_costs_the_same():
    video = Video(frames=600, fps=2.0, width=280, height=280)

    def ratio(**settings):
        return cost(PRESETS["7b"], video, CONFIG.override(settings), Sampling()).flops_ratio

    assert ratio(off=True) == 1
    assert ratio(p_attn=1.0, p_ffn=1.0) == 1
    assert ratio(p_attn=0.3, p_ffn=0.3) < ratio(p_attn=0.5, p_ffn=0.5) < ratio(p_attn=0.9) < 1
    assert ratio(p_attn=0.5, p_ffn=0.5, dense_layers=4) > ratio(p_attn=0.5, p_ffn=0.5)
    assert ratio(flops=0.4) == pytest.approx(0.4, abs=0.005)
    impossible = cost(PRESETS["7b"], video, CONFIG.override({"flops": 0.01}), Sampling())
    assert impossible.least_budget > 0.01 and impossible.flops_ratio > 0.01


def test_a_pruned_video_costs_what_is_left_of_it():
    video = Video(frames=120, fps=2.0, width=280, height=280)  # 60 x 10 x 10 tokens

    def told(**settings):
        return cost(PRESETS["7b"], video, CONFIG.override(settings), Sampling(), text_tokens=100)

    whole, pruned, both = told(), told(prune=0.75, p_attn=1.0, p_ffn=1.0), told(prune=0.75)
    assert (pruned.video_tokens, pruned.dropped_tokens) == (6000, 4500)
    assert (pruned.prompt_tokens, pruned.cubes) == (1600, 1500 // 64)
    assert whole.dropped_tokens == told(prune=0.75, off=True).dropped_tokens == 0
    assert pruned.dense_flops == whole.dense_flops
    alone = cost(
        PRESETS["7b"], Video(30, 2.0, 280, 280), CONFIG, Sampling(), text_tokens=100
    )  # 15 x 10 x 10 tokens
    assert pruned.flops == pytest.approx(alone.dense_flops)
    assert both.flops_ratio < pruned.flops_ratio < whole.flops_ratio
    assert pruned.encoder_cache_bytes == 1500 * (3584 + COLUMNS) * 2
    assert pruned.max_num_batched_tokens == 2048 and pruned.kv_bytes < whole.kv_bytes / 2
    assert told(prune=0.5, flops=0.3).flops_ratio == pytest.approx(0.3, abs=0.005)
    assert told(prune=0.5).least_budget < told().least_budget


def test_an_hour_of_hd_does_not_fit_and_what_would_does():
    told = cost(PRESETS["7b"], HD, CONFIG, Sampling())
    assert not told.fits

    def fits(**sampling):
        return cost(PRESETS["7b"], HD, CONFIG, Sampling(**sampling)).fits

    assert fits(max_frames=told.fitting_frames)
    assert not fits(max_frames=told.fitting_frames + 2)
    assert fits(max_pixels=told.fitting_pixels)


def test_the_largest_video_that_fits_gets_a_length_that_holds_it():
    told = cost(PRESETS["7b"], HD, CONFIG, Sampling(max_frames=212), answer_tokens=1024)
    assert told.fits
    assert told.prompt_tokens + 1024 <= told.max_model_len <= PRESETS["7b"].max_positions


def _files(tmp_path, **contents):
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return lambda name: tmp_path / name if (tmp_path / name).exists() else None


KIND = {"model_type": "qwen2_5_vl"}
TEXT = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "max_position_embeddings": 4096,
}


def test_reads_a_checkpoint_in_either_layout(tmp_path):
    """Qwen's files (flat, pixels in the image processor's) and Hugging Face's newer nested ones."""
    vision = {"patch_size": 14, "spatial_merge_size": 2}
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    find = _files(
        old,
        config={**KIND, **TEXT, "vision_config": vision},
        preprocessor_config={"min_pixels": 3136, "max_pixels": 12845056},
    )
    flat = read_model("m", find)
    size = {"shortest_edge": 3136, "longest_edge": 12845056}
    find = _files(
        new,
        config={**KIND, "text_config": TEXT, "vision_config": vision},
        processor_config={"video_processor": {"size": size, "cap_pixels_per_frame": True}},
        preprocessor_config={"min_pixels": 1, "max_pixels": 2},
    )
    nested = read_model("m", find)
    assert flat.rules == QwenFrames()
    assert nested.rules == QwenFrames(cap_pixels_per_frame=True)
    assert flat.shape == nested.shape and flat.layers == nested.layers == 4
    assert flat.max_positions == nested.max_positions == 4096


def test_says_what_a_checkpoint_lacks(tmp_path):
    with pytest.raises(LayoutError, match=r"no config\.json"):
        read_model("m", _files(tmp_path))
    with pytest.raises(LayoutError, match="'clip': not a model of ours; supported: qwen2_5_vl"):
        read_model("m", _files(tmp_path, config={"model_type": "clip"}))
    with pytest.raises(LayoutError, match="num_attention_heads"):
        read_model("m", _files(tmp_path, config={**KIND, "hidden_size": 1}))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LayoutError, match="cannot be read"):
        read_model("m", lambda name: tmp_path / name)
