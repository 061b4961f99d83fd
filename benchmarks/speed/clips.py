"""Engines in a benchmark's own processes, and prompts about videos that are arrays of frames."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

FRAME = (8, 16)  # rows and columns of merged tokens
PATCH = 28  # pixels a side of a merged token
TEXT = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What happens in the video?"
TEXT += "<|im_end|>\n<|im_start|>assistant\n"


ROOM = 512  # tokens beside the video


def start_engine(checkpoint: str, longest: int, *, cache_gib: int, **options: Any) -> Any:
    """vLLM in this process with dummy weights, a step of which holds a prompt about ``longest``
    video tokens; ``options`` are its own."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cache_gib))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    length = longest + ROOM
    return LLM(
        checkpoint,
        load_format="dummy",
        dtype="float32",
        block_size=64,
        enforce_eager=True,
        max_model_len=length,
        max_num_batched_tokens=length,
        limit_mm_per_prompt={"video": 1, "image": 0},
        mm_processor_cache_gb=0,
        skip_mm_profiling=True,
        distributed_executor_backend="uni",
        **options,
    )


def prompt(tokens: int, number: int) -> dict[str, Any]:
    """For vLLM, about the video of so many tokens that has this number."""
    return {"prompt": TEXT, "multi_modal_data": {"video": [clip(tokens, number)]}}


def clip(tokens: int, number: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames ``[n, height, width, 3]`` of noise, and their metadata as vLLM's loader gives it."""
    rows, columns = FRAME if tokens >= 1024 else (4, 8)
    pairs = tokens // (rows * columns)
    rng = np.random.default_rng(number)
    size = 2 * pairs, rows * PATCH // 4, columns * PATCH // 4, 3
    frames = rng.integers(0, 256, size, np.uint8).repeat(4, 1).repeat(4, 2)
    return frames, {
        "fps": 2.0,
        "duration": float(pairs),
        "total_num_frames": 2 * pairs,
        "frames_indices": list(range(2 * pairs)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
