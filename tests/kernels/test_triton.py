"""Runs the files of Triton cases under Triton's interpreter, on the CPU.

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

TOPICS = {
    "triton_cases.py": ("score", "nucleus", "tables", "ffn", "switch", "layer"),
    "triton_videonsa_cases.py": ("videonsa",),
}
ALL = [topic for topics in TOPICS.values() for topic in topics]


@pytest.fixture(scope="module")
def outcome() -> tuple[dict[str, list[str]], str]:
    """Outcomes of the cases by topic, and all that was printed; starting Triton takes longest."""
    files = [Path(__file__).with_name(file) for file in TOPICS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", *files],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=1000,
    )
    found: dict[str, list[str]] = {topic: [] for topic in ALL}
    for said, topic in re.findall(r"(?m)^([A-Z]+) \S*::test_([a-z]+)_", done.stdout):
        found[topic].append(said)
    return found, done.stdout + done.stderr


@pytest.mark.parametrize("topic", ALL)
def test_kernels_equal_their_twins(outcome, topic: str) -> None:
    found, printed = outcome
    assert found[topic] and set(found[topic]) == {"PASSED"}, printed


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


def test_gpu_kernels_check(tmp_path: Path) -> None:
    """The checks run on tiny inputs and find all kernels right; the times mean nothing."""
    result = tmp_path / "kernels.json"
    done = run_benchmark("--check", "--json", result, script="gpu_kernels.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mean nothing" in done.stdout
    found = json.loads(result.read_text())
    assert all(check["right"] for check in found["correct"].values())
    for part in (
        "VideoNSA cmp",
        "VideoNSA choice",
        "VideoNSA slc",
        "AdaSpark choice",
        "AdaSpark FFN",
    ):
        assert any(name.startswith(part) for name in found["correct"])
    assert {row["what"].split(":")[0].split(",")[0] for row in found["times"]} == {
        "dense", "cmp and importances", "of that the choice", "slc", "FFN",
    }  # fmt: skip


def test_gpu_kernels_time_nothing_if_one_is_wrong(tmp_path: Path) -> None:
    result = tmp_path / "kernels.json"
    spoilt = f"""
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT)!r}]
import gpu_checks, gpu_kernels
best = gpu_checks.videonsa_compress.best
gpu_checks.videonsa_compress.best = lambda *arguments: best(*arguments) + 1
gpu_checks.CHECKS = (gpu_checks.videonsa,)
sys.argv = ["gpu_kernels.py", "--check", "--json", {str(result)!r}]
gpu_kernels.main()
"""
    done = subprocess.run([sys.executable, "-c", spoilt], capture_output=True, text=True)
    assert done.returncode != 0
    assert "not right, nothing was timed: ['VideoNSA choice" in done.stderr
    found = json.loads(result.read_text())
    assert not found["correct"]["VideoNSA choice, float32"]["right"] and not found["times"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_gpu_benchmarks_never_guess(tmp_path: Path) -> None:
    result = tmp_path / "gpu.json"
    done = run_benchmark("--json", result)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "no CUDA device: not measured\n"
    done = subprocess.run(
        [ROOT / "benchmarks/gpu_session.sh", tmp_path / "results"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("no CUDA device") and "nothing was measured" in done.stdout
    assert not result.exists() and not any((tmp_path / "results").iterdir())


def run_benchmark(*args: object, script: str = "gpu_attention.py") -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks" / script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)
