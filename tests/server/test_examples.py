"""The examples, run as a user runs them: as processes, against the server or offline."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import checkpoint as demo_checkpoint  # examples/demo
import pytest
import video as demo_video  # examples/demo
from serving import Served
from webserver import serve_folder

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SECONDS = 600  # a client takes two, the offline batch twenty

pytestmark = pytest.mark.server


def run(name: str, *arguments: object, **env: str) -> subprocess.CompletedProcess:
    program = ["sh"] if name.endswith(".sh") else [sys.executable]
    return subprocess.run(
        [*program, str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, **env},
    )


@pytest.fixture(scope="module")
def web(media: Path):
    with serve_folder(media) as url:
        yield url


@pytest.fixture
def client(served: Served):
    """Runs a client example against the server and remembers the ids it caused."""

    def ask(name: str, *arguments: object, url: str = served.server.url) -> str:
        done = run(name, *arguments, "--base-url", f"{url}/v1", "--max-tokens", 16)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return ask


# -- one question -------------------------------------------------------------------------------


def test_openai_client_sends_a_file_its_path_or_a_url(
    served: Served, media: Path, web: str, client
) -> None:
    clip = media / "clip.mp4"
    expected = served.ask(clip.as_uri()).text
    ways = [
        (clip,),
        (clip, "--by-path"),
        (f"{web}/clip.mp4",),
        (clip, "--decoder", "adaspark_decord"),
    ]
    if not have("decord"):
        ways.pop()
    for video, *options in ways:
        printed = client("openai_client.py", video, "What happens?", *options)
        assert printed.startswith(f"{expected}\n"), options
        assert "316 prompt tokens, 16 of answer" in printed


def have(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def test_openai_client_sets_the_requests_options(media: Path, client) -> None:
    clip = media / "clip.mp4"
    printed = {
        options: client("openai_client.py", clip, "What happens?", *options)
        for options in (
            (),
            ("--p-attn", "0.1", "--p-ffn", "0.1"),
            ("--fps", "1"),
            ("--max-frames", "8"),
            ("--max-pixels", str(84 * 84)),
        )
    }
    tokens = [int(re.search(r"(\d+) prompt tokens", text)[1]) for text in printed.values()]
    # 16 of text; 30 a pair of frames, of which there are ten, or 6 of a small one.
    assert tokens == [316, 316, 166, 136, 76]


def test_openai_client_tells_the_cost(media: Path, client) -> None:
    """As the server's HTTP plugin puts it into the usage."""

    def share(*options: str) -> float:
        printed = client("openai_client.py", media / "clip.mp4", "What happens?", *options)
        return float(re.search(r"AdaSpark: .*, ([\d.]+)% of the dense FLOPs", printed)[1])

    assert share("--off") == 100
    assert share("--p-attn", "0.1", "--p-ffn", "0.1") < share() < 100
    assert share("--flops", "0.9") < 95


def test_clients_say_what_is_wrong(served: Served, media: Path) -> None:
    at = ("--base-url", f"{served.server.url}/v1")
    wrong = {
        "no such file": (media / "missing.mp4", "What?", *at),
        "p_attn=3": (media / "clip.mp4", "What?", "--p-attn", "3", *at),
        "no answer from the server": (
            media / "clip.mp4",
            "What?",
            "--base-url",
            "http://127.0.0.1:9",
        ),
    }
    for words, arguments in wrong.items():
        for name in ("openai_client.py", "many_questions.py"):
            done = run(name, *arguments)
            assert done.returncode == 1 and words in done.stderr
            assert "Traceback" not in done.stderr
    done = run("many_questions.py", media / "clip.mp4", *at)
    assert done.returncode == 2 and "no question" in done.stderr


