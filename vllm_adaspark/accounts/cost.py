"""What a video would cost: frames, tokens, cubes, FLOPs, memory, and the flags it needs.

Frames are sampled by the server's code (video.sampling) and resized by the rules of Hugging Face's
Qwen2VLVideoProcessor, restated here so that no model, no vLLM and no GPU is needed to ask.  The
dense FLOPs are counted; what AdaSpark spends of them depends on the video, so it is an estimate
that takes a density of p: attention keeps ``p_attn`` of the preceding cubes, the FFN ``p_ffn`` of
the tokens.  Where attention is concentrated, fewer cubes hold that mass.  A FLOPs budget is met as
methods/adaspark/budget.py meets it.

Not counted: the vision tower's FLOPs and activations, CUDA graphs, the answer's tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..kernels import score_products
from ..methods.adaspark.budget import prompt_cost
from ..methods.adaspark.settings import AdaSparkConfig
from ..methods.videonsa.plan import prompt_flops as videonsa_flops
from ..methods.videonsa.settings import VideoNSASettings
from ..settings import Settings
from ..video.sampling import (
    FPS,
    MIN_FRAMES,
    PAIR,
    QWEN_FRAMES,
    Options,
    at_constant_rate,
    number_of_frames,
)
from .account import ModelShape

TEXT_BEFORE = 15  # tokens of Qwen's chat template before the video
KEY_SUM_BYTES = 4  # float32
ROUND = 1024  # lengths are proposed in multiples of this


class CostError(ValueError):
    """A model or video whose cost cannot be told; says what is wrong and what to do."""


@dataclass(frozen=True)
class FrameRules:
    """How a checkpoint's processor resizes and cuts frames; defaults are Qwen2.5-VL's files."""

    patch: int = 14  # pixels
    merge: int = 2  # patches along a merged token's side
    min_pixels: int = 4 * 28 * 28  # of a resized frame
    max_pixels: int = 16384 * 28 * 28
    cap_pixels_per_frame: bool = False  # bound the whole video too, as qwen-vl-utils does
    max_video_tokens: int = 128_000  # only for that bound

    @property
    def side(self) -> int:
        """Pixels along a merged token's side."""
        return self.patch * self.merge


@dataclass(frozen=True)
class Model:
    """What must be known of a model."""

    name: str
    shape: ModelShape
    layers: int
    max_positions: int = 128_000
    rules: FrameRules = field(default_factory=FrameRules)
    weights: int | None = None  # bytes, None where unknown
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)  # config.json


def _published(name: str, layers: int, billions: float, **shape: int) -> Model:
    return Model(
        name=f"Qwen/Qwen2.5-VL-{name.upper()}-Instruct",
        shape=ModelShape(head_size=128, **shape),
        layers=layers,
        weights=round(billions * 2e9),  # bfloat16
    )


# As in the checkpoints' config.json.
PRESETS = {
    "3b": _published("3b", 36, 3.75, hidden=2048, heads=16, kv_heads=2, intermediate=11008),
    "7b": _published("7b", 28, 8.29, hidden=3584, heads=28, kv_heads=4, intermediate=18944),
    "32b": _published("32b", 64, 33.5, hidden=5120, heads=40, kv_heads=8, intermediate=27648),
    "72b": _published("72b", 80, 73.4, hidden=8192, heads=64, kv_heads=8, intermediate=29568),
}


def read_model(name: str, find: Callable[[str], Path | None]) -> Model:
    """A model from its checkpoint's files.

    Args:
        name: what to call it.
        find: gives the path of a file of the checkpoint by its name, None if it has none.

    Raises:
        CostError: no config.json, or not that of a Qwen2.5-VL.
    """
    config = _read_json(find("config.json"))
    if config is None:
        raise CostError(f"model {name}: no config.json; give a Qwen2.5-VL checkpoint")
    text = config | config.get("text_config", {})  # older checkpoints have no text_config
    try:
        heads, hidden = text["num_attention_heads"], text["hidden_size"]
        shape = ModelShape(
            hidden=hidden,
            heads=heads,
            kv_heads=text["num_key_value_heads"],
            head_size=hidden // heads,
            intermediate=text["intermediate_size"],
        )
        layers, vision = text["num_hidden_layers"], config["vision_config"]
    except KeyError as missing:
        raise CostError(
            f"model {name}: config.json has no {missing}; give a Qwen2.5-VL checkpoint"
        ) from None
    return Model(
        name=name,
        shape=shape,
        layers=layers,
        max_positions=text.get("max_position_embeddings", Model.max_positions),
        rules=_rules(vision, find),
        weights=_weights(find),
        config=config,
    )


