"""What a video would cost: frames, tokens, cubes, FLOPs, memory, and the flags it needs.

Which frames are taken and how many tokens they become is told by the model's layout
(models/layout.py), from the checkpoint's files: no model, no vLLM and no GPU is needed to ask.  The
dense FLOPs are counted; what of them is spent, the method's settings tell (``Settings.forecast``).

Not counted: the vision tower's FLOPs and activations, CUDA graphs, the answer's tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models.layout import FrameRules, Layout, LayoutError, Sampling, Video, layout_class
from ..models.llava_onevision_layout import LlavaFrames, LlavaOnevisionLayout
from ..models.qwen2_5_vl_layout import Qwen2_5_VLLayout, QwenFrames
from ..paged.state import kept_bytes
from ..settings import Settings
from ..video.prune import COLUMNS, kept_tokens
from .flops import Forecast, ModelShape

KEYS_DTYPE = torch.bfloat16  # of the model, usually
ROUND = 1024  # lengths are proposed in multiples of this


@dataclass(frozen=True)
class Model:
    """What must be known of a model."""

    name: str
    shape: ModelShape
    layers: int
    layout: type[Layout] = Qwen2_5_VLLayout
    max_positions: int = 128_000
    rules: FrameRules = field(default_factory=QwenFrames)
    weights: int | None = None  # bytes, None where unknown
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)  # config.json


def _qwen(name: str, layers: int, billions: float, **shape: int) -> Model:
    return Model(
        name=f"Qwen/Qwen2.5-VL-{name}-Instruct",
        shape=ModelShape(head_size=128, **shape),
        layers=layers,
        weights=round(billions * 2e9),  # bfloat16
    )


def _onevision(name: str, layers: int, billions: float, **shape: int) -> Model:
    return Model(
        name=f"llava-hf/llava-onevision-qwen2-{name}-ov-hf",
        shape=ModelShape(**shape),
        layers=layers,
        layout=LlavaOnevisionLayout,
        max_positions=32_768,
        rules=LlavaFrames(),
        weights=round(billions * 2e9),
    )


SUCH_AS = "such as Qwen/Qwen2.5-VL-7B-Instruct"

# As in the checkpoints' config.json.
PRESETS = {
    "3b": _qwen("3B", 36, 3.75, hidden=2048, heads=16, kv_heads=2, intermediate=11008),
    "7b": _qwen("7B", 28, 8.29, hidden=3584, heads=28, kv_heads=4, intermediate=18944),
    "32b": _qwen("32B", 64, 33.5, hidden=5120, heads=40, kv_heads=8, intermediate=27648),
    "72b": _qwen("72B", 80, 73.4, hidden=8192, heads=64, kv_heads=8, intermediate=29568),
    "onevision-0.5b": _onevision(
        "0.5b", 24, 0.89, hidden=896, heads=14, kv_heads=2, head_size=64, intermediate=4864
    ),
    "onevision-7b": _onevision(
        "7b", 28, 8.03, hidden=3584, heads=28, kv_heads=4, head_size=128, intermediate=18944
    ),
}


def read_model(name: str, find: Callable[[str], Path | None]) -> Model:
    """A model from its checkpoint's files.

    Args:
        name: what to call it.
        find: gives the path of a file of the checkpoint by its name, None if it has none.

    Raises:
        LayoutError: no config.json, or not that of a model of ours.
    """
    config = _read_json(find("config.json"))
    if config is None:
        raise LayoutError(f"model {name}: no config.json; give a checkpoint, {SUCH_AS}")
    text = config | config.get("text_config", {})  # older checkpoints have no text_config
    try:
        layout = layout_class(config["model_type"])
        heads, hidden = text["num_attention_heads"], text["hidden_size"]
        shape = ModelShape(
            hidden=hidden,
            heads=heads,
            kv_heads=text["num_key_value_heads"],
            head_size=hidden // heads,
            intermediate=text["intermediate_size"],
        )
        layers = text["num_hidden_layers"]
        rules = layout.rules(config, _processor(find))
    except KeyError as missing:
        raise LayoutError(
            f"model {name}: config.json has no {missing}; give a checkpoint, {SUCH_AS}"
        ) from None
    except LayoutError as error:
        raise LayoutError(f"model {name}: {error}") from None
    return Model(
        name=name,
        shape=shape,
        layers=layers,
        layout=layout,
        max_positions=text.get("max_position_embeddings", Model.max_positions),
        rules=rules,
        weights=_weights(find),
        config=config,
    )


def _processor(find: Callable[[str], Path | None]) -> dict[str, Any]:
    """What configures the video processor, in Hugging Face's order of preference."""
    nested = (_read_json(find("processor_config.json")) or {}).get("video_processor")
    files = ("video_preprocessor_config.json", "preprocessor_config.json")
    return nested or next(filter(None, (_read_json(find(name)) for name in files)), {})


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
        raise LayoutError(f"{path} cannot be read: {error}") from None


