"""Cases whose answers, counts and choices were recorded once, so that a rebuild can be compared.

``recorded.json`` holds what the engine did in each case; ``test_recorded.py`` asks again and
compares.  Everything here is public behaviour: answers, the report of a request, its trace.

To record the code of a tree TREE (this one, or another checkout)::

    PYTHONPATH=TREE:TREE/tests:TREE/examples/demo python tests/engine/recorded_cases.py OUT.json
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import checkpoint as demo_checkpoint  # examples/demo
import numpy as np
import torch

import vllm_adaspark
from engine.engines import IMAGE, SPARSE, VIDEO, ask, chat, clip, engine, last_reports, video_prompt

RECORDED = Path(__file__).with_name("recorded.json")
NEEDLE = Path(__file__).resolve().parents[2] / "examples/needle/checkpoint"
ANSWER_TOKENS = 5
RUNNERS_UP = 4  # log-probabilities per answer token: the best one's alone may be close to 0

# Frames, width, height, seed of the clips: 42, 14, 10 and 8 cubes of 64 tokens.
CLIPS = {
    "long": (112, 224, 168, 31),
    "medium": (60, 168, 140, 1),
    "tall": (36, 112, 252, 3),
    "short": (36, 168, 140, 5),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "as the server": {},
    "p 0.3": {"p_attn": 0.3, "p_ffn": 0.3},
    "p 0.8": {"p_attn": 0.8, "p_ffn": 0.8},
    "attention only": {"p_ffn": 1.0},
    "FFN only": {"p_attn": 1.0},
    "one cube": {"p_attn": 0.4, "min_cubes": 1},
    "top_k": {"selection": "top_k", "keep": 0.3},
    "uniform": {"selection": "uniform", "keep": 0.3},
    "paper": {"paper": True},
    "off": {"off": True},
    "dense in cube order": {"enabled": False},
    "budget 0.45": {"flops": 0.45, "min_cubes": 1},
    "budget 0.7": {"flops": 0.7},
    "dense layers": {"dense_layers": 2},
    "dense text": {"text_queries": "dense"},
    "norm": {"importance": "norm"},
    "mean": {"compensation": "mean"},
    "bypass": {"compensation": "bypass"},
    "raster order": {"order": "raster"},
}


@dataclass(frozen=True)
class Case:
    """What is asked in one batch, and what was asked before it, so that it is cached."""

    prompts: Callable[[], list[dict]]
    before: Callable[[], list[dict]] = list


@dataclass(frozen=True)
class Group:
    """Cases that share an engine."""

    checkpoint: str  # "needle" or "random"
    config: dict[str, Any]
    cases: dict[str, Case]
    options: dict[str, Any] = field(default_factory=dict)


def about(*names: str, question: str = "Which digit is shown?", **settings) -> Case:
    """A question about one video or two."""
    return Case(
        lambda: [video_prompt(*(clip(*CLIPS[n]) for n in names), question=question, **settings)]
    )


def between(**settings) -> Case:
    """Two videos, an image and text between them."""

    def prompts() -> list[dict]:
        text = chat("First: ", VIDEO, " a card: ", IMAGE, " then: ", VIDEO, " Which digit?")
        videos = [clip(*CLIPS[name]) for name in ("medium", "tall")]
        data = {"video": videos, "image": [clip(2, seed=5)[0][0]]}
        extra = {"mm_processor_kwargs": {"adaspark": settings}} if settings else {}
        return [{"prompt": text, "multi_modal_data": data} | extra]

    return Case(prompts)


def text(words: int = 60) -> Case:
    return Case(lambda: [{"prompt": chat("Which number is shown on the card? " * words)}])


def image() -> Case:
    data = {"image": [clip(2, seed=5)[0][0]]}
    return Case(lambda: [{"prompt": chat(IMAGE, "Describe it."), "multi_modal_data": data}])


def batch(*cases: Case) -> Case:
    return Case(lambda: [prompt for case in cases for prompt in case.prompts()])


def again(case: Case, first: Case) -> Case:
    return Case(case.prompts, before=first.prompts)


def with_settings(*names: str, clip_name: str) -> dict[str, Case]:
    return {name: about(clip_name, **SETTINGS[name]) for name in names}


def kinds() -> dict[str, Case]:
    """Requests of each kind, under the server's settings and under others."""
    return {
        "two videos": about("medium", "tall"),
        "two videos, budget": about("medium", "tall", flops=0.6, min_cubes=1),
        "image and text between": between(),
        "image and text between, top_k": between(**SETTINGS["top_k"]),
        "text only": text(),
        "image only": image(),
        "mixed batch": batch(
            about("medium", p_attn=0.3), text(9), about("short", off=True), about("tall")
        ),
    }