def _rules(vision: dict[str, Any], find: Callable[[str], Path | None]) -> FrameRules:
    """From the processor's file, in Hugging Face's order of preference."""
    nested = (_read_json(find("processor_config.json")) or {}).get("video_processor")
    files = ("video_preprocessor_config.json", "preprocessor_config.json")
    found = nested or next(filter(None, (_read_json(find(name)) for name in files)), {})
    size = found.get("size") or {}
    # What a file leaves out is the default of Hugging Face's class, not of Qwen's files.
    return FrameRules(
        patch=vision.get("patch_size", 14),
        merge=vision.get("spatial_merge_size", 2),
        min_pixels=found.get("min_pixels") or size.get("shortest_edge") or 128 * 28 * 28,
        max_pixels=found.get("max_pixels") or size.get("longest_edge") or 768 * 28 * 28,
        cap_pixels_per_frame=bool(found.get("cap_pixels_per_frame")),
        max_video_tokens=found.get("max_video_tokens", FrameRules.max_video_tokens),
    )


def _weights(find: Callable[[str], Path | None]) -> int | None:
    """Bytes of the weights, where the files that say so are at hand."""
    index = _read_json(find("model.safetensors.index.json"))
    if index is not None:
        return index.get("metadata", {}).get("total_size")
    single = find("model.safetensors")
    return single.stat().st_size if single is not None else None


