"""vLLM with the plugin in this process, asked about the needle model's videos."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDLE = ROOT / "examples" / "needle"
sys.path.append(str(NEEDLE))


def in_own_process(function: Callable, *arguments: Any) -> Any:
    """What ``function`` returns, run in its own process, with which an engine's memory goes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def start(checkpoint: Path, tokens: int, settings: dict | None = None, dtype: str = "auto"):
    """vLLM with the plugin, in this process, under these settings of the server."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # WARNING: two lines a request
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    from vllm_adaspark import ARCHITECTURE

    length = -(-(tokens + 512) // 1024) * 1024
    return LLM(
        str(checkpoint),
        hf_overrides={"architectures": [ARCHITECTURE]},
        additional_config={"adaspark": settings or {}},
        dtype=dtype,
        enforce_eager=True,
        max_model_len=length,
        max_num_batched_tokens=length,
        max_num_seqs=8,
        limit_mm_per_prompt={"video": 1, "image": 0},
        skip_mm_profiling=True,
        distributed_executor_backend="uni",
    )


def ask(llm, video, questions, settings: dict | None) -> tuple[list[str], dict]:
    """Answers to ``questions``, and the account of the first, which computes the video."""
    from evaluate import PROMPT
    from vllm import SamplingParams

    from vllm_adaspark.accounts.reports import merge_reports

    sampling = SamplingParams(max_tokens=4, temperature=0)
    prompts = [
        {
            "prompt": PROMPT.format(question.text),
            "multi_modal_data": {"video": [(video.frames, video.metadata)]},
            "mm_processor_kwargs": {"adaspark": settings},
        }
        for question in questions
    ]
    outputs = llm.generate(prompts[:1], sampling, use_tqdm=False)
    account = merge_reports(llm.collective_rpc("adaspark_report"))["requests"][-1]
    outputs += llm.generate(prompts[1:], sampling, use_tqdm=False)
    return [output.outputs[0].text.strip() for output in outputs], account
