"""``vllm-adaspark analyze``: its numbers against Hugging Face's modules, its files, its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import video as demo_video  # examples/demo

from engine.engines import VIDEO, chat
from engine.twin import TwinModel
from vllm_adaspark.analysis.measure import Prompt
from vllm_adaspark.analysis.study import StudyError, _queries
from vllm_adaspark.cli import main
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.video.load import VideoLoader

pytestmark = pytest.mark.engine
pytest.importorskip("matplotlib")

QUESTION = "Which number is shown on the card?"
QUERIES = 8
PICTURES = ("attention_mass", "ffn_change", "selection_ratio", "case")
SECONDS = 600  # it takes thirty


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("analyze") / "clip.mp4"
    return demo_video.write_mp4(path, seconds=16, width=168, height=140)


@pytest.fixture(scope="module")
def out(checkpoint, clip: Path) -> Path:
    """The folder that one run has filled."""
    folder = clip.parent / "out"
    command = ["analyze", "--model", checkpoint, "--video", clip, "--question", QUESTION]
    command += ["--out", folder, "--p", "0.5,0.8,1", "--queries", QUERIES]
    command += ["--dense-below", 2, "--min-cubes", 1]
    code = "import sys; from vllm_adaspark.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, command), "--dtype", "float32"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert done.returncode == 0, done.stderr
    names = [Path(line).name for line in done.stdout.splitlines()]
    assert names == [*(f"{name}.png" for name in PICTURES), "analysis.json"]
    return folder


@pytest.fixture(scope="module")
def numbers(out: Path) -> dict:
    return json.loads((out / "analysis.json").read_text())


# -- numbers ------------------------------------------------------------------------------------


@torch.inference_mode()
def dense_layers(checkpoint, clip: Path):
    """(is_video, per layer: attention probabilities ``[heads, n, n]``, stream before and after)."""
    twin = TwinModel(checkpoint, AdaSparkConfig())
    video = VideoLoader.load_bytes(clip.read_bytes())
    x, positions, is_video = twin._prompt(chat(VIDEO, QUESTION), video)
    cos, sin = twin.text.rotary_emb(x[None], positions[:, None])
    later = torch.ones(len(x), len(x)).triu(1).bool()
    layers = []
    for layer in twin.text.layers:
        attention = layer.self_attn
        normed = layer.input_layernorm(x)
        q, k, v = (
            projection(normed).unflatten(-1, (-1, attention.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = twin._rotate(q, k, cos, sin)
        k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], 1) for y in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * attention.scaling
        probs = scores.masked_fill(later, float("-inf")).softmax(-1)
        x = x + attention.o_proj(torch.einsum("hqk,khd->qhd", probs, v).flatten(1))
        before = x
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        layers.append((probs, before, x))
    return is_video, layers


@pytest.fixture(scope="module")
def direct(checkpoint, clip: Path):
    return dense_layers(checkpoint, clip)


def held(weights: torch.Tensor, mass: float) -> float:
    """Smallest share of the entries that holds so much of the sum."""
    ordered = weights.sort(descending=True).values.double()
    return (int((ordered.cumsum(0) < mass * ordered.sum()).sum()) + 1) / len(ordered)


def test_tokens_and_cubes_are_counted(numbers: dict, direct) -> None:
    is_video, _ = direct
    assert numbers["question"] == QUESTION
    assert numbers["tokens"] == {"all": len(is_video), "video": int(is_video.sum())}
    blocks = is_video[: len(is_video) // 64 * 64].view(-1, 64).all(1)
    assert (numbers["cubes"], numbers["block_size"]) == (int(blocks.sum()), 64)
    assert numbers["queries"]["video"] == QUERIES and 0 < numbers["queries"]["question"] <= QUERIES
    assert [layer["layer"] for layer in numbers["layers"]] == [0, 1, 2, 3]


def test_attention_mass_is_that_of_the_model(numbers: dict, direct) -> None:
    is_video, layers = direct
    prompt = Prompt(is_video, 64)
    queries = prompt.queries(QUERIES, least_cubes=4)
    for number, (probs, _, _) in enumerate(layers):
        for kind, at in queries.items():
            told = numbers["layers"][number]["attention"][kind]
            for mass in numbers["masses"]:
                tokens, cubes = [], []
                for token in at.tolist():
                    own = token // 64
                    for row in probs[:, token]:
                        tokens.append(held(row[: token + 1], mass))
                        by_block = row[: own * 64].view(-1, 64).sum(1)
                        cubes.append(held(by_block[prompt.cubes[:own]], mass))
                assert told["tokens"][str(mass)]["mean"] == pytest.approx(np.mean(tokens), abs=2e-3)
                # One of a dozen cubes may stand on the edge of a mass.
                assert told["cubes"][str(mass)]["mean"] == pytest.approx(np.mean(cubes), abs=4e-3)


def test_ffn_change_is_that_of_the_model(numbers: dict, direct) -> None:
    is_video, layers = direct
    for number, (_, before, after) in enumerate(layers):
        ratio = after.norm(dim=1) / before.norm(dim=1)
        cosine = torch.nn.functional.cosine_similarity(before, after)
        for kind, who in (("video", is_video), ("text", ~is_video)):
            told = numbers["layers"][number]["ffn"][kind]
            for name, values in (("norm_ratio", ratio[who]), ("cosine", cosine[who])):
                assert told[name]["mean"] == pytest.approx(float(values.mean()), rel=1e-3)
                assert told[name]["p50"] == pytest.approx(float(values.quantile(0.5)), rel=1e-3)
                assert told[name]["std"] == pytest.approx(float(values.std()), rel=0.05)


def test_selection_grows_with_p(numbers: dict) -> None:
    runs = numbers["selection"]
    assert [run["p"] for run in runs] == [0.5, 0.8, 1.0]
    for key in ("attention_density", "ffn_density", "flops_ratio"):
        values = [run[key] for run in runs]
        assert values == sorted(values) and values[0] < 0.9
    assert runs[2]["flops_ratio"] == 1.0
    for run in runs:
        for key, values in run["layers"].items():
            assert len(values) == 4 and np.mean(values) == pytest.approx(run[key])


# -- files --------------------------------------------------------------------------------------


def test_pictures_show_something(out: Path) -> None:
    for name in PICTURES:
        picture = cv2.imread(str(out / f"{name}.png"))
        height, width = picture.shape[:2]
        assert height >= 300 and width >= 800
        drawn = (picture < 250).any(2)
        assert 0.01 < drawn.mean() < 0.99
        # Drawn on left and right, above and below, and in colour.
        for part in (*np.array_split(drawn, 3, axis=0), *np.array_split(drawn, 3, axis=1)):
            assert part.any()
        assert (picture.max(2).astype(int) - picture.min(2) > 60).mean() > 0.002


# -- errors -------------------------------------------------------------------------------------


def analyze(capsys, *arguments: object) -> tuple[int, str]:
    try:
        code = main(["analyze", *map(str, arguments)])
    except SystemExit as end:  # argparse's own refusals
        code = end.code
    return code, capsys.readouterr().err


@pytest.fixture
def good(clip: Path, checkpoint, tmp_path: Path) -> list:
    asked = ["--model", checkpoint, "--video", clip, "--question", QUESTION]
    return [*asked, "--out", tmp_path / "out"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--p", "0.5,x"), ["--p 0.5,x", "above 0 and at most 1"]),
        (("--p", "0"), ["--p 0", "above 0 and at most 1"]),
        (("--p", ""), ["--p", "above 0 and at most 1"]),
        (("--queries", 0), ["--queries 0", "1 or more"]),
        (("--question", " "), ["--question is empty"]),
        (("--cube", "4,4"), ["--cube", "'4,4'", "T,H,W"]),
        (("--cube", "a"), ["--cube", "'a'", "T,H,W"]),
        (("--min-cubes", 99), ["min_cubes=99"]),
        (("--dense-below", -1), ["dense_below=-1"]),
        (("--video", "missing.mp4"), ["missing.mp4", "no such file"]),
        (("--model", "missing"), ["missing", "no such folder"]),
        (("--fps", 0), ["--fps 0"]),
        (("--tensor-parallel-size", 2), ["--tensor-parallel-size 2", "leave it out"]),
    ],
)
def test_wrong_arguments(capsys, good, arguments, words) -> None:
    code, said = analyze(capsys, *good, *arguments)
    assert code == 2
    for word in words:
        assert word in said


def test_out_is_a_file(capsys, good, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    code, said = analyze(capsys, *good, "--out", tmp_path / "taken")
    assert code == 2 and "--out" in said and "taken" in said


def test_without_matplotlib(capsys, good, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, said = analyze(capsys, *good)
    assert code == 1 and "pip install 'vllm-adaspark[analyze]'" in said


def test_a_video_too_short_to_choose_in() -> None:
    is_video = torch.zeros(200, dtype=torch.bool)
    is_video[10:180] = True
    with pytest.raises(StudyError, match="more frames"):
        _queries(Prompt(is_video, 64), 8)
