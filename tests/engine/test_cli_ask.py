"""``vllm-adaspark ask`` with a real engine: answers, progress, accounts, comparison, picture."""

from __future__ import annotations

import json
import re

import pytest
import variable_rate
import video as demo_video  # examples/demo
from PIL import Image

import engine.engines  # noqa: F401, sets the environment of engines in this process
from vllm_adaspark.cli import main
from vllm_adaspark.config import AdaSparkConfig
from vllm_adaspark.cost import Sampling, Video, cost, read_model

pytestmark = pytest.mark.engine

SECONDS, FPS, SIZE = 60, 8, 224


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Of 3840 tokens: two chunks."""
    path = tmp_path_factory.mktemp("ask") / "clip.mp4"
    return demo_video.write_mp4(path, seconds=SECONDS, fps=FPS, width=SIZE, height=SIZE)


@pytest.fixture
def ask(checkpoint, clip, capsys, monkeypatch):
    """The command about the clip: (exit code, stdout, stderr)."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")

    def ask(*arguments, question="Which digit is shown?", video=clip):
        common = ["--model", str(checkpoint), "--enforce-eager", "--dtype", "float32"]
        common += ["--gpu-memory-utilization", "0.3"]  # on a CPU: memory that must be free
        code = main(["ask", str(video), question, *common, "--max-tokens", "6", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return ask


def test_compares_sparse_with_dense(ask, checkpoint):
    code, out, _ = ask("--p", "0.5", "--dense-below", "2", "--dense", "--json")
    assert code == 0
    told = json.loads(out[out.index("{") :])
    sparse, dense = told["runs"]["sparse"], told["runs"]["dense"]
    for run in (sparse, dense):
        assert run["tokens"] == 6 and run["answer"]
        # The estimate of the video's tokens is what the processor made of it.
        assert run["account"]["video_tokens"] == told["cost"]["video_tokens"] == 3840
        assert set(run["seconds"]) == {"prepare", "encode", "prefill", "answer", "total"}
        assert run["seconds"]["encode"] > 0 and run["seconds"]["prefill"] > 0
    assert dense["account"]["mode"] == "dense" and dense["account"]["flops_ratio"] == 1
    assert dense["account"]["attention_density"] == dense["account"]["ffn_density"] == 1
    assert sparse["account"]["mode"] == "sparse"
    assert sparse["account"]["flops_ratio"] < 0.8
    assert 0.2 < sparse["account"]["ffn_density"] < 0.55
    # Both runs computed the whole prompt: the second shares no video block with the first.
    assert dense["account"]["cached_tokens"] < 64
    assert sparse["account"]["flops"]["dense"]["total"] == pytest.approx(
        dense["account"]["flops"]["dense"]["total"], rel=0.01
    )
    # Dense FLOPs as inspect counts them, once it is told the true length.
    model = read_model("m", lambda name: p if (p := checkpoint / name).exists() else None)
    text = sparse["prompt_tokens"] + 5 - 3840  # the last of the answer's tokens is not computed
    video = Video(SECONDS * FPS, FPS, SIZE, SIZE)
    counted = cost(model, video, AdaSparkConfig(), Sampling(), text_tokens=text)
    measured = sparse["account"]["flops"]["dense"]["total"]
    assert counted.dense_flops == pytest.approx(measured, rel=1e-6)


def test_shows_progress_answer_and_picture(ask, tmp_path):
    """A budget, smaller frames, plain progress lines where there is no terminal."""
    picture = tmp_path / "heat.png"
    code, out, err = ask(
        "--flops", "0.6", "--max-pixels", "40000", "--fps", "1", "--picture", str(picture)
    )
    assert code == 0, err
    # 60 frames of 196 x 196 pixels: 30 x 7 x 7 tokens of 4 patches.
    for line in (
        r"^decode: \d+ frames in ",
        r"^start: [\d.]+ s",
        r"^prepare: 60 frames in ",
        r"^encode: 5,880 patches in ",
        r"^prefill: 1,4\d\d tokens in ",
        r"^answer: 6 tokens in ",
    ):
        assert re.search(line, err, re.MULTILINE), (line, err)
    share = float(re.search(r"^FLOPs of dense +([\d.]+)%", out, re.MULTILINE)[1])
    assert share == pytest.approx(60, abs=5)
    assert f"picture: {picture}" in out
    with Image.open(picture) as image:
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 24)) > 100


def test_says_why_it_failed(ask, clip, tmp_path):
    """Before the engine starts, while it starts, and once it runs."""
    code, _, err = ask("--frobnicate", "3")
    assert code == 2 and "vLLM's options: unrecognized arguments: --frobnicate" in err
    code, _, err = ask("--max-model-len", "100")
    assert code == 2 and "--max-model-len 100: the prompt has about 3904 tokens" in err
    code, _, err = ask("--media-io-kwargs", '{"video": {"fps": 3}}')
    assert code == 2 and "video.fps=3: use --fps" in err

    data = clip.read_bytes()
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(data[:start] + bytes(end - start) + data[end:])
    code, _, err = ask(video=damaged)
    assert code == 2 and "none of the video's 480 frames could be decoded" in err
    code, _, err = ask("--media-io-kwargs", '{"video": {"bogus": 3}}')
    assert code == 1 and "media_io_kwargs.video.bogus=3: unknown" in err

    code, _, err = ask("--enable-lora")
    assert code == 1
    assert "the engine did not start: AdaSpark does not support --enable-lora" in err
    code, _, err = ask("--flops", "0.01")
    assert code == 1 and "flops=0.01 cannot be met" in err


def test_prefill_is_watched_chunk_by_chunk(ask, monkeypatch):
    from vllm_adaspark.cli.progress import Progress

    seen: dict[str, list[tuple[int, int | None]]] = {}
    move = Progress.to

    def watched(self, position, total=None):
        move(self, position, total)
        seen.setdefault(self.title, []).append((self.at, self.total))

    monkeypatch.setattr(Progress, "to", watched)
    assert ask("--p", "0.6")[0] == 0
    assert seen["prefill"][0][0] == 2048 and seen["prefill"][-1][0] == seen["prefill"][-1][1]
    assert len(seen["encode"]) >= 4 and seen["encode"][-1] == (15360, 15360)
    assert seen["encode"][0][0] < 15360
    # Of 8 frames a second 2 are taken, and what must be decoded for them is decoded.
    decoded, to_decode = seen["decode"][-1]
    assert 120 <= decoded == to_decode <= 480
    assert [at for at, _ in seen["answer"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("question", variable_rate.QUESTIONS)
def test_finds_a_card_wherever_it_is_in_a_video_of_variable_rate(
    question, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    clip = variable_rate.write(tmp_path / "clip.mp4")
    command = ["ask", str(clip), question, "--model", str(variable_rate.CHECKPOINT)]
    options = ["--enforce-eager", "--dtype", "float32", "--gpu-memory-utilization", "0.3"]
    assert main([*command, *options, "--max-tokens", "4"]) == 0
    said = capsys.readouterr()
    assert said.out.split()[0] == variable_rate.QUESTIONS[question]
    assert "variable rate" in said.err
