"""The command ``tune`` from its arguments to its files, with a fake in the engine's place.

The fake is in fake_engine.py; one test runs it in a process of its own, as an engine.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import fake_engine
import pytest
import video as demo_video  # examples/demo
from video_files import encode

from vllm_adaspark.cli import main
from vllm_adaspark.tune import run
from vllm_adaspark.tune.questions import STOCK

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "needle" / "checkpoint"
PROCESS, FAKE = run.process, fake_engine.thread
GRID = ['{"p_attn": 0.6}', '{"p_attn": 0.2}', '{"method": "adatp", "flops": 0.5}']
QUESTIONS = [f"What is {n}?" for n in range(4)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Three clips, one that is none, four questions about each, and a grid."""
    folder = tmp_path_factory.mktemp("clips")
    for n in range(3):
        demo_video.write_mp4(folder / f"{n}.mp4", seconds=2, width=56, height=56, seed=n)
    (folder / "broken.mp4").write_bytes(b"\0" * 100)
    names = [*(f"{n}.mp4" for n in range(3)), "broken.mp4"]
    lines = [{"video": v, "question": q, "answer": "yes"} for v in names for q in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "grid.jsonl").write_text("\n".join(GRID))
    return folder


@pytest.fixture
def tune(clips: Path, tmp_path: Path, monkeypatch, capsys):
    """Run the command; returns its exit code, and what it printed to stdout and stderr."""
    monkeypatch.setattr(run, "process", fake_engine.thread)
    # Tests that a script started in its background were told to ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def call(*more: object, videos=clips, questions=clips / "questions.jsonl", grid="grid.jsonl"):
        arguments = [MODEL, videos, *([questions] if questions else []), "--out", tmp_path / "out"]
        arguments += ["--grid", clips / grid] if grid else []
        try:
            code = main(["tune", *map(str, [*arguments, *more])])
        except SystemExit as end:  # argparse's own refusals
            code = end.code
        return code, *capsys.readouterr()

    yield call
    signal.signal(signal.SIGINT, before)


