"""LLaVA-OneVision through ``vllm-adaspark serve``, the real client and real files."""

from __future__ import annotations

import json

import openai
import pytest
import tiny_llava
from server import VllmServer  # examples/demo
from serving import SERVER_ENV, mm
from test_cli_serve import ANSWER_SECONDS, PROGRAM, START_SECONDS

from vllm_adaspark import ARCHITECTURES

pytestmark = pytest.mark.server
FRAME = 25  # tokens


@pytest.fixture(scope="module")
def llava(media, tmp_path_factory):
    """(client, server) of a server whose command line names no architecture."""
    folder = tmp_path_factory.mktemp("llava")
    arguments = [
        *("--served-model-name", "tiny", "--allowed-local-media-path", str(media)),
        *("--dtype", "float32", "--max-model-len", "2048", "--max-num-batched-tokens", "2048"),
        *("--gpu-memory-utilization", "0.3"),  # on a CPU: memory that must be free
        *("--enforce-eager", "--request-settings", "--p", "0.6", "--dense-below", "2"),
    ]
    checkpoint = tiny_llava.build(folder / "checkpoint")
    server = VllmServer(checkpoint, *arguments, log=folder / "server.log", env=SERVER_ENV)
    server.command = [*PROGRAM, *server.command[server.command.index("serve") :]]
    with server:
        server.wait_until_ready(2 * START_SECONDS)
        yield (
            openai.OpenAI(
                base_url=f"{server.url}/v1",
                api_key="none",
                timeout=3 * ANSWER_SECONDS,
                max_retries=0,
            ),
            server,
        )


def ask(client, *media, **extra) -> tuple[str, dict]:
    """The answer, and what the account says."""
    parts = [{"type": kind, kind: {"url": url}} for kind, url in media]
    reply = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}],
        temperature=0,
        max_tokens=6,
        extra_body={"ignore_eos": True, **extra},
    )
    return reply.choices[0].message.content, reply.usage.model_extra["adaspark"]


def test_answers_and_accounts(llava, media) -> None:
    client, server = llava
    assert ARCHITECTURES["llava_onevision"] in server.log.read_text()
    clip = ("video_url", (media / "clip.mp4").as_uri())
    other = ("video_url", (media / "other.mp4").as_uri())
    text, account = ask(client, clip)
    assert account["mode"] == "sparse" and account["video_tokens"] == 32 * FRAME
    assert account["flops_ratio"] < 1 and account["attention_density"] < 1
    assert ask(client, clip)[0] == text
    _, account = ask(client, clip, media_io_kwargs={"video": {"num_frames": 8}})
    assert account["video_tokens"] == 8 * FRAME
    _, account = ask(client, clip, media_io_kwargs={"video": {"fps": 2}})
    assert account["video_tokens"] == 20 * FRAME
    _, account = ask(client, clip, **mm("off"))
    assert account["mode"] == "dense" and account["flops_ratio"] == 1
    _, account = ask(client, clip, **mm({"flops": 0.7}))
    assert account["flops_ratio"] == pytest.approx(0.7, abs=0.03)
    _, account = ask(client, clip, other)
    assert account["video_tokens"] == 2 * 32 * FRAME
    _, account = ask(client, ("image_url", (media / "frame.png").as_uri()))
    assert account["mode"] == "dense" and account["video_tokens"] == 0
    # A single frame is a video to this model.
    _, account = ask(client, ("video_url", (media / "one-frame.mp4").as_uri()))
    assert account["video_tokens"] == FRAME


@pytest.mark.parametrize(
    "extra, words",
    [
        (mm({"p_attn": 2}), "p_attn=2: expected"),
        ({"mm_processor_kwargs": {"max_pixels": 5000}}, "max_pixels=5000: not a setting of this"),
        ({"mm_processor_kwargs": {"size": {"height": 9, "width": 9}}}, "size={'height': 9"),
        ({"mm_processor_kwargs": {"image_grid_pinpoints": [[9, 9]]}}, "image_grid_pinpoints="),
        ({"mm_processor_kwargs": {"do_sample_frames": True}}, "do_sample_frames=True: frames are"),
        ({"media_io_kwargs": {"video": {"num_frames": 0}}}, "num_frames=0: expected a whole"),
        ({"media_io_kwargs": {"video": {"max_frames": 4}}}, "max_frames=4: unknown; allowed"),
        ({"media_io_kwargs": {"video": {"num_frames": 99}}}, "longer than the maximum model"),
    ],
)
def test_bad_requests_are_refused_and_the_next_is_served(llava, media, extra, words) -> None:
    client, server = llava
    clip = ("video_url", (media / "clip.mp4").as_uri())
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, clip, **extra)
    assert words in refused.value.message
    assert server.process.poll() is None
    assert ask(client, clip)[1]["video_tokens"] == 32 * FRAME


def test_odd_images_do_not_end_the_engine(llava, tmp_path_factory, media) -> None:
    """Sizes for which the token count and the model's rows are most likely to differ."""
    import cv2
    import numpy as np

    client, server = llava
    for number, (width, height) in enumerate([(1, 1), (900, 3), (3, 900), (251, 127), (97, 613)]):
        path = media / f"odd-{number}.png"
        assert cv2.imwrite(str(path), np.full((height, width, 3), 90, np.uint8))
        try:
            ask(client, ("image_url", path.as_uri()))
        except openai.BadRequestError as error:
            assert json.dumps(error.message)
    assert server.process.poll() is None
    assert ask(client, ("video_url", (media / "clip.mp4").as_uri()))[1]["video_tokens"]
