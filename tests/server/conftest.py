"""The real servers that tests here share, and videos good and bad."""

from __future__ import annotations

import json
import random
from pathlib import Path

import checkpoint as demo_checkpoint  # examples/demo
import cv2
import openai
import pytest
import variable_rate
import video as demo_video  # examples/demo
import warm
from server import VllmServer  # examples/demo
from serving import ANSWER_SECONDS, KEY, PROGRAM, SERVER_ENV, SETTINGS, START_SECONDS, Served
from transformers import AutoConfig

from vllm_adaspark import ARCHITECTURE

VllmServer.start = staticmethod(warm.start)  # also for those that benchmarks start
MAX_MODEL_LEN = 4096
MAX_BATCHED_TOKENS = 2048  # also the encoder cache: a video must fit


def pytest_collection_modifyitems(items) -> None:
    """On the shared server test_http.py goes first, which looks at every request there was.

    The test that ends the server goes last.
    """

    def turn(item) -> int:
        if "served" not in getattr(item, "fixturenames", ()):
            return 3
        if item.name == "test_sigterm_ends_the_server":
            return 2
        return 0 if item.path.name == "test_http.py" else 1

    items.sort(key=turn)


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    """The folder the server may read: a good clip, and files that are not quite videos."""
    folder = tmp_path_factory.mktemp("media")
    clip = demo_video.write_mp4(folder / "clip.mp4", seconds=10, width=168, height=140)
    demo_video.write_mp4(folder / "other.mp4", seconds=8, width=168, height=140, seed=1)
    demo_video.write_mp4(folder / "one-frame.mp4", seconds=0.125, width=168, height=140)
    # Past the encoder cache, and past the context.
    demo_video.write_mp4(folder / "long.mp4", seconds=90, fps=2, width=168, height=140)
    demo_video.write_mp4(folder / "longer.mp4", seconds=240, fps=2, width=168, height=140)
    # The same garbage every time: some looks like the beginning of a sound file.
    (folder / "garbage.mp4").write_bytes(random.Random(0).randbytes(4096))
    (folder / "empty.mp4").touch()
    data = clip.read_bytes()
    (folder / "cut.mp4").write_bytes(data[: len(data) // 2])
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    (folder / "damaged.mp4").write_bytes(data[:start] + bytes(end - start) + data[end:])
    frame = next(demo_video.frames(seconds=1, fps=1, width=168, height=140))
    assert cv2.imwrite(str(folder / "frame.png"), frame)
    return folder


@pytest.fixture(scope="session")
def served(media, tmp_path_factory):
    """A server with AdaSpark; the last test of test_http.py ends it."""
    folder = tmp_path_factory.mktemp("server")
    checkpoint = demo_checkpoint.build(folder / "checkpoint", dtype="float32", seed=3)
    report_file = folder / "report.jsonl"
    settings = {**SETTINGS, "report_file": str(report_file)}
    arguments = [
        *("--served-model-name", "tiny"),
        *("--hf-overrides", json.dumps({"architectures": [ARCHITECTURE]})),
        *("--additional-config", json.dumps({"adaspark": settings})),
        "--trust-request-mm-kwargs",  # without it vLLM refuses every mm_processor_kwargs
        *("--allowed-local-media-path", str(media)),
        *("--dtype", "float32"),
        *("--max-model-len", str(MAX_MODEL_LEN)),
        *("--max-num-batched-tokens", str(MAX_BATCHED_TOKENS)),
        "--enforce-eager",
        "--enable-prompt-tokens-details",  # usage says what the prefix cache held
        "--enable-server-load-tracking",
        "--enable-mm-embeds",
    ]
    with VllmServer(checkpoint, *arguments, log=folder / "server.log", env=SERVER_ENV) as server:
        server.wait_until_ready(START_SECONDS)
        client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", timeout=ANSWER_SECONDS, max_retries=0
        )
        text_config = AutoConfig.from_pretrained(checkpoint).get_text_config()
        yield Served(server, client, report_file, text_config)


@pytest.fixture(scope="session")
def viewed(media, tmp_path_factory):
    """A server with an API key, started by ``vllm-adaspark serve``; nothing was traced yet."""
    folder = tmp_path_factory.mktemp("viewer")
    checkpoint = demo_checkpoint.build(folder / "checkpoint", dtype="float32", seed=3)
    arguments = [
        *("--served-model-name", "tiny", "--allowed-local-media-path", str(media)),
        *("--dtype", "float32", "--max-model-len", "4096", "--max-num-batched-tokens", "2048"),
        *("--gpu-memory-utilization", "0.3"),  # on a CPU: memory that must be free
        *("--p", "0.5", "--min-cubes", "1", "--dense-below", "2", "--request-settings"),
        *("--api-key", KEY, "--enforce-eager"),
    ]
    env = {key: value for key, value in SERVER_ENV.items() if key != "VLLM_PLUGINS"}
    server = VllmServer(checkpoint, *arguments, log=folder / "server.log", env=env)
    server.command = [*PROGRAM, *server.command[server.command.index("serve") :]]
    with server:
        server.wait_until_ready(START_SECONDS)
        client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key=KEY, timeout=ANSWER_SECONDS, max_retries=0
        )
        yield Served(server, client, folder / "none.jsonl", None)


@pytest.fixture(scope="session")
def good(served: Served, media: Path) -> str:
    """What the server says about the clip when nothing is the matter."""
    answer = served.ask((media / "clip.mp4").as_uri())
    assert len(answer.text) > 5
    return answer.text


@pytest.fixture
def still_serves(served: Served, media: Path, good: str):
    """After the test: same process, healthy, and the next good request is answered as ever."""
    yield
    assert served.server.process.poll() is None
    assert served.health() == 200
    assert served.ask((media / "clip.mp4").as_uri()).text == good


@pytest.fixture(scope="session")
def needle_url(tmp_path_factory):
    """The needle model's server. In fp32, so that a batch's other members change no answer."""
    arguments = [
        *("--served-model-name", "needle"),
        *("--hf-overrides", json.dumps({"architectures": [ARCHITECTURE]})),
        "--trust-request-mm-kwargs",
        *("--allowed-local-media-path", str(tmp_path_factory.getbasetemp())),
        *("--dtype", "float32"),
        *("--max-model-len", "2048"),
        *("--max-num-batched-tokens", "2048"),
        "--enforce-eager",
    ]
    log = tmp_path_factory.mktemp("needle") / "server.log"
    with VllmServer(variable_rate.CHECKPOINT, *arguments, log=log, env=SERVER_ENV) as server:
        server.wait_until_ready(START_SECONDS)
        yield f"{server.url}/v1"