COMMON = {"max_model_len": 4096, "max_num_batched_tokens": 4096}  # starts faster than with 8192
FEW_CUBES = {"dense_below": 2, "min_cubes": 2}  # the medium clip is short for the defaults
SOME = ("as the server", "one cube", "paper", "budget 0.45", "dense text", "bypass")
CHUNKED = ("as the server", "raster order", "budget 0.7", "top_k")

GROUPS: dict[str, Group] = {
    "needle": Group(
        "needle",
        FEW_CUBES,
        with_settings(*SETTINGS, clip_name="medium")
        | {"another cube shape": about("medium", cube=[1, 8, 8])}
        | kinds()
        | {
            "cached, same question": again(about("medium"), about("medium")),
            "cached, another question": again(
                about("short", question="What moves? " * 30), about("short", question="Where?")
            ),
            "cached, another question, budget": again(
                about("medium", question="What moves? " * 30, flops=0.7),
                about("medium", flops=0.7),
            ),
            "cached, another second video": again(about("tall", "medium"), about("tall", "short")),
        },
    ),
    "random": Group("random", SPARSE, with_settings(*SOME, clip_name="medium") | kinds()),
    "chunks of 200": Group(
        "needle",
        FEW_CUBES,
        with_settings(*CHUNKED, clip_name="medium") | {"two videos": about("medium", "tall")},
        {"max_num_scheduled_tokens": 200},
    ),
    "chunks of 512, defaults": Group(
        "needle",
        {},
        with_settings("as the server", "p 0.3", "budget 0.45", "top_k", clip_name="long")
        | {"mixed batch": kinds()["mixed batch"], "image and text between": between()},
        {"max_num_scheduled_tokens": 512},
    ),
    "cubes of 32": Group(
        "random",
        SPARSE | {"cube": [2, 4, 4]},
        with_settings("as the server", "budget 0.7", "bypass", clip_name="medium")
        | {"two videos": about("medium", "tall")},
    ),
    "cubes of 128": Group(
        "needle",
        FEW_CUBES | {"cube": [8, 4, 4], "cube_queries": 16},
        with_settings("as the server", clip_name="long")
        | with_settings("budget 0.7", "top_k", clip_name="medium")
        | {"two videos": about("medium", "tall")},
    ),
    "two ranks": Group(
        "random",
        SPARSE,
        with_settings("as the server", "budget 0.7", clip_name="medium")
        | {"image and text between": between(), "mixed batch": kinds()["mixed batch"]},
        {"tensor_parallel_size": 2},
    ),
    "fp8 cache": Group(
        "random",
        SPARSE,
        with_settings("as the server", "top_k", clip_name="medium"),
        {"kv_cache_dtype": "fp8", "dtype": "bfloat16"},
    ),
}


def machine() -> dict[str, Any]:
    """What decides how the engine rounds: another of these may choose otherwise in a near tie."""
    import cv2
    import transformers
    import vllm

    return {
        "cpu": {
            "torch kernels": torch.backends.cpu.get_cpu_capability(),
            "avx2": torch.cpu._is_avx2_supported(),
            "avx512": torch.cpu._is_avx512_supported(),
            "amx": torch.cpu._is_amx_tile_supported(),
            "threads": torch.get_num_threads(),
        },
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "opencv": cv2.__version__,
    }


def absent(group: Group, cpu: dict[str, Any]) -> str | None:
    """Why a group cannot run on this machine; None if it can."""
    if group.options.get("kv_cache_dtype") == "fp8" and not (cpu["avx512"] or cpu["amx"]):
        return "vLLM's CPU kernel takes an fp8 cache with AVX-512 or AMX only"
    return None


