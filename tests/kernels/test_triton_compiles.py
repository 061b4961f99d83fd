"""Every Triton kernel compiles ahead of time for A100 and H100/H200: Triton brings its own ptxas.

Argument types are what the wrappers pass for Qwen2.5-VL-7B: bf16, group 7, head size 128.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]

VIDEO = dict(HEAD_SIZE=128, QUERIES=448, GROUP=7, ROWS=64, COLUMNS=128, WIDEN=False)
VIDEO_BOUNDS = VIDEO | dict(HEAD_SIZE=256, COLUMNS=64)  # as score.block_shape says
SCORE = "*bf16 *bf16 *u8 *i64 *i64 *i32 *fp32"
TOP_P = "*fp32 *u8 *fp32 *i64 *u8 i32" + " i32" * 12
PAGED = "*bf16 *bf16 *i32 *i32 *i32 *bf16 i32 fp32"
PAGED_CONSTANTS = dict(GROUP=7, HEAD_SIZE=128, WIDEN=False)

# kernel, or "kernel:variant": module, types of its arguments in order, constants, launch options
CASES = {
    "_cube_keys": (
        "score",
        "*fp32 *i64 *u8 *bf16 i32 i32 fp32",
        dict(HEAD_SIZE=128, ROWS=16),
        {},
    ),
    "_cube_keys:bounds": (
        "score",
        "*bf16 *i64 *u8 *bf16 i32 i32 fp32",
        dict(HEAD_SIZE=256, ROWS=16),
        {},
    ),
    "_query_lse": ("score", SCORE + " i32 i32 i32 fp32", VIDEO, {}),
    "_pool": ("score", SCORE + " *fp32 i32 i32 i32 fp32", VIDEO, {}),
    "_token_probabilities": (
        "score",
        "*bf16 *fp32 *i64 *u8 *i64 *i64 *i64 *i32 *fp32 i32 i32 i32 fp32",
        dict(HEAD_SIZE=128, GROUP=7, ROWS=16, COLUMNS=32),
        dict(num_warps=8, num_stages=2),
    ),
    "_query_lse:bounds": ("score", SCORE + " i32 i32 i32 fp32", VIDEO_BOUNDS, {}),
    "_pool:bounds": ("score", SCORE + " *fp32 i32 i32 i32 fp32", VIDEO_BOUNDS, {}),
    "_token_probabilities:bounds": (
        "score",
        "*bf16 *bf16 *i64 *u8 *i64 *i64 *i64 *i32 *fp32 i32 i32 i32 fp32",
        dict(HEAD_SIZE=256, GROUP=7, ROWS=16, COLUMNS=16),
        dict(num_warps=8, num_stages=2),
    ),
    "_top_p": ("nucleus", TOP_P, dict(BLOCK=4096), {}),
    "_compact": (
        "tables",
        "*u8 *u8 *i32 *i32 *i32 *i32 *i32 *i32 i32 i32",
        dict(CHUNK=1024),
        {},
    ),
    "_token_squares": (
        "ffn",
        "*bf16 *i64 *fp32 i32 i32",
        dict(SIZE=64, COLUMNS=32, CENTRED=True),
        {},
    ),
    "_active_first": ("ffn", "*u8 *i32 *i32 *i32 i32", dict(CHUNK=4096), dict(num_warps=8)),
    "_centroids": (
        "ffn",
        "*bf16 *u8 *i64 *i32 *i32 *bf16 i32 i32",
        dict(SIZE=64, COLUMNS=64),
        {},
    ),
    "_gather": ("ffn", "*bf16 *i32 *i32 *bf16 i32 i32", dict(COLUMNS=2048), {}),
    "_silu_and_mul": ("ffn", "*bf16 *i32 *bf16 i32", dict(COLUMNS=1024), {}),
    "_scatter": ("ffn", "*bf16 *i32 *i32 *bf16 i32", dict(COLUMNS=2048), {}),
    "_compensate": (
        "ffn",
        "*bf16 *i32 *u8 *i64 *i64 *bf16 i32 i32",
        dict(SIZE=64, COLUMNS=64, HAS_CENTROIDS=True, CENTROID_CODE=0, MEAN_CODE=1),
        {},
    ),
    "_compress": (
        "videonsa_compress",
        "*bf16 *i64 *fp32 *bf16 *i32 *i32 *fp32 *fp32 i32 i32 i32 fp32",
        dict(HEAD_SIZE=128, GROUP=7, PADDED=8, TOKENS=8, COLUMNS=32, SPLIT=True, WIDEN=False),
        dict(num_stages=1),
    ),
    "_best": ("videonsa_compress", "*fp32 *i32 *i32 i32 i32", dict(BLOCK=2048, PLACES=32), {}),
    "_select": (
        "videonsa_select",
        "*bf16 *i64 *bf16 *i32 *i32 *i32 *bf16 i32 fp32",
        dict(HEAD_SIZE=128, GROUP=7, ROWS=16, PAGE=64, PLACES=32, WIDEN=False),
        dict(num_stages=2),
    ),
    "_paged_attention": (
        "gpu_paged_kernel",
        PAGED,
        PAGED_CONSTANTS | dict(PAGE=64, ROWS=128, COLUMNS=128),
        dict(num_warps=8, num_stages=2),
    ),
}

CAPABILITIES = (80, 90)
COMPILE = """
import importlib, json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

