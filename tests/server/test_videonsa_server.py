"""A real VideoNSA server, of the shipped needle checkpoint: client, usage, refusals, viewer."""

from __future__ import annotations

import json
import urllib.request

import footage
import openai
import pytest
import torch
import warm
from browser import Page, find_browser
from evaluate import held_out_video
from needle import NEEDLE  # benchmarks
from server import VllmServer  # examples/demo
from serving import ANSWER_SECONDS, PROGRAM, SERVER_ENV, START_SECONDS, Served, mm
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from vllm_adaspark.traces import reader

pytestmark = pytest.mark.server
CHECKPOINT = NEEDLE / "videonsa"
BRANCHES = ("cmp", "slc", "swa")
PATCHES = 96  # of 16 tokens: more blocks than a token selects
CLOSE = 1e-3  # of log-probabilities in float32


@pytest.fixture(scope="module")
def video():
    return held_out_video(4, PATCHES)


@pytest.fixture(scope="module")
def clip(video, tmp_path_factory) -> str:
    """Where the server finds the video."""
    path = tmp_path_factory.mktemp("media") / "needle.mp4"
    footage.write_mp4(footage.frames(video.scene), path)
    return path.as_uri()


@pytest.fixture(scope="module")
def nsa(clip, tmp_path_factory):
    """Started as a user would start it: nothing names the method."""
    folder = tmp_path_factory.mktemp("videonsa")
    arguments = [
        *("--served-model-name", "tiny", "--request-settings"),
        *("--allowed-local-media-path", str(tmp_path_factory.getbasetemp())),
        *("--dtype", "float32", "--max-model-len", "2048", "--max-num-batched-tokens", "2048"),
        *("--gpu-memory-utilization", "0.3", "--enforce-eager"),
    ]
    env = {key: value for key, value in SERVER_ENV.items() if key != "VLLM_PLUGINS"}
    server = VllmServer(CHECKPOINT, *arguments, log=folder / "server.log", env=env)
    server.command = [*PROGRAM, *server.command[server.command.index("serve") :]]
    with warm.printed(server):
        server.wait_until_ready(START_SECONDS)
        client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", timeout=ANSWER_SECONDS, max_retries=0
        )
        yield Served(server, client, folder / "none", None)


def ask(nsa: Served, question: str, clip: str | None = None, **extra):
    content = [{"type": "text", "text": question}]
    if clip is not None:
        content.insert(0, {"type": "video_url", "video_url": {"url": clip}})
    return nsa.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=2,
        logprobs=True,
        top_logprobs=5,
        extra_body=extra,
    )


@pytest.fixture(scope="module")
def traced(nsa, video, clip):
    """The first answer about the video; its trace is kept."""
    return ask(nsa, video.asked[0].text, clip, **mm({"trace": True}), cache_salt="traced")


def test_answers_and_what_they_cost(nsa, video, clip, traced) -> None:
    usage = traced.usage.adaspark
    assert usage["mode"] == "sparse" and usage["video_tokens"] == 16 * PATCHES
    text_config = json.loads((CHECKPOINT / "config.json").read_text())["text_config"]
    for name in ("block_counts", "window_size"):
        assert usage["settings"][name] == text_config[name], "as the checkpoint says"
    executed = usage["flops"]["executed"]
    assert all(executed[part] > 0 for part in (*BRANCHES, "gates", "text"))
    assert 0.3 < usage["attention_density"] < 1
    assert all(0 < usage["means"][f"gate_{branch}"] < 1 for branch in BRANCHES)

    said = [ask(nsa, q.text, clip).choices[0].message.content for q in video.asked]
    right = sum(answer == q.answer for answer, q in zip(said, video.asked, strict=True))
    assert right >= len(said) - 1, said

    few = ask(nsa, video.asked[0].text, clip, **mm({"block_counts": 2})).usage.adaspark
    assert few["settings"]["block_counts"] == 2
    assert few["flops"]["executed"]["slc"] < 0.4 * executed["slc"]
    assert ask(nsa, video.asked[0].text, clip, **mm("off")).usage.adaspark["reason"] == "off"
    with urllib.request.urlopen(f"{nsa.server.url}/metrics", timeout=60) as response:
        metrics = response.read().decode()
    for branch in BRANCHES:
        assert f'part="{branch}"' in metrics and f"gate_{branch}" in metrics


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"block_counts": 0}, "block_counts=0: expected an integer from 1"),
        ({"window_size": "wide"}, "window_size='wide': expected an integer"),
        ({"mode": "faithful"}, "'mode' is a server setting"),
        ({"flops": 0.5}, "flops=0.5: what VideoNSA spends follows from block_counts"),
    ],
)
def test_bad_settings_are_the_clients_error(nsa, video, clip, settings, message) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(nsa, video.asked[0].text, clip, **mm(settings))
    assert nsa.health() == 200