def _read_json(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CostError(f"{path} cannot be read: {error}") from None


@dataclass(frozen=True)
class Video:
    """A video before anything is done to it."""

    frames: int
    fps: float
    width: int
    height: int
    # Where its rate varies, frames it would have if all came as fast as its fastest part.
    most_frames: int | None = None
    remarks: tuple[str, ...] = ()  # what its owner should be told of the file

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


@dataclass(frozen=True)
class Sampling:
    """Which frames are taken and how large they may be."""

    fps: float = FPS
    max_frames: int = QWEN_FRAMES
    min_frames: int = MIN_FRAMES
    max_pixels: int | None = None  # of a frame, after resizing


def sampled_frames(video: Video, sampling: Sampling) -> int:
    """Frames the server's loader takes.

    Raises:
        CostError: no pair of frames can be taken.
    """
    options = Options(sampling.fps, sampling.max_frames, sampling.min_frames)
    number = number_of_frames(video.frames, video.fps, video.most_frames, options)
    if number < PAIR:
        raise CostError(
            f"the video has {video.frames} frame(s), and Qwen2.5-VL takes them in pairs; "
            "send a single frame as an image"
        )
    return number if video.most_frames else len(at_constant_rate(video.frames, number))


def resized(video: Video, frames: int, rules: FrameRules, sampling: Sampling) -> tuple[int, int]:
    """(height, width) of a frame after Hugging Face's ``smart_resize``.

    Raises:
        CostError: too narrow a frame.
    """
    height, width, side = video.height, video.width, rules.side
    if max(height, width) > 200 * min(height, width):
        raise CostError(f"frames of {width}x{height} are too narrow: at most 200:1 can be used")
    most = sampling.max_pixels or rules.max_pixels
    if rules.cap_pixels_per_frame:
        total = int(rules.max_video_tokens * side**2 * 0.9)
        most = max(min(most, total * PAIR // frames), int(rules.min_pixels * 1.05))
    high, wide = round(height / side) * side, round(width / side) * side
    if high * wide > most:
        shrink = math.sqrt(height * width / most)
        high = max(side, math.floor(height / shrink / side) * side)
        wide = max(side, math.floor(width / shrink / side) * side)
    elif high * wide < rules.min_pixels:
        grow = math.sqrt(rules.min_pixels / (height * width))
        high = math.ceil(height * grow / side) * side
        wide = math.ceil(width * grow / side) * side
    return high, wide


@dataclass(frozen=True)
class Cost:
    """What one question about one video costs; FLOPs of the language model, memory in bytes."""

    frames: int
    resized: tuple[int, int]  # height, width in pixels
    grid: tuple[int, int, int]  # merged tokens in time, height, width
    video_tokens: int
    prompt_tokens: int
    cubes: int
    dense_flops: float
    flops: float | None  # an estimate, except for a budget that can be met; only AdaSpark's
    flops_ratio: float | None
    least_budget: float | None  # the smallest FLOPs budget that can be met
    kv_bytes: int
    key_sum_bytes: int
    encoder_cache_bytes: int
    host_bytes: int  # decoded frames and the processor's patches
    weights_bytes: int | None
    max_model_len: int
    max_num_batched_tokens: int
    fits: bool  # whether the model has so many positions
    fitting_frames: int | None  # max_frames that fits, if this does not
    fitting_pixels: int | None  # or max_pixels

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def cost(
    model: Model,
    video: Video,
    config: Settings,
    sampling: Sampling,
    *,
    text_tokens: int = 64,
    answer_tokens: int = 1024,
    kv_element_bytes: int = 2,
) -> Cost:
    """Count it.

    Args:
        model, video, config, sampling: the model, the video and the settings.
        text_tokens: of the prompt, chat template included.
        answer_tokens: room to leave for the answer.
        kv_element_bytes: 2 for a bfloat16 KV cache, 1 for fp8.
    """
    shape, rules = model.shape, model.rules
    frames = sampled_frames(video, sampling)
    height, width = resized(video, frames, rules, sampling)
    grid = (-(-frames // PAIR), height // rules.side, width // rules.side)
    tokens = math.prod(grid)
    prompt = tokens + text_tokens
    length = _round_up(prompt + answer_tokens)
    volume = config.cube_volume
    blocks = -(-(prompt + answer_tokens) // volume)
    dense, spent, least = _flops(model, config, prompt, tokens)
    fits = prompt + answer_tokens <= model.max_positions
    room = max(0, model.max_positions - text_tokens - answer_tokens)
    patches = tokens * rules.merge**2
    patch_bytes = 3 * PAIR * rules.patch**2 * 4  # float32
    return Cost(
        frames=frames,
        resized=(height, width),
        grid=grid,
        video_tokens=tokens,
        prompt_tokens=prompt,
        cubes=tokens // volume,
        dense_flops=dense,
        flops=spent,
        flops_ratio=None if spent is None else spent / dense,
        least_budget=least,
        kv_bytes=blocks
        * volume
        * (2 * shape.kv_heads * shape.head_size * kv_element_bytes * model.layers),
        key_sum_bytes=blocks
        * shape.kv_heads
        * shape.head_size
        * KEY_SUM_BYTES
        * model.layers
        * (2 if isinstance(config, VideoNSASettings) else 1),  # it sums values, too
        encoder_cache_bytes=tokens * shape.hidden * 2,
        host_bytes=frames * video.height * video.width * 3 + patches * patch_bytes,
        weights_bytes=model.weights,
        max_model_len=min(length, model.max_positions) if fits else length,
        max_num_batched_tokens=_round_up(tokens),
        fits=fits,
        fitting_frames=None if fits else room // (grid[1] * grid[2]) * PAIR,
        fitting_pixels=None if fits else room // grid[0] * rules.side**2,
    )


def _flops(
    model: Model, config: Settings, prompt: int, video: int
) -> tuple[float, float | None, float | None]:
    """(dense, spent, least budget as a share) of the prompt, on this machine's GPU or else CPU.

    VideoNSA's are exact.  The least budget is AdaSpark's only; what is spent is not known of other
    methods.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = replace(model.shape, score_products=score_products(device, model.shape.head_size))
    is_video = np.zeros(prompt, bool)
    start = min(TEXT_BEFORE, prompt - video)
    is_video[start : start + video] = True
    if not isinstance(config, AdaSparkConfig):
        dense = prompt_cost(shape, model.layers, is_video, AdaSparkConfig()).dense
        if isinstance(config, VideoNSASettings) and config.mode == "paper":
            return dense, videonsa_flops(config, shape, model.layers, is_video), None
        return dense, None if config.enabled else dense, None
    cost = prompt_cost(shape, model.layers, is_video, config)
    if not config.enabled:
        return cost.dense, cost.dense, cost.least
    if config.flops is not None:
        share = ffn_share = cost.share(config.flops)
    else:
        share = config.p_attn if config.selection == "top_p" else config.keep
        ffn_share = config.p_ffn
    return cost.dense, cost.spent(share, ffn_share), cost.least


def _round_up(tokens: int) -> int:
    return -(-tokens // ROUND) * ROUND
