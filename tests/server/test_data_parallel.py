"""A server with two engines (``--data-parallel-size 2``): each answers, and each is counted."""

from __future__ import annotations

import json
import re
import time
from urllib.request import urlopen

import checkpoint as demo_checkpoint  # examples/demo
import openai
import pytest
from server import VllmServer  # examples/demo
from serving import ANSWER_SECONDS, REPORT_SECONDS, SERVER_ENV, SETTINGS, START_SECONDS

from vllm_adaspark import ARCHITECTURE

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(media, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    checkpoint = demo_checkpoint.build(folder / "checkpoint", dtype="float32", vision_layers=2)
    arguments = [
        *("--served-model-name", "tiny", "--allowed-local-media-path", str(media)),
        *("--hf-overrides", json.dumps({"architectures": [ARCHITECTURE]})),
        *("--additional-config", json.dumps({"adaspark": SETTINGS})),
        *("--dtype", "float32", "--max-model-len", "4096", "--max-num-batched-tokens", "2048"),
        *("--data-parallel-size", "2", "--enforce-eager"),
    ]
    with VllmServer(checkpoint, *arguments, log=folder / "server.log", env=SERVER_ENV) as running:
        running.wait_until_ready(2 * START_SECONDS)
        yield running


def test_both_engines_answer_and_are_counted(server, media) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=ANSWER_SECONDS)

    def ask(engine: int) -> tuple[str, dict]:
        video = {"type": "video_url", "video_url": {"url": (media / "clip.mp4").as_uri()}}
        reply = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": [video]}],
            temperature=0,
            max_tokens=6,
            extra_headers={"X-data-parallel-rank": str(engine)},
        )
        return reply.choices[0].message.content, reply.usage.model_extra["adaspark"]

    answers = [ask(0), ask(1), ask(1)]
    assert len({text for text, _ in answers}) == 1
    assert all(account["mode"] == "sparse" for _, account in answers)
    cached = [account["cached_tokens"] for _, account in answers]
    assert cached[:2] == [0, 0] and cached[2] >= 64, "each engine has a cache of its own"
    deadline = time.monotonic() + REPORT_SECONDS
    while (counted := sparse_requests(server)) != {"0": 1, "1": 2} and time.monotonic() < deadline:
        time.sleep(0.05)
    assert counted == {"0": 1, "1": 2}


def sparse_requests(server) -> dict[str, float]:
    """How many sparse requests each engine has ended, by its name."""
    with urlopen(f"{server.url}/metrics", timeout=ANSWER_SECONDS) as response:
        text = response.read().decode()
    found = re.findall(r'^vllm_adaspark:requests_total{(.*mode="sparse".*)} (.*)$', text, re.M)
    return {re.search(r'engine="(.*?)"', labels)[1]: float(value) for labels, value in found}
