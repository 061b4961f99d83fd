"""The servers: one `vllm serve` at a time, as a user would start it, on a free loopback port."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch
from server import VllmServer  # examples/demo

from vllm_adaspark import ARCHITECTURE

from . import ROOT

MODEL_NAME = "needle"
START_SECONDS = 900  # it takes about 20; minutes where others use the machine too
ANSWER_SECONDS = 300  # the longest video takes seconds
AT_ONCE = 2  # videos in flight: while one is computed the next one is decoded
TEXT_ROOM = 1024  # tokens of a prompt besides the video, generously
DENSE_BELOW = 8


@dataclass(frozen=True)
class Server:
    """How a server is started.

    Attributes:
        kind: "stock" (vLLM without plugins), "adaspark", "adatp", "videonsa", or "evs" (stock,
            pruning).
        block: tokens in a KV block; for "adaspark" the volume of a cube.
        gates: for "videonsa", the only branch that counts; None as trained.
        weights: for "videonsa", which checkpoint: the first digits of its sha256.
        rate: share of the video tokens that EVS drops.
        score: for "adaspark", what cubes are scored by.
        dtype: what it computes in, as ``vllm serve --dtype`` says it.
    """

    kind: str
    block: int = 64
    rate: float | None = None
    gates: str | None = None
    weights: str | None = None
    score: str = "mean"
    dtype: str = "auto"

    @property
    def name(self) -> str:
        more = "" if self.rate is None else f"-{self.rate:.4f}"
        more += "".join(f"-{part}" for part in (self.gates, self.weights) if part is not None)
        more += "" if self.score == "mean" else f"-{self.score}"
        more += "" if self.block == 64 else f"-{self.block}"
        return f"{self.kind}{more}" + ("" if self.dtype == "auto" else f"-{self.dtype}")


def command(server: Server, videos: Path, tokens: int) -> tuple[list[str], dict[str, str]]:
    """Arguments after ``vllm serve MODEL``, and environment variables.

    Args:
        server: which.
        videos: the folder that requests may name files of.
        tokens: the longest video.
    """
    length = tokens + TEXT_ROOM
    # All frames, because a card lasts two; vLLM's loader for Qwen2.5-VL stops at 768 of them.
    frames = {"video_backend": "opencv", "num_frames": -1, "fps": -1}
    arguments = [
        *("--served-model-name", MODEL_NAME),
        *("--allowed-local-media-path", str(videos)),
        *("--media-io-kwargs", json.dumps({"video": frames})),
        *("--limit-mm-per-prompt", json.dumps({"video": 2, "image": 0})),
        *("--max-model-len", str(length)),
        # So that no prompt is cut into chunks, whatever else is in the step.
        *("--max-num-batched-tokens", str(AT_ONCE * length + TEXT_ROOM)),
        *("--max-num-seqs", "16"),
        *("--block-size", str(server.block)),
        *("--dtype", server.dtype),
        *("--mm-processor-cache-gb", "1"),
        "--enforce-eager",  # compiling takes longer than most servers live
        "--skip-mm-profiling",
    ]
    env = {
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_PLUGINS": "",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    if server.kind in ("adaspark", "adatp"):
        shape = {32: [4, 4, 2], 64: [4, 4, 4], 128: [8, 4, 4]}[server.block]
        config: dict[str, Any] = {"method": server.kind, "adaspark": {"cube": shape}}
        if server.kind == "adaspark":
            config["adaspark"] |= {"dense_below": DENSE_BELOW, "score": server.score}
        arguments += [
            *("--hf-overrides", json.dumps({"architectures": [ARCHITECTURE]})),
            *("--additional-config", json.dumps(config)),
            "--trust-request-mm-kwargs",  # without it vLLM refuses every mm_processor_kwargs
        ]
        env["VLLM_PLUGINS"] = "adaspark,adaspark_http"
    elif server.kind == "videonsa":  # its checkpoint says the rest
        env["VLLM_PLUGINS"] = "adaspark,adaspark_http"
    elif server.kind == "evs":
        arguments += [
            *("--video-pruning-rate", str(server.rate)),
            # A question whose video is cached would get positions of the unpruned video.
            "--no-enable-prefix-caching",
        ]
        if not torch.cuda.is_available():
            arguments += ["--worker-cls", "benchmarks.needle.evs_worker.PruningWorker"]
            env["PYTHONPATH"] = os.pathsep.join(
                filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
            )
    return arguments, env


@contextmanager
def started(
    server: Server, checkpoint: Path, videos: Path, tokens: int, logs: Path
) -> Iterator[openai.OpenAI]:
    """A client of a running server, which ends with the block.

    Raises:
        ServerFailed: it did not start; ends with its log.
    """
    arguments, env = command(server, videos, tokens)
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{server.name}.log"
    with VllmServer(checkpoint, *arguments, log=log, env=env) as process:
        process.wait_until_ready(START_SECONDS)
        yield openai.OpenAI(
            base_url=f"{process.url}/v1", api_key="none", timeout=ANSWER_SECONDS, max_retries=0
        )
