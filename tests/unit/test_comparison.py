"""examples/eval/: what is read from lmms-eval's results, and tasks of one's own."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

EVAL = Path(__file__).resolve().parents[2] / "examples" / "eval"


def load(name: str):
    """A module of that folder, under a name that no other folder's has."""
    unique = f"examples_eval_{name}"
    if unique not in sys.modules:
        spec = importlib.util.spec_from_file_location(unique, EVAL / f"{name}.py")
        sys.modules[unique] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[unique])
    return sys.modules[unique]


def account(share: float, dense: float) -> dict:
    parts = ("attention", "ffn", "total")
    return {
        "flops": {
            "dense": dict.fromkeys(parts, dense),
            "executed": dict.fromkeys(parts, share * dense),
        }
    }


def sample(doc_id: int, score, text: str = "A") -> dict:
    return {"doc_id": doc_id, "filtered_resps": [text], "accuracy": score}


def record(doc_id: int, adaspark=None, error=None, tokens: int = 100) -> dict:
    cost = {"prompt_tokens": tokens, "adaspark": adaspark, "error": error}
    return {"task": "quiz", "doc_id": doc_id, **cost}


def make_run(name: str, scores: list, share: float, texts: str = "AAAA"):
    return load("comparison").Run(
        name,
        {"quiz": {"accuracy": (float(np.mean(scores)), 0.1)}},
        {"quiz": [sample(at, score, texts[at]) for at, score in enumerate(scores)]},
        [record(at, account(share, 10.0**at)) for at in range(len(scores))],
    )


# -- scores -------------------------------------------------------------------------------------


def test_metrics_with_their_errors_and_groups() -> None:
    results = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_stderr_clt,none": 1},
            "b": {"alias": "b", "acc,none": 0.7, "acc_stderr,none": "N/A", "note,none": "x"},
            "both": {"alias": "both", " ": " "},
        },
        "group_subtasks": {"both": ["a", "b"], "a": [], "b": []},
    }
    assert load("comparison").metrics_of(results) == {
        "a": {"acc": (0.5, 0.1)},
        "b": {"acc": (0.7, None)},
        "both": {"acc": (pytest.approx(0.6), None)},
    }


@pytest.mark.parametrize(
    "value, score",
    [
        (1, 1.0),
        (True, 1.0),
        ({"score": 0.5, "pred_answer": "A", "answer": "A"}, 0.5),  # videomme, mvbench
        ({"pred_answer": "A", "answer": "B"}, 0.0),  # mlvu
        ({"parsed_pred": "B", "answer": "B"}, 1.0),  # longvideobench
        ({"a video>>>a caption>>>(0, 3)": "0 - 3"}, None),  # charades
        ("A", None),
    ],
)
def test_score_of_a_question(value, score) -> None:
    assert load("comparison").score_of(value) == score


def test_the_interval_holds_the_mean_and_narrows() -> None:
    comparison = load("comparison")
    few, many = np.array([0.0, 1.0, -1.0, 1.0]), np.tile([0.0, 1.0, -1.0, 1.0], 100)
    (low, high), (low2, high2) = comparison.interval(few), comparison.interval(many)
    assert low < 0.25 < high and low2 < 0.25 < high2
    assert high2 - low2 < (high - low) / 5
    # The mean of n values has a standard error of their deviation over the root of n.
    assert high2 - low2 == pytest.approx(2 * 1.96 * many.std() / 20, rel=0.1)


# -- runs side by side --------------------------------------------------------------------------


def test_two_runs_side_by_side() -> None:
    comparison = load("comparison")
    dense = make_run("dense", [1, 1, 0, 1], share=1.0)
    sparse = make_run("sparse", [1, 0, 0, 1], share=0.4, texts="AABA")
    told = comparison.compare([dense, sparse])
    quiz = told["tasks"]["quiz"]
    gap = quiz["scores"]["accuracy"]["differences"]["sparse"]
    assert (gap["mean"], gap["n"]) == (-0.25, 4)
    assert quiz["same_answers"] == {"sparse": 0.75}
    # FLOPs are added up before they are divided: a long video counts for more.
    assert quiz["cost"]["sparse"]["flops"]["total"] == pytest.approx(0.4)
    json.dumps(told)  # or it raises: comparison.json holds this
    table = comparison.markdown(told)
    assert "| quiz | accuracy | 0.750 ± 0.100 | 0.500 ± 0.100 | -25.0 (" in table
    assert "| quiz | sparse | 4 | 0 | 100 | 40.0% | 40.0% | 40.0% | 75.0% |" in table


