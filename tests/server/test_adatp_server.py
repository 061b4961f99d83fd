"""A real server that drops video tokens between layers: client, usage, refusals, metrics."""

from __future__ import annotations

import json
import os
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import checkpoint as demo_checkpoint  # examples/demo
import openai
import pytest
from browser import Page, find_browser
from server import VllmServer  # examples/demo
from serving import SERVER_ENV, Served, mm

from vllm_adaspark import ARCHITECTURE
from vllm_adaspark.traces import reader

pytestmark = pytest.mark.server
START_SECONDS = 600  # on a busy machine; it takes about 20
SETTINGS = {"layers": [2, 4], "keep": [0.5, 0.4], "dedup": "off"}


@pytest.fixture(scope="module")
def pruning(media, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adatp")
    checkpoint = demo_checkpoint.build(folder / "checkpoint", dtype="float32", seed=3, layers=6)
    arguments = [
        *("--served-model-name", "tiny"),
        *("--hf-overrides", json.dumps({"architectures": [ARCHITECTURE]})),
        *("--additional-config", json.dumps({"method": "adatp", "adaspark": SETTINGS})),
        "--trust-request-mm-kwargs",
        *("--allowed-local-media-path", str(media)),
        *("--dtype", "float32", "--max-model-len", "4096", "--max-num-batched-tokens", "2048"),
        "--enforce-eager",
    ]
    with VllmServer(checkpoint, *arguments, log=folder / "server.log", env=SERVER_ENV) as server:
        server.wait_until_ready(START_SECONDS)
        client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0
        )
        yield Served(server, client, folder / "none", None)


def test_a_server_that_drops_tokens(pruning, media) -> None:
    clip = (media / "clip.mp4").as_uri()

    def ask(question: str = "What happens?", url: str | None = clip, **extra):
        content = [{"type": "text", "text": question}]
        if url is not None:
            content.insert(0, {"type": "video_url", "video_url": {"url": url}})
        return pruning.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=8,
            extra_body={"ignore_eos": True, **extra},
        )

    first = ask()
    usage = first.usage.adaspark
    assert (usage["mode"], usage["cached_tokens"]) == ("sparse", 0)
    assert usage["settings"]["keep"] == [0.5, 0.4]
    assert usage["settings"]["frames_by"] == "mean of tokens"
    # Two layers saw all video tokens, two a half, two a fifth.
    assert usage["means"]["alive"] == pytest.approx((2 + 2 * 0.5 + 2 * 0.2) / 6, abs=0.01)
    executed, dense = usage["flops"]["executed"], usage["flops"]["dense"]
    assert executed["ffn"] < 0.7 * dense["ffn"] and executed["selection"] > 0

    # Many at once, scheduled as they come, say what each says alone.
    questions = [("What happens?", clip), ("How many?", None), ("Which one?", clip)] * 3
    alone = {each: ask(*each).choices[0].message.content for each in questions[:3]}
    with ThreadPoolExecutor(9) as pool:
        together = list(pool.map(lambda each: ask(*each), questions))
    for each, answer in zip(questions, together, strict=True):
        assert answer.choices[0].message.content == alone[each]
    assert alone[questions[0]] == first.choices[0].message.content

    with pytest.raises(openai.BadRequestError, match="--max-num-batched-tokens"):
        ask(url=(media / "long.mp4").as_uri(), **mm({"keep": 0.5}))
    with pytest.raises(openai.BadRequestError, match="this model has 6 layers"):
        ask(**mm({"layers": [9], "keep": 0.5}))
    assert ask(**mm("off")).usage.adaspark["reason"] == "off"
    assert ask(**mm("fastv")).usage.adaspark["settings"]["layers"] == [2]

    see_a_trace(pruning, ask(**mm({"trace": True})))

    with urllib.request.urlopen(f"{pruning.server.url}/metrics", timeout=60) as response:
        metrics = response.read().decode()
    refused = [line for line in metrics.splitlines() if 'mode="refused"' in line]
    assert any('reason="too_long"' in line and line.endswith(" 1.0") for line in refused)
    assert pruning.health() == 200


def see_a_trace(pruning, answer) -> None:
    """The viewer shows which tokens went on, and the segments."""
    trace = reader.read_http(pruning.server.url, answer.id)
    assert trace["usage"]["means"] == answer.usage.adaspark["means"]
    kept = [sum(each["kept"][event] for each in trace["dropping"]["segments"]) for event in (0, 1)]
    assert kept == [150, 60]  # of 300: SETTINGS
    if (executable := find_browser()) is None:
        return  # test_viewer.py says so
    with Page(executable) as page:
        page.open(f"{pruning.server.url}/adaspark/#{trace['id']}")
        page.wait("document.body.getAttribute('aria-busy') === 'false'")
        page.wait("!document.querySelector('main').hidden")
        text = page.run("document.querySelector('main').innerText")
        assert "300, then 150 from layer 2 on, 60 from layer 4 on" in text
        assert "share of the layers shown that saw the token" in text
        assert "Attended by" not in text and "this server has no encoder" in text
        assert "video tokens alive" in page.run("document.getElementById('chart').textContent")
        page.run(
            "document.getElementById('segments').dispatchEvent(new PointerEvent('pointermove',"
            " {clientX: document.getElementById('segments').getBoundingClientRect().x + 2}))"
        )
        pointed = page.run("document.getElementById('pointed').textContent")
        assert re.match(r"segment 1 · frames 1 to \d+ · \d+ tokens, \d+ from layer 2 on,", pointed)
        picture = page.picture(os.environ.get("ADASPARK_VIEWER_PICTURE"))
        assert len(picture) > 20_000 and page.errors == []
