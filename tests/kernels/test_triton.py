"""Runs the files of Triton cases under Triton's interpreter, on the CPU.

In a process of its own: Triton reads ``TRITON_INTERPRET`` as it is imported, and vLLM, which other
tests here import, imports it too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]

TOPICS = {
    "triton_cases.py": ("score", "nucleus", "tables", "ffn", "switch", "layer"),
    "triton_videonsa_cases.py": ("compress", "best", "select"),
}
EACH = [(file, topic) for file, topics in TOPICS.items() for topic in topics]


@pytest.mark.parametrize("file, topic", EACH, ids=[topic for _, topic in EACH])
def test_kernels_equal_their_twins(file: str, topic: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x"),
            *(Path(__file__).with_name(file), "-k", f"test_{topic}"),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", TOPICS)
def test_every_case_has_a_topic(file: str) -> None:
    lines = Path(__file__).with_name(file).read_text().splitlines()
    names = [line for line in lines if line.startswith("def test_")]
    topics = tuple(f"def test_{topic}_" for topic in TOPICS[file])
    assert names and all(name.startswith(topics) for name in names)


def test_gpu_benchmark_check(tmp_path: Path) -> None:
    """Everything of it runs on tiny inputs, and is right; its times mean nothing."""
    result = tmp_path / "gpu.json"
    done = run_benchmark("--check", "--json", result, "--density", "0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mean nothing" in done.stdout
    found = json.loads(result.read_text())
    (correct,) = found["correct"].values()
    assert correct["scores"] < 1e-2 and correct["nucleus"] < 1e-2
    kinds = {row["kind"] for row in found["rows"]}
    assert kinds == {"dense", "selection", "sparse"}
    sparse = [row for row in found["rows"] if row["kind"] == "sparse"]
    assert {row["name"] for row in sparse} == {"prefill", "chunk"}
    for row in sparse:
        assert row["time_s"] and 0 < row["density"] <= 1
        assert row["efficiency"] == pytest.approx(row["ratio_to_dense"] * row["density"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_gpu_benchmark_never_guesses(tmp_path: Path) -> None:
    result = tmp_path / "gpu.json"
    done = run_benchmark("--json", result)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "no CUDA device: not measured\n"
    assert not result.exists()


def run_benchmark(*args: object) -> subprocess.CompletedProcess:
    script = ROOT / "benchmarks/gpu_attention.py"
    return subprocess.run(
        [sys.executable, script, *map(str, args)], capture_output=True, text=True, timeout=300
    )