def test_questions_are_paired_by_their_number() -> None:
    comparison = load("comparison")
    dense, sparse = make_run("dense", [1, 0], 1.0), make_run("sparse", [1, 0], 0.4)
    sparse.samples["quiz"].reverse()
    assert comparison.differences(dense, sparse, "quiz", "accuracy").tolist() == [0, 0]
    del sparse.samples["quiz"][0]
    assert comparison.differences(dense, sparse, "quiz", "accuracy").tolist() == [0]


def test_failures_and_servers_without_accounts() -> None:
    comparison = load("comparison")
    records = [record(0), record(1, error="quiz, question 1: too long", tokens=0)]
    run = comparison.Run("stock", {"quiz": {"accuracy": (1.0, None)}}, {"quiz": []}, records)
    assert comparison.cost(run, "quiz") == {
        "questions": 2,
        "failed": 1,
        "prompt_tokens": 100,
        "flops": None,
    }
    table = comparison.markdown(comparison.compare([run, run]))
    assert "| quiz | stock | 2 | 1 | 100 | – | – | – | – |" in table


# -- tasks of one's own -------------------------------------------------------------------------


def vnbench(folder: Path, **changes) -> Path:
    (folder / "v.mp4").write_bytes(b"video")
    entry = {"video": "v.mp4", "question": "What?", "options": ["a", "b", "c", "d"], "gt": "c"}
    entries = [{**entry, "type": "ret_edit1", "try": n, **changes} for n in range(4)]
    path = folder / "annotations.json"
    path.write_text(json.dumps(entries))
    return path


def test_vnbench_as_a_task(tmp_path: Path) -> None:
    made = load("make_vnbench_task").write(vnbench(tmp_path), tmp_path, tmp_path / "task")
    config = (made / "vnbench.yaml").read_text()
    assert "aggregation: !function utils.aggregate" in config
    doc = json.loads((made / "questions.jsonl").read_text().splitlines()[0])
    utils = load("vnbench_utils")
    assert (made / "utils.py").read_text() == (EVAL / "vnbench_utils.py").read_text()
    assert utils.doc_to_visual(doc) == [str(tmp_path / "v.mp4")]
    asked = "What?\nA. a\nB. b\nC. c\nD. d\nAnswer with the option's letter"
    assert utils.doc_to_text(doc).startswith(asked)
    assert utils.process_results(doc, ["C. c"])["one_try"] == 1.0
    assert utils.process_results(doc, ["b"])["one_try"] == 0.0


def test_vnbench_wants_all_four_tries_right() -> None:
    def tries(kind: str, video: str, *scores: float) -> list[dict]:
        return [{"type": kind, "video": video, "score": score} for score in scores]

    results = tries("ret", "1", 1, 1, 1, 1) + tries("ret", "2", 1, 1, 0, 1)
    results += tries("cnt", "3", 1, 1, 1, 1)
    assert load("vnbench_utils").aggregate(results) == pytest.approx((0.5 + 1) / 2)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"gt": "e"}, ["entry 0", "gt='e'", "one of four options"]),
        ({"options": ["c"]}, ["entry 0", "four options"]),
    ],
)
def test_vnbench_annotations_that_are_not(tmp_path: Path, changes, words) -> None:
    with pytest.raises(ValueError) as caught:
        load("make_vnbench_task").read(vnbench(tmp_path, **changes), tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_a_question_without_its_video(tmp_path: Path) -> None:
    path = vnbench(tmp_path, video="gone.mp4")
    with pytest.raises(FileNotFoundError, match=r"gone\.mp4"):
        load("make_vnbench_task").write(path, tmp_path, tmp_path / "task")


def test_needle_videos_as_a_task(tmp_path: Path) -> None:
    module = load("make_needle_task")
    module.write(tmp_path, videos=2, patches=24, motion="busy")
    lines = (tmp_path / "questions.jsonl").read_text().splitlines()
    questions = [json.loads(line) for line in lines]
    seeds = {int(path.stem) for path in tmp_path.glob("*.mp4")}
    assert len(seeds) == 2 and seeds <= set(module.scenes.HELD_OUT_SEEDS[5000:5002])
    assert {question["video"] for question in questions} == {f"{seed}.mp4" for seed in seeds}
    utils = load("needle_utils")
    first = questions[0]
    assert Path(utils.doc_to_visual(first)[0]).is_file()
    assert utils.process_results(first, [f"{first['answer']} "]) == {"accuracy": 1, "basic": 1}
    assert utils.process_results(first, ["none"]) == {"accuracy": 0, "basic": 0}


def test_install_wants_a_virtual_environment_folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine.txt").touch()
    monkeypatch.setattr(sys, "argv", ["install.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="not empty"):
        load("install").main()
    assert (tmp_path / "mine.txt").exists()
