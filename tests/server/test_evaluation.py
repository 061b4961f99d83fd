"""lmms-eval against a real server: examples/eval/, with needle videos as a benchmark of our own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import openai
import pytest

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
EVAL = ROOT / "examples" / "eval"
LMMS = Path(sys.prefix) / "lmms-eval" / "bin"
RUN_SECONDS = 600  # a run takes about 15

VIDEOS, PATCHES, PATCH_TOKENS = 6, 64, 16
SETTINGS = {
    "dense": {"off": True},
    "sparse": {"p_attn": 0.3, "p_ffn": 0.5, "min_cubes": 1, "compensation": "bypass"},
}


@pytest.fixture(scope="session", autouse=True)  # before any server starts
def lmms_eval() -> None:
    if (LMMS.parent / "adaspark-eval.stamp").exists():  # written when all is installed
        return
    told = "lmms-eval is missing: python examples/eval/install.py brings it"
    if os.environ.get("CI") == "true":
        pytest.fail(told)
    pytest.skip(told)


def run(*command: object, folder: Path) -> subprocess.CompletedProcess:
    """Run a program to its end, without a model hub; what lmms-eval caches goes to the folder."""
    env = {**os.environ, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        list(map(str, command)),
        env=env,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
    )


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """The needle videos as an lmms-eval task; a folder whose name needs care in YAML and URLs."""
    folder = tmp_path_factory.mktemp("eval") / "a task: #1"
    made = run(
        *(sys.executable, EVAL / "make_needle_task.py", folder),
        *("--videos", VIDEOS, "--patches", PATCHES),
        folder=folder.parent,
    )
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def questions(task: Path) -> list[dict]:
    found = [json.loads(line) for line in (task / "questions.jsonl").read_text().splitlines()]
    assert len({question["video"] for question in found}) == VIDEOS
    assert len({question["skill"] for question in found}) == 6
    assert len(found) >= 5 * VIDEOS  # a scene now and then allows no question of a skill
    return found


def answer(client: openai.OpenAI, folder: Path, question: dict, settings: dict) -> str:
    video = {"type": "video_url", "video_url": {"url": (folder / question["video"]).as_uri()}}
    text = {"type": "text", "text": question["question"]}
    reply = client.chat.completions.create(
        model="needle",
        messages=[{"role": "user", "content": [video, text]}],
        temperature=0,
        max_tokens=4,
        extra_body={"mm_processor_kwargs": {"adaspark": settings}},
    )
    return reply.choices[0].message.content


def test_scores_are_those_of_direct_calls(
    task: Path, questions: list[dict], needle_url: str, tmp_path: Path
) -> None:
    given = [f"--setting={name}={json.dumps(value)}" for name, value in SETTINGS.items()]
    done = run(
        *(
            LMMS / "python",
            EVAL / "compare.py",
            needle_url,
            "--tasks",
            "needle",
            "--include-path",
            task,
        ),
        *("--frames", 2 * PATCHES, "--out", tmp_path / "out", *given),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "out" / "comparison.json").read_text())["tasks"]["needle"]
    client = openai.OpenAI(base_url=needle_url, api_key="none", max_retries=0)
    accuracies = {}
    for name, settings in SETTINGS.items():
        direct = [answer(client, task, question, settings) for question in questions]
        lines = (tmp_path / "out" / name / "needle.jsonl").read_text().splitlines()
        logged = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
        assert [sample["filtered_resps"][0] for sample in logged] == direct
        right = [said.strip() == asked["answer"] for said, asked in zip(direct, questions)]
        accuracies[name] = sum(right) / len(right)
        value, _ = told["scores"]["accuracy"]["values"][name]
        assert value == pytest.approx(accuracies[name])
        cost = told["cost"][name]
        assert (cost["questions"], cost["failed"]) == (len(questions), 0)
        assert cost["prompt_tokens"] > PATCHES * PATCH_TOKENS
    # The model knows its trade, or equal scores would say little. Chance is below .3.
    assert accuracies["dense"] > 0.6
    gap = told["scores"]["accuracy"]["differences"]["sparse"]
    assert gap["mean"] == pytest.approx(accuracies["sparse"] - accuracies["dense"])
    assert gap["low"] <= gap["mean"] <= gap["high"]
    assert told["cost"]["dense"]["flops"]["total"] == 1.0
    assert 0 < told["cost"]["sparse"]["flops"]["total"] < 0.9
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert table in done.stdout
    assert f"| needle | sparse | {len(questions)} | 0 |" in table


def test_the_plugin_in_lmms_evals_own_command(task: Path, needle_url: str, tmp_path: Path) -> None:
    """Settings and frames go through `--model_args`; the video goes in the request."""
    arguments = f"base_url={needle_url},frames=32,inline=true,records_file=cost.jsonl"
    arguments += ',adaspark={"off":true}'
    done = run(
        *(LMMS / "lmms-eval", "--model", "adaspark", "--model_args", arguments),
        *("--include_path", task, "--tasks", "needle", "--batch_size", 1, "--limit", 3),
        *("--output_path", tmp_path / "out", "--log_samples"),
        folder=tmp_path,
    )
    assert re.search(r"\|needle *\|none *\| *0\|accuracy", done.stdout), done.stdout + done.stderr
    assert len(list((tmp_path / "out").rglob("*_samples_needle.jsonl"))) == 1
    costs = [json.loads(line) for line in (tmp_path / "cost.jsonl").read_text().splitlines()]
    assert len(costs) == 3
    for cost in costs:
        assert 0 < cost["prompt_tokens"] - 32 // 2 * PATCH_TOKENS < 40
        assert cost["adaspark"]["reason"] == "off"


def test_a_refused_request_is_not_a_wrong_answer(
    task: Path, needle_url: str, tmp_path: Path
) -> None:
    command = [LMMS / "python", EVAL / "compare.py", needle_url, "--tasks", "needle"]
    command += ["--include-path", task, "--limit", 2, "--out", tmp_path / "out"]
    done = run(*command, '--setting=bad={"p_attn": 7}', folder=tmp_path)
    assert done.returncode == 1
    assert "needle, question" in done.stderr and "p_attn=7" in done.stderr
    assert not (tmp_path / "out" / "comparison.md").exists()


NAMES = """
import sys
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
tasks = TaskManager("ERROR")
for name in sys.argv[1:]:
    assert name in tasks.all_tasks, f"lmms-eval has no task {name}"
    path = tasks.task_index[name]["yaml_path"]
    config = load_yaml_config(path, mode="full")  # imports what asks and scores
    for part in config["task"] if "group" in config else [name]:
        config = load_yaml_config(tasks.task_index[part]["yaml_path"], mode="full")
        assert callable(config["doc_to_visual"]), part
        assert callable(config["process_results"]), part
print("all there")
"""


def test_the_documents_tasks_are_lmms_evals(tmp_path: Path) -> None:
    """Each exists, and what it imports is installed."""
    text = (ROOT / "docs" / "evaluation.md").read_text()
    named = {name for words in re.findall(r"--tasks ([\w,]+)", text) for name in words.split(",")}
    named -= {"needle", "vnbench"}  # ours
    assert len(named) >= 7
    done = run(LMMS / "python", "-c", NAMES, *sorted(named), folder=tmp_path)
    assert done.stdout.strip().endswith("all there"), done.stdout + done.stderr
