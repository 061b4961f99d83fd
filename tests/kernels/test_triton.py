"""Runs triton_cases.py under Triton's interpreter, on the CPU.

In a process of its own: Triton reads ``TRITON_INTERPRET`` as it is imported, and vLLM, which other
tests here import, imports it too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]

CASES = Path(__file__).with_name("triton_cases.py")
TOPICS = ("score", "nucleus", "tables", "ffn", "switch", "layer")


@pytest.fixture(scope="module")
def outcome() -> tuple[dict[str, list[str]], str]:
    """Outcomes of the cases by topic, and all that was printed; starting Triton takes longest."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", CASES],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    found: dict[str, list[str]] = {topic: [] for topic in TOPICS}
    for said, topic in re.findall(r"(?m)^(\w+) \S*::test_([a-z]+)_", done.stdout):
        found[topic].append(said)
    return found, done.stdout + done.stderr


@pytest.mark.parametrize("topic", TOPICS)
def test_kernels_equal_their_twins(outcome, topic: str) -> None:
    found, printed = outcome
    assert found[topic] and set(found[topic]) == {"PASSED"}, printed


def test_every_case_has_a_topic() -> None:
    names = [line for line in CASES.read_text().splitlines() if line.startswith("def test_")]
    assert names and all(name.startswith(tuple(f"def test_{t}_" for t in TOPICS)) for name in names)


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
        [sys.executable, script, *map(str, args)], capture_output=True, text=True, timeout=600
    )