def test_curl(served: Served, media: Path, web: str) -> None:
    expected = served.ask((media / "clip.mp4").as_uri(), max_tokens=16).text
    base = {"BASE_URL": f"{served.server.url}/v1", "MAX_TOKENS": "16"}
    for arguments in (
        (media / "clip.mp4", "What happens?"),
        (f"{web}/clip.mp4", "What happens?"),
        (media / "clip.mp4", "What happens?", '{"p_attn": 0.6}'),
        (media / "clip.mp4", 'A "quoted" question with a \\ in\ntwo lines?'),
    ):
        done = run("curl.sh", *arguments, **base)
        assert done.returncode == 0, done.stderr
        text = json.loads(done.stdout)["choices"][0]["message"]["content"]
        assert (text == expected) == (arguments[1] == "What happens?")
    done = run("curl.sh", media / "clip.mp4", "What?", '{"p_attn": 3}', **base)
    assert done.returncode != 0 and "p_attn=3" in done.stdout
    done = run("curl.sh", media / "missing.mp4", "What?", **base)
    assert done.returncode == 1 and "cannot be read" in done.stderr
    assert run("curl.sh").returncode == 2


@pytest.mark.parametrize(
    "name", ["openai_client.py", "many_questions.py", "offline_batch.py", "curl.sh"]
)
def test_help(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 5


# -- many questions -----------------------------------------------------------------------------


def test_many_questions_reuse_the_video(media: Path, tmp_path: Path, client) -> None:
    """The whole KV blocks of the clip are cached from the second question on."""
    demo_video.write_mp4(tmp_path / "new.mp4", seconds=10, width=168, height=140, seed=7)
    questions = tmp_path / "questions.txt"
    questions.write_text("Who moves?\n\nWhich number is shown?\n")
    printed = client(
        "many_questions.py", tmp_path / "new.mp4", "What happens?", "--questions", questions
    )
    rows = re.findall(r"^ ?\d+ +(\d+) +(\d+) +([\d.]+) s +([\d.]+) s  (.*)$", printed, re.MULTILINE)
    assert [row[4] for row in rows] == ["What happens?", "Who moves?", "Which number is shown?"]
    cached = [int(row[1]) for row in rows]
    assert cached == [0, 256, 256], "four blocks of 64 hold 256 of the video's 300 tokens"
    assert printed.count("→ ") == 3
    total = sum(int(row[0]) for row in rows[1:])
    assert f"512 of their {total} prompt tokens ({512 / total:.0%}) were cached" in printed


# -- a folder, offline --------------------------------------------------------------------------


@pytest.mark.engine
def test_offline_batch(tmp_path: Path) -> None:
    pytest.importorskip("qwen_vl_utils")
    pytest.importorskip("decord")  # what qwen-vl-utils reads with
    checkpoint = demo_checkpoint.build(tmp_path / "checkpoint", dtype="float32", seed=3)
    folder = tmp_path / "videos"
    for seed, name in enumerate(("one.mp4", "two.mp4", "three.mp4")):
        demo_video.write_mp4(folder / name, seconds=6, width=168, height=140, seed=seed)
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "notes.txt").write_text("not a video")
    arguments = [folder, "What happens?", "--model", checkpoint, "--max-tokens", 8, "--batch", 2]
    arguments += ["--max-model-len", 4096, "--p-attn", 0.5, "--p-ffn", 0.5]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    env |= {"VLLM_CPU_CI_ENV": "1"}  # Dynamo's graph; test_scheduling.py has Inductor's

    done = run("offline_batch.py", *arguments, **env)
    assert done.returncode == 1 and "1 of 4 videos failed" in done.stderr, done.stderr
    lines = {line["video"]: line for line in map(json.loads, (folder / "answers.jsonl").open())}
    assert set(lines) == {"one.mp4", "two.mp4", "three.mp4", "bad.mp4"}
    assert lines.pop("bad.mp4").keys() == {"video", "error"}
    for line in lines.values():
        assert line["answer"] and line["prompt_tokens"] > 500
        assert line["cost"]["flops_ratio"] < 1 and 0.2 < line["cost"]["ffn_density"] < 0.6
    assert len({line["answer"] for line in lines.values()}) > 1

    (folder / "bad.mp4").unlink()
    done = run("offline_batch.py", *arguments, **env)
    assert done.returncode == 0 and "0 videos to ask about, 3 done before" in done.stdout


def test_offline_batch_says_what_is_wrong(tmp_path: Path) -> None:
    for words, arguments in {
        "no such folder": (tmp_path / "none", "What?", "--model", "m"),
        "no video in it": (tmp_path, "What?", "--model", "m"),
    }.items():
        done = run("offline_batch.py", *arguments)
        assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
