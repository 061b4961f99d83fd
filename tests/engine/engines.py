"""Real vLLM engines for the tests: prompts, start, answers with log-probabilities, stop."""

from __future__ import annotations

import gc
import json
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import video as demo_video  # examples/demo
import warm

from vllm_adaspark import ARCHITECTURES

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in-process engines and their callers share cores
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # tests send functions to the worker

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
RASTER_DENSE = {"p_attn": 1.0, "p_ffn": 1.0, "order": "raster"}
SPARSE = {"p_attn": 0.6, "p_ffn": 0.5, "min_cubes": 1, "dense_below": 2}


@dataclass(frozen=True)
class Answer:
    """What an engine said, and how sure it was."""

    ids: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]
    cached_tokens: int

    def difference(self, other: Answer) -> float:
        """Largest difference of a log-probability that both name; inf if the answers differ."""
        if self.ids != other.ids:
            return float("inf")
        return max(
            abs(mine[token] - theirs[token])
            for mine, theirs in zip(self.logprobs, other.logprobs, strict=True)
            for token in mine.keys() & theirs.keys()
        )


def chat(*parts: str) -> str:
    return f"<|im_start|>user\n{''.join(parts)}<|im_end|>\n<|im_start|>assistant\n"


@cache
def clip(frames: int = 24, width: int = 168, height: int = 140, seed: int = 0):
    """(frames ``[n, h, w, 3]``, metadata) as vLLM's video loader gives them."""
    fps = 2.0
    made = demo_video.frames(seconds=frames / fps, fps=fps, width=width, height=height, seed=seed)
    metadata = {
        "fps": fps,
        "duration": frames / fps,
        "total_num_frames": frames,
        "frames_indices": list(range(frames)),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    return np.stack([frame[..., ::-1] for frame in made]), metadata


def video_prompt(*videos, question: str = "What is shown?", **settings) -> dict:
    """A prompt about videos; ``settings`` are the request's AdaSpark settings."""
    prompt = {
        "prompt": chat(VIDEO * len(videos), question),
        "multi_modal_data": {"video": list(videos)},
    }
    if settings:
        prompt["mm_processor_kwargs"] = {"adaspark": settings}
    return prompt


def five_prompts() -> dict[str, dict]:
    """One of each kind: short and long video, two videos, text only, image."""
    image = clip(2, seed=5)[0][0]
    return {
        "short video": video_prompt(clip(8)),
        "long video": video_prompt(clip(60, seed=1)),
        "two videos": {
            "prompt": chat("First: ", VIDEO, " Second: ", VIDEO, " Which digit is shown?"),
            "multi_modal_data": {"video": [clip(16, seed=2), clip(20, 112, 196, seed=3)]},
        },
        "text only": {"prompt": chat("Which number is shown on the card? " * 12)},
        "image": {
            "prompt": chat(IMAGE, "Describe the image."),
            "multi_modal_data": {"image": [image]},
        },
    }


def architecture_of(checkpoint) -> str:
    """Our name for a checkpoint's model."""
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    return ARCHITECTURES[config["model_type"]]


@contextmanager
def without_what_takes_long():
    """Two thirds of an engine's start and end are spent on what this process needs once.

    vLLM collects garbage five times at either, among all the objects that were ever imported, and
    looks through all modules for the kernels that it has for CPUs.
    """
    from vllm.triton_utils import dispatcher

    bind = (lambda _: None) if dispatcher._registry else dispatcher.register_kernels
    with (
        patch.object(gc, "collect", lambda *_: 0),
        patch.object(dispatcher, "register_kernels", bind),
    ):
        yield


@contextmanager
def engine(
    checkpoint,
    config: dict | None,
    method: str | None = "adaspark",
    architecture: str | None = "",
    **options,
):
    """A running engine; ``config`` None is the stock model, else the method's server settings.

    ``method`` and ``architecture`` None leave the checkpoint to say which; an empty architecture is
    ours for its model.

    It runs in this process, which starts in two seconds; several ranks are forked processes.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    ranks = nullcontext()
    if options.get("tensor_parallel_size", 1) == 1:
        options["distributed_executor_backend"] = "uni"
    else:
        ranks = warm.forked_from_the_warm()
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 8192,
        "max_num_batched_tokens": 8192,
        "num_gpu_blocks_override": 2048,  # a cache of 1 GiB takes a second to clear
        "limit_mm_per_prompt": {"video": 2, "image": 2},
        "seed": 0,
    } | options
    if config is None:
        options.setdefault("block_size", 64)
    else:
        named = {} if method is None else {"method": method}
        options["additional_config"] = named | {"adaspark": config}
        if architecture is not None:
            named = architecture or architecture_of(checkpoint)
            options["hf_overrides"] = {"architectures": [named]}
    with ranks, without_what_takes_long():
        llm = LLM(str(checkpoint), **options)
    try:
        yield llm
    finally:
        with without_what_takes_long():
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
        gc.collect()


def ask(
    llm, prompts: list[dict], max_tokens: int = 6, logprobs: int = 8, lora=None
) -> list[Answer]:
    """Greedy answers, all prompts in one batch; ``lora`` a LoRARequest of all, or one of each."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=0, logprobs=logprobs, ignore_eos=True
    )
    outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
    return [
        Answer(
            ids=tuple(output.outputs[0].token_ids),
            logprobs=tuple(
                {token: entry.logprob for token, entry in step.items()}
                for step in output.outputs[0].logprobs
            ),
            cached_tokens=output.num_cached_tokens or 0,
        )
        for output in outputs
    ]


def last_reports(llm, count: int = 1) -> list[dict]:
    """Accounts of the last requests, oldest first."""
    from vllm_adaspark.accounts.reports import merge_reports  # see test_isolation.py

    return merge_reports(llm.collective_rpc("adaspark_report"))["requests"][-count:]