def run(group: Group, random_checkpoint: Path) -> dict[str, list[dict[str, Any]]]:
    """Per case, what each request of it did: answer, counts, choices."""
    path = NEEDLE if group.checkpoint == "needle" else random_checkpoint
    config = group.config | {"trace": True}  # so that a case names nothing but its own settings
    done = {}
    with engine(path, config, **COMMON | group.options) as llm:
        for name, case in group.cases.items():
            salt = {"cache_salt": name}  # no case finds another's blocks in the prefix cache
            if earlier := case.before():
                ask(llm, [prompt | salt for prompt in earlier], ANSWER_TOKENS)
            prompts = [prompt | salt for prompt in case.prompts()]
            answers = ask(llm, prompts, ANSWER_TOKENS, RUNNERS_UP)
            reports = last_reports(llm, len(prompts))
            traced = {t["request_id"]: t["id"] for t in _first(llm, "adaspark_traces")}
            done[name] = [
                {
                    "ids": list(answer.ids),
                    "logprobs": [_short(step) for step in answer.logprobs],
                    "cached": answer.cached_tokens,
                    "tokens": report["tokens"],
                    "flops_ratio": report["flops_ratio"],
                    "cubes_attended": [layer["cubes_attended"] for layer in report["layers"]],
                    "ffn_active": [layer["ffn_active"] for layer in report["layers"]],
                    "choices": choices(llm, traced.get(report["request_id"])),
                }
                for answer, report in zip(answers, reports, strict=True)
            ]
    return done


def choices(llm, trace_id: str | None) -> list[str]:
    """Per layer, a digest of all that was chosen; none for a request without a video.

    Which cubes each video cube, question token and answer token attended (the number of KV heads,
    on each rank), and which video tokens ran the FFN.
    """
    if trace_id is None:
        return []

    def read(what: str, *arguments: str) -> list[dict[str, Any]]:
        return llm.collective_rpc("adaspark_trace", args=(trace_id, what, *arguments))

    meta = read("meta")[0]
    assert meta["truncated"] is None, meta["truncated"]
    sources = [f"cube:{n}" for n in range(len(meta["cube_starts"]))]
    for span in meta["spans"]:
        if span["kind"] in ("question", "answer"):
            sources += [f"token:{n}" for n in range(span["start"], span["end"])]
    digests = [hashlib.sha256() for _ in meta["layers"]]
    for source in sources:
        for rank in read("heat", source):
            for digest, row in zip(digests, rank["heat"], strict=True):
                digest.update(json.dumps([source, rank["tokens"], row]).encode())
    for rank in read("ffn"):
        for digest, ran in zip(digests, rank["ran"], strict=True):
            digest.update(ran)
    return [digest.hexdigest()[:16] for digest in digests]


def _first(llm, method: str) -> Any:
    return llm.collective_rpc(method)[0]


def _short(logprobs: dict[int, float]) -> dict[str, float]:
    """The same float32 numbers, in as few digits as tell them apart."""
    return {str(token): float(str(np.float32(value))) for token, value in logprobs.items()}


def main(out: str) -> None:
    """Record the code that is imported."""
    here = machine()
    print(f"recording {Path(vllm_adaspark.__file__).parent}", flush=True)
    recorded: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        random_checkpoint = demo_checkpoint.build(Path(folder), dtype="float32", seed=3)
        for name, group in GROUPS.items():
            began = time.monotonic()
            why = absent(group, here["cpu"])
            recorded[name] = (
                dict.fromkeys(group.cases, why) if why else run(group, random_checkpoint)
            )
            print(f"{name}: {len(group.cases)} cases, {time.monotonic() - began:.1f} s", flush=True)
    lines = [f'"machine": {json.dumps(here)}']
    for name, cases in recorded.items():
        rows = ",\n".join(f"  {json.dumps(case)}: {json.dumps(did)}" for case, did in cases.items())
        lines.append(f"{json.dumps(name)}: {{\n{rows}\n}}")
    Path(out).write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1])
