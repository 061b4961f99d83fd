"""The picture of docs/choosing.md: every mark is what the committed results say."""

from __future__ import annotations

import json
from pathlib import Path

import choosing  # benchmarks
import pytest


def row(contender: str, video: int, correct: int, **more) -> dict:
    told = {"contender": contender, "video": video, "correct": correct, "total": 1, "parts": 1,
            "haystack": "calm", "tokens": 4096, "flops_ratio": 0.5}  # fmt: skip
    return told | more


def test_marks_are_losses_against_dense(tmp_path: Path) -> None:
    rows = []
    for video in range(8):
        for tokens in choosing.LENGTHS:
            at = {"tokens": tokens, "flops_ratio": tokens / 16384}
            rows.append(row("dense", video, 1, tokens=tokens, flops_ratio=1.0))
            rows.append(row("adaspark p=0.5/0.5 min 8", video, int(video > 1), **at))
            rows.append(row("adaspark p=0.5/0.5 norm mean", video, 0, **at))
            rows.append(row("adaspark p=0.5/0.5 prune=0.5", video, 1, **at))
            rows.append(row("dense", video, 0, tokens=tokens, parts=2))
        rows.append(row("evs q=0.5", video, 1))  # not at all lengths
    (tmp_path / "needle.json").write_text(json.dumps({"rows": rows}))
    ours, pruned = choosing.points([tmp_path / "needle.json"])
    assert (ours.family, pruned.family) == ("AdaSpark", "AdaSpark with prune")
    assert ours.flops == pytest.approx(0.375)
    assert ours.lost.value == pytest.approx(0.25)
    assert ours.lost.low < 0.25 < ours.lost.high and pruned.lost.value == 0


def test_the_committed_results_have_marks_of_each_method_that_was_measured() -> None:
    found = choosing.points(sorted(choosing.RESULTS.glob("needle*.json")))
    families = {point.family for point in found}
    assert {"AdaSpark", "EVS", "top-k", "uniform"} <= families
    names = [(point.family, point.name) for point in found]
    assert all(0 < point.flops <= 1 for point in found) and len(names) > 20
