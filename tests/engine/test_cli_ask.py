"""``vllm-adaspark ask`` with a real engine: answers, accounts, comparison, picture."""

from __future__ import annotations

import base64
import json
import re

import pytest
import variable_rate
import video as demo_video  # examples/demo
from PIL import Image

import engine.engines  # noqa: F401, sets the environment of engines in this process
from vllm_adaspark.accounts.cost import Sampling, Video, cost, read_model
from vllm_adaspark.cli import main
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig

pytestmark = pytest.mark.engine

SECONDS, FPS, SIZE = 24, 8, 224
VIDEO_TOKENS = 24 * 8 * 8  # of pairs of frames, two a second


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
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
        assert run["account"]["video_tokens"] == told["cost"]["video_tokens"] == VIDEO_TOKENS
        *parts, total = (run["seconds"][k] for k in ("read", "prefill", "answer", "total"))
        assert min(parts) > 0 and sum(parts) == pytest.approx(total)
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
    text = (
        sparse["prompt_tokens"] + 5 - VIDEO_TOKENS
    )  # the last of the answer's tokens is not computed
    video = Video(SECONDS * FPS, FPS, SIZE, SIZE)
    counted = cost(model, video, AdaSparkConfig(), Sampling(), text_tokens=text)
    measured = sparse["account"]["flops"]["dense"]["total"]
    assert counted.dense_flops == pytest.approx(measured, rel=1e-6)


def test_shows_answer_cost_and_picture(ask, tmp_path):
    """A budget, smaller frames; what is being done goes to stderr."""
    picture = tmp_path / "heat.png"
    code, out, err = ask(
        "--flops", "0.6", "--max-pixels", "40000", "--fps", "2", "--picture", str(picture)
    )
    assert code == 0, err
    assert "starting the engine\n" in err and "Processed prompts: 100%" in err
    # 48 frames of 196 x 196 pixels: 24 x 7 x 7 tokens.
    assert 1176 < int(re.search(r"^prompt tokens +([\d,]+)$", out, re.M)[1].replace(",", "")) < 1240
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
    assert code == 2 and "--max-model-len 100: the prompt has about 1600 tokens" in err
    code, _, err = ask("--media-io-kwargs", '{"video": {"fps": 3}}')
    assert code == 2 and "video.fps=3: use --fps" in err

    data = clip.read_bytes()
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(data[:start] + bytes(end - start) + data[end:])
    code, _, err = ask(video=damaged)
    assert code == 2 and "none of the video's 192 frames could be decoded" in err
    code, _, err = ask("--media-io-kwargs", '{"video": {"bogus": 3}}')
    assert code == 1 and "media_io_kwargs.video.bogus=3: unknown" in err

    code, _, err = ask("--kv-offloading-size", "1")
    assert code == 1
    assert "the engine did not start: AdaSpark does not support --kv-transfer-config" in err
    code, _, err = ask("--flops", "0.01")
    assert code == 1 and "flops=0.01 cannot be met" in err


def test_finds_a_card_in_a_video_of_variable_rate(tmp_path, capsys, monkeypatch):
    """As a data URL, with the weights that can read; test_needle_model.py asks for every card."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    data = base64.b64encode(variable_rate.write(tmp_path / "clip.mp4").read_bytes()).decode()
    question, digit = list(variable_rate.QUESTIONS.items())[-1]
    command = ["ask", f"data:video/mp4;base64,{data}", question]
    command += ["--model", str(variable_rate.CHECKPOINT), "--max-tokens", "4"]
    options = ["--enforce-eager", "--dtype", "float32", "--gpu-memory-utilization", "0.3"]
    assert main([*command, *options]) == 0
    said = capsys.readouterr()
    assert said.out.split()[0] == digit
    assert "variable rate" in said.err