capabilities, cases = json.loads(sys.argv[1])
for name, (module, types, constants, options) in cases.items():
    home = "" if module.startswith("gpu_") else "vllm_adaspark.kernels."
    kernel = getattr(importlib.import_module(home + module), name.split(":")[0])
    names = kernel.arg_names
    types = dict(zip(names, types.split()))
    assert len(types) + len(constants) == len(names), f"{name}: its arguments have changed"
    signature = types | dict.fromkeys(constants, "constexpr")
    # What a launch finds out about its arguments: pointers are aligned to 16 bytes.
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t[0] == "*"}
    source = ASTSource(kernel, signature, constants, aligned)
    for capability in capabilities:
        done = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        facts = "wgmma" in done.asm["ptx"], done.metadata.shared, len(done.asm["cubin"])
        print(capability, name, *facts)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[tuple[int, str], tuple[str, int, int]]:
    """Per capability and kernel, whether it has wgmma, its shared memory and its size, in bytes.

    One process for all, without the interpreter: starting Triton is what takes time.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": str(ROOT / "benchmarks"),
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps([CAPABILITIES, CASES])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = (line.split() for line in done.stdout.splitlines())
    return {
        (int(capability), name): (wgmma, int(shared), int(size))
        for capability, name, wgmma, shared, size in facts
    }


def kernel_of(case: str) -> str:
    return case.partition(":")[0]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CASES)
def test_compiles(compiled, name: str, capability: int) -> None:
    wgmma, shared, size = compiled[capability, name]
    assert size > 0
    # What a program of the GPU may have: 163 KB on an A100, 227 KB on an H100.
    assert shared <= (163 if capability == 80 else 227) * 1024
    products = ("_query_lse", "_pool", "_paged_attention", "_compress")
    assert (wgmma == "True") == (capability == 90 and kernel_of(name) in products), (
        "Hopper's products"
    )


def test_no_kernel_is_left_out() -> None:
    sources = [
        *(ROOT / "vllm_adaspark/kernels").glob("*.py"),
        ROOT / "benchmarks/gpu_paged_kernel.py",
    ]
    kernels = {
        name
        for source in sources
        for name in re.findall(r"@triton\.jit\ndef (\w+)\(", source.read_text())
    }
    parts = {"_step", "_logits", "_block"}  # of _paged_attention, _compress and _select
    assert kernels - parts == set(map(kernel_of, CASES))