def journal(tmp_path: Path) -> list[dict]:
    text = (tmp_path / "out" / "answers.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def started(tmp_path: Path) -> list[str]:
    return (tmp_path / "out" / "engine.log").read_text().splitlines()


def test_a_run_from_beginning_to_end(tune, tmp_path: Path) -> None:
    code, out, err = tune("--lose", "52%")  # none is sure, of so few
    assert code == 0, err
    assert "left out: broken.mp4: " in err
    assert "12 questions about 3 videos, under 4 settings: 12 times a video" in err
    assert "a first guess at the time it takes:" in err and "12 of 12" in err
    assert started(tmp_path) == ["started for adaspark", "started for adatp"]
    assert out.startswith("Take adaspark p_attn=0.2: it spends 20 % of the dense FLOPs")
    assert f"vllm-adaspark serve {MODEL} --p-attn 0.2 --max-model-len " in out
    names = [Path(line).name for line in out.splitlines()[-4:]]
    assert names == ["tune.md", "tune.json", "adaspark_config.json", "tune.png"]
    page = (tmp_path / "out" / "tune.md").read_text()
    assert "left out: broken.mp4" in page and "device: a fake" in page

    # Again: nothing is asked, and another loss may be wanted.
    code, out, err = tune("--lose", "0")
    assert code == 0 and "Keep dense" in out and "engine 1" not in err
    assert len(started(tmp_path)) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle_it_goes_on(tune, tmp_path: Path, monkeypatch, number) -> None:
    monkeypatch.setenv("FAKE_SIGNAL", str(int(number)))
    monkeypatch.setenv("FAKE_STOPS_AFTER", "5")
    code, out, err = tune()
    assert code == 130 and out == ""
    assert "stopped; 5 of 12 are answered and kept in" in err
    assert "The same command goes on:\n  vllm-adaspark tune " in err
    page = (tmp_path / "out" / "tune.md").read_text()
    assert "7 of 12 are still to come" in page
    kept = journal(tmp_path)
    with (tmp_path / "out" / "answers.jsonl").open("a") as file:
        file.write('{"contender": "den')

    monkeypatch.delenv("FAKE_STOPS_AFTER")
    code, out, err = tune()
    assert code == 0 and "of which 5 are there" in err
    lines = journal(tmp_path)
    assert lines[: len(kept)] == kept
    asked = [(line["contender"], line["video"]) for line in lines[1:]]
    assert len(asked) == len(set(asked)) == 12


def test_another_grid_or_model_in_the_same_folder(tune, clips: Path, tmp_path: Path) -> None:
    assert tune()[0] == 0
    (clips / "other.jsonl").write_text('{"p_attn": 0.4}')
    code, _, err = tune(grid="other.jsonl")
    assert code == 2 and "holds a run with another grid" in err and "another --out" in err
    code, _, err = tune("--max-tokens", "3")
    assert code == 2 and "other options (max_tokens: 32 there, 3 here)" in err
    code, _, err = tune("--dtype", "float32")
    assert code == 2 and 'other options (vllm: [] there, ["--dtype", "float32"] here)' in err


def test_another_video_of_the_same_name(tune, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for n in range(2):
        (tmp_path / "more" / "a.mp4").write_bytes((clips / f"{n}.mp4").read_bytes())
        code, _, err = tune(videos=tmp_path / "more", questions=None)
        assert code == (0, 2)[n]
    assert 'holds a run with other videos (a.mp4: "' in err and 'bytes" there, "' in err


def test_an_engine_that_fails_leaves_the_others(tune, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_FAILS", "adatp")
    code, out, err = tune("--lose", "40%")
    assert code == 0 and out.startswith("Take adaspark")
    assert "it failed: the engine did not start: no such thing" in err
    page = (tmp_path / "out" / "tune.md").read_text()
    assert "adatp flops=0.5 did not run: the engine did not start: no such thing" in page
    # A later start tries it again, and only it.
    monkeypatch.delenv("FAKE_FAILS")
    code, _, err = tune("--lose", "40%")
    assert code == 0 and "engine 1 of 1, for adatp flops=0.5" in err
    assert "did not run" not in (tmp_path / "out" / "tune.md").read_text()


def test_an_engine_is_a_process_and_what_ends_it_is_told(tune, tmp_path: Path, monkeypatch) -> None:
    """The reference's process dies, so nothing can be said, and the other one is asked."""
    monkeypatch.setattr(run, "process", PROCESS)
    monkeypatch.setattr(run, "serve", fake_engine.serve)
    monkeypatch.setenv("FAKE_DIES", "adaspark")
    code, out, err = tune()
    assert code == 1 and "Nothing can be said yet" in out
    assert "the engine's process ended with 7" in err and "engine.log ends with:" in err
    assert {line["contender"] for line in journal(tmp_path)[1:]} == {"adatp flops=0.5"}


def test_stock_questions(tune, clips: Path, tmp_path: Path) -> None:
    code, _, err = tune(questions=None)
    assert code == 0 and "9 questions about 3 videos" in err
    assert "0 of them with right answers" in (tmp_path / "out" / "tune.md").read_text()
    asked = {answer["question"] for line in journal(tmp_path)[1:] for answer in line["answers"]}
    assert asked == set(STOCK)


def test_questions_may_stand_behind_an_option(tune, clips: Path, tmp_path: Path) -> None:
    code, _, err = tune("--lose", "1%", clips / "questions.jsonl", questions=None)
    assert code == 0 and "12 questions about 3 videos" in err


def test_a_single_frame_is_left_out(tune, clips: Path, tmp_path: Path) -> None:
    """It can be read, but Qwen takes frames in pairs; the others are asked about."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.mp4").write_bytes(encode(frames=1))
    (tmp_path / "more" / "b.mp4").symlink_to(clips / "0.mp4")
    code, _, err = tune(videos=tmp_path / "more", questions=None)
    assert code == 0 and "left out: a.mp4: the video has 1 frame(s)" in err
    assert "3 questions about 1 videos" in err


def test_linked_videos_are_read_where_they_lie(tune, clips: Path, tmp_path: Path, monkeypatch):
    """vLLM allows a file by where its link leads to."""
    (tmp_path / "links").mkdir()
    for n in range(2):
        (tmp_path / "links" / f"{n}.mp4").symlink_to(clips / f"{n}.mp4")
    folders = []
    monkeypatch.setattr(run, "process", lambda job: folders.append(job.folder) or FAKE(job))
    assert tune(videos=tmp_path / "links", questions=None)[0] == 0
    assert set(folders) == {clips}


def test_a_full_disk_is_told(tune, tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_adaspark.tune.report.write", full)
    code, _, err = tune()
    assert code == 1 and "the report cannot be written: " in err and "No space left" in err


REFUSED = {
    "no videos": (dict(videos=ROOT / "docs", questions=None), (), "no videos in it"),
    "wrong line": (dict(questions="bad.jsonl"), (), "bad.jsonl, line 1: not JSON"),
    "no file": (dict(questions="none.jsonl"), (), "none.jsonl' cannot be read"),
    "method": (dict(grid=None), ("--methods", "videonsa"), "has no gates"),
    "both": ({}, ("--quick",), "--grid and --methods or --quick"),
    "setting": ({}, ("--p-attn", "0.3"), "--p-attn: settings are tried by the grid"),
    "setting as vLLM takes it": ({}, ("--p_attn", "0.3"), "--p_attn: settings are tried by the"),
    "settings in JSON": (
        {},
        ("--additional-config", '{"adaspark": {"p_attn": 0.5}}'),
        "--additional-config adaspark: settings and methods are tried by the grid",
    ),
    "model": ({}, ("--model", "x"), "--model: MODEL is the first argument"),
    "answer": ({}, ("--max-tokens", "200000"), "what fits: a shorter answer"),
    "tokens": ({}, ("--max-tokens", "0"), "--max-tokens 0: expected 1 or more"),
    "frames": ({}, ("--fps", "0"), "--fps 0: expected a number above 0"),
    "loss": ({}, ("--lose", "7"), "'7': expected a share of answers, 1% or 0.01"),
    "unreadable": (dict(videos="broken.mp4", questions=None), (), "none of the 1 videos can be"),
}


@pytest.mark.parametrize("how, more, words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_before_an_engine_starts(
    tune, clips: Path, tmp_path: Path, how: dict, more: tuple, words: str
) -> None:
    (clips / "bad.jsonl").write_text("{\n")
    how = {k: clips / v if k != "grid" and isinstance(v, str) else v for k, v in how.items()}
    code, _, err = tune(*more, **how)
    assert code == 2 and words in err
    assert not (tmp_path / "out" / "engine.log").exists()