def test_text_alone_is_the_stock_models(nsa) -> None:
    """Transformers' Qwen2.5-VL, which knows no gates, gives the same probabilities."""
    question = "Which digit is on the red card?"
    answer = ask(nsa, question)
    usage = answer.usage.adaspark
    assert (usage["mode"], usage["reason"]) == ("dense", "no_video")
    assert not {*BRANCHES, "gates"} & usage["flops"]["executed"].keys()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )["input_ids"]  # fmt: skip
    assert ids.shape[1] == answer.usage.prompt_tokens
    with torch.inference_mode():
        expected = stock.eval()(input_ids=ids).logits[0, -1].log_softmax(-1)
    listed = answer.choices[0].logprobs.content[0].top_logprobs
    best = expected.topk(len(listed))
    assert [entry.token for entry in listed] == [tokenizer.decode([t]) for t in best.indices]
    assert [e.logprob for e in listed] == pytest.approx(best.values.tolist(), abs=CLOSE)


def test_viewer_shows_what_a_token_selected_and_the_gates(nsa, traced, tmp_path) -> None:
    whole = reader.read_http(nsa.server.url, traced.id)
    layers, usage = whole["layers"], whole["usage"]
    for branch in BRANCHES:
        of_layers = whole["means"][f"gate_{branch}"]
        assert len(of_layers) == len(layers)
        mean = sum(of_layers) / len(layers)
        assert mean == pytest.approx(usage["means"][f"gate_{branch}"])
    # The prompt's text stands before the video in its first block, which is a cube for all that.
    assert 0 < whole["videos"][0]["offset"] < 64 and whole["cube_starts"][0] == 0
    last = max(n for n, start in enumerate(whole["cube_starts"]) if start + 64 <= 16 * PATCHES)
    token = whole["cube_starts"][last] + 5
    url = f"{nsa.server.url}/v1/adaspark/traces/{whole['id']}/heat?source=token:{token}"
    with urllib.request.urlopen(url, timeout=60) as response:
        heat = json.loads(response.read())["heat"]
    for of_layer in heat:
        selected = usage["settings"]["block_counts"] - 1
        assert sum(of_layer[:last]) == pytest.approx(selected, abs=1e-3) and of_layer[last] == 1
    executable = find_browser()
    if executable is None:
        pytest.skip("no Chromium found")
    with Page(executable) as page:
        page.open(f"{nsa.server.url}/adaspark/#{whole['id']}")
        page.wait("document.getElementById('chart').childElementCount === 1")
        page.wait("document.body.ariaBusy === 'false'")
        for branch in BRANCHES:
            dots = f"document.querySelectorAll('#chart .dot.gate_{branch}').length"
            assert page.run(dots) == len(layers)
        assert page.run("document.querySelector('[name=source]:checked').value") == "cube"
        skipping = "[...document.querySelectorAll('.skipping')].every((part) => part.hidden)"
        assert page.run(skipping), "no token skips the FFN"
        facts = page.run("document.getElementById('facts').innerText")
        assert "gate slc" in facts and "block_counts" in facts
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        assert len(page.picture(tmp_path / "page.png")) > 20_000
        assert page.errors == []