@dataclass(frozen=True)
class Cost:
    """What one question about one video costs; FLOPs of the language model, memory in bytes."""

    frames: int
    resized: tuple[int, int]  # height, width in pixels
    grid: tuple[int, int, int]  # merged tokens in time, height, width
    video_tokens: int
    dropped_tokens: int  # of them, those that the language model never sees (prune)
    prompt_tokens: int
    cubes: int
    dense_flops: float  # with the dropped tokens
    dense_attention_flops: float  # of them
    flops: float | None  # None where the method does not tell
    flops_ratio: float | None
    flops_by_part: dict[str, float] | None  # as accounts name the parts; None where not told apart
    flops_note: str  # whether that is exact, an estimate, or the most
    least_budget: float | None  # the smallest FLOPs budget that can be met
    kv_bytes: int
    key_sum_bytes: int
    encoder_cache_bytes: int
    host_bytes: int  # decoded frames and the processor's patches
    weights_bytes: int | None
    max_model_len: int
    max_num_batched_tokens: int
    one_step: bool  # whether the prompt must run in one step
    fits: bool  # whether the model has so many positions
    fitting_frames: int | None  # max_frames that fits, if this does not; None if none does
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
        answer_tokens: to leave for the answer.
        kv_element_bytes: 2 for a bfloat16 KV cache, 1 for fp8.

    Raises:
        LayoutError: the model cannot be asked so about this video.
    """
    if config.dropped_share and not model.layout.takes_prune:
        raise LayoutError(f"prune={config.dropped_share}: not for {model.name}; leave it out")
    if config.model_types and model.layout.model_type not in config.model_types:
        raise LayoutError(
            f"model {model.name}: this method is for {', '.join(config.model_types)} only; choose "
            "another --method"
        )
    shape, rules = model.shape, model.rules
    frames = rules.sampled(video, sampling)
    size = rules.resized(video, frames, sampling)
    grid = rules.grid(frames, size)
    whole = math.prod(grid)
    tokens = kept_tokens(grid, config.dropped_share)
    place = tokens + rules.after_video  # in the prompt
    prompt = place + text_tokens
    length = _round_up(prompt + answer_tokens)
    volume = config.cube_volume
    blocks = -(-(prompt + answer_tokens) // volume)
    flops = _forecast(model, config, prompt, tokens, whole - tokens)
    with_dropped = prompt + whole - tokens
    fits = prompt + answer_tokens <= model.max_positions
    most = max(0, model.max_positions - text_tokens - answer_tokens - rules.after_video)
    fitting_frames, fitting_pixels = (None, None) if fits else rules.fitting(most, grid)
    return Cost(
        frames=frames,
        resized=size,
        grid=grid,
        video_tokens=whole,
        dropped_tokens=whole - tokens,
        prompt_tokens=prompt,
        cubes=tokens // volume,
        dense_flops=flops.dense,
        dense_attention_flops=model.layers
        * (with_dropped * (with_dropped + 1) / 2 * shape.attention_flops_per_pair),
        flops=flops.spent,
        flops_ratio=None if flops.spent is None else flops.spent / flops.dense,
        flops_by_part=flops.by_part,
        flops_note=flops.note,
        least_budget=flops.least,
        kv_bytes=blocks
        * volume
        * (2 * shape.kv_heads * shape.head_size * kv_element_bytes * model.layers),
        key_sum_bytes=blocks
        * model.layers
        * kept_bytes(config, shape.kv_heads, shape.head_size, KEYS_DTYPE),
        encoder_cache_bytes=place * (shape.hidden + COLUMNS * (whole > tokens)) * 2,
        host_bytes=frames * video.height * video.width * 3 + rules.pixel_bytes(frames, size),
        weights_bytes=model.weights,
        max_model_len=min(length, model.max_positions) if fits else length,
        max_num_batched_tokens=_round_up(prompt if config.one_step else place),
        one_step=config.one_step,
        fits=fits,
        fitting_frames=fitting_frames,
        fitting_pixels=fitting_pixels,
    )


def _forecast(model: Model, config: Settings, prompt: int, video: int, dropped: int) -> Forecast:
    """Of the prompt, on this machine's GPU or else CPU.

    Raises:
        LayoutError: the model has not the layers that the settings name.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = model.shape.scored(device, config.key_summary)
    is_video = np.zeros(prompt, bool)
    start = min(model.rules.text_before, prompt - video)
    is_video[start : start + video] = True
    try:
        return config.forecast(shape, model.layers, is_video, dropped)
    except ValueError as error:
        raise LayoutError(str(error)) from None


def _round_up(tokens: int) -> int:
    return -(-tokens // ROUND) * ROUND
