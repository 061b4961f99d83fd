"""``vllm-adaspark tune`` with real engines: the needle model, questions of two sets of seeds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_adaspark.cli import main
from vllm_adaspark.tune import compare, grid, journal, questions

pytestmark = pytest.mark.engine

NEEDLE = Path(__file__).resolve().parents[2] / "examples" / "needle"
VIDEOS, PATCHES = 20, 24  # the first ten videos are tuned on, the others held out
GRID = [
    {"p_attn": 0.5, "p_ffn": 0.5},
    {"p_attn": 0.2, "p_ffn": 0.2, "min_cubes": 1},
    {"method": "adatp", "flops": 0.7},
]
OPTIONS = ["--enforce-eager", "--dtype", "float32", "--gpu-memory-utilization", "0.2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    script = NEEDLE / "write_questions.py"
    command = [sys.executable, script, folder / "clips", "--videos", VIDEOS, "--patches", PATCHES]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    (folder / "grid.jsonl").write_text("\n".join(map(json.dumps, GRID)))
    return folder


@pytest.fixture(scope="module")
def lines(folder: Path) -> dict[tuple[str, str], dict]:
    """The journal of one run over all videos."""
    clips = folder / "clips"
    arguments = [NEEDLE / "checkpoint", clips, clips / "questions.jsonl", "--grid"]
    arguments += [folder / "grid.jsonl", "--out", folder / "out", "--max-tokens", 3]
    assert main(["tune", *map(str, arguments), *OPTIONS]) == 0
    told = (folder / "out" / journal.NAME).read_text().splitlines()[1:]
    return {(line["contender"], line["video"]): line for line in map(json.loads, told)}


@pytest.fixture(scope="module")
def asked(folder: Path) -> list[list[questions.Question]]:
    clips = folder / "clips"
    return compare.by_video(questions.read(clips / "questions.jsonl", clips))


@pytest.fixture(scope="module")
def contenders(folder: Path) -> list[grid.Contender]:
    known = grid.Model(trained_for=None, config={}, takes_prune=True, layers=6)
    return grid.read(folder / "grid.jsonl", known)


def test_every_setting_answers_everything(lines, asked, contenders) -> None:
    dense, mild, hard, adatp = compare.outcomes(contenders, asked, lines)
    assert {each.questions for each in (dense, mild, hard, adatp)} == {6 * VIDEOS}
    assert dense.right > 0.85 and dense.flops == 1 and dense.kl == pytest.approx(0, abs=1e-6)
    assert hard.flops < mild.flops < 0.9 and 0.5 < adatp.flops <= 0.71
    assert 0 < mild.kl < hard.kl and adatp.kl > 0
    for each in (dense, mild, hard, adatp):
        assert each.prefill > 0 and each.memory > 1 << 28 and len(each.layers["ffn"]) == 6
    assert dense.mode == "dense (off)" and {mild.mode, hard.mode, adatp.mode} == {"sparse"}
    assert adatp.layers["alive"][-1] < adatp.layers["alive"][0] == 1
    assert sum(hard.added) == pytest.approx(1 - hard.flops, abs=0.05)  # but for what choosing costs


def test_what_it_recommends_holds_on_other_seeds(lines, asked, contenders) -> None:
    """Of 60 questions, for a wanted loss of five points, and of 60 others about other videos."""
    tuned, held_out = asked[: VIDEOS // 2], asked[VIDEOS // 2 :]
    assert sum(map(len, tuned)) == sum(map(len, held_out)) == 60
    choice = compare.choose(compare.outcomes(contenders, tuned, lines), 0.05)
    best = choice.outcome
    assert best.contender.name != "dense" and best.flops < 0.9
    again = {each.contender.name: each for each in compare.outcomes(contenders, held_out, lines)}
    assert best.loss.low <= again[best.contender.name].loss.value <= best.loss.high


def test_the_report_is_there(folder: Path, lines) -> None:
    out = folder / "out"
    page = (out / "tune.md").read_text()
    assert "120 questions about 20 videos" in page and "vllm-adaspark serve" in page
    assert (out / "tune.png").stat().st_size > 10_000
    told = json.loads((out / "tune.json").read_text())
    assert told["missing"] == 0 and len(told["contenders"]) == 1 + len(GRID)
