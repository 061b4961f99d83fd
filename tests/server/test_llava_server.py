"""LLaVA-OneVision through ``vllm-adaspark serve``, the real client and real files."""

from __future__ import annotations

from contextlib import suppress

import openai
import pytest
import tiny_llava
import warm
from server import VllmServer  # examples/demo
from serving import ANSWER_SECONDS, PROGRAM, SERVER_ENV, START_SECONDS, mm

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
    with warm.printed(server):
        server.wait_until_ready(2 * START_SECONDS)
        client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", timeout=3 * ANSWER_SECONDS, max_retries=0
        )
        yield client, server


def ask(client, *media, **extra) -> tuple[str, int, dict]:
    """The answer, tokens of the prompt, and what the account says."""
    parts = [{"type": kind, kind: {"url": url}} for kind, url in media]
    reply = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}],
        temperature=0,
        max_tokens=6,
        extra_body={"ignore_eos": True, **extra},
    )
    usage = reply.usage
    return reply.choices[0].message.content, usage.prompt_tokens, usage.model_extra["adaspark"]


@pytest.fixture(scope="module")
def good(llava, media) -> str:
    """What the server says about the clip, asked for the first time."""
    client, server = llava
    assert ARCHITECTURES["llava_onevision"] in " ".join(server.command)
    text, _, account = ask(client, ("video_url", (media / "clip.mp4").as_uri()))
    assert account["mode"] == "sparse" and account["video_tokens"] == 32 * FRAME
    assert account["flops_ratio"] < 1 and account["attention_density"] < 1
    return text


def test_answers_and_accounts(llava, media, good) -> None:
    client, _ = llava
    clip = ("video_url", (media / "clip.mp4").as_uri())
    other = ("video_url", (media / "other.mp4").as_uri())
    # A single frame is a video to this model.
    one_frame = ("video_url", (media / "one-frame.mp4").as_uri())
    _, text_and_frame, account = ask(client, one_frame)
    assert account["video_tokens"] == FRAME

    text, tokens, account = ask(client, clip)
    assert text == good and tokens == text_and_frame + 31 * FRAME
    assert account["cached_tokens"] >= 64, "the prefix cache has the video"
    for options, frames in (({"num_frames": 8}, 8), ({"fps": 2}, 20)):
        _, tokens, account = ask(client, clip, media_io_kwargs={"video": options})
        assert tokens == text_and_frame + (frames - 1) * FRAME
        assert account["video_tokens"] == frames * FRAME
    _, _, account = ask(client, clip, **mm("off"))
    assert account["mode"] == "dense" and account["flops_ratio"] == 1
    _, _, account = ask(client, clip, **mm({"flops": 0.7}))
    assert account["flops_ratio"] == pytest.approx(0.7, abs=0.03)
    _, tokens, _ = ask(client, clip, other)
    assert tokens == text_and_frame + 63 * FRAME + 1, "each video has its newline"
    _, _, account = ask(client, ("image_url", (media / "frame.png").as_uri()))
    assert account["mode"] == "dense" and account["video_tokens"] == 0


CLIP = "clip.mp4"


@pytest.mark.parametrize(
    "name, extra, words",
    [
        (CLIP, mm({"p_attn": 2}), "p_attn=2: expected"),
        (CLIP, {"mm_processor_kwargs": {"max_pixels": 5000}}, "max_pixels=5000: not a setting"),
        (CLIP, {"mm_processor_kwargs": {"size": {"height": 9, "width": 9}}}, "size={'height': 9"),
        (CLIP, {"mm_processor_kwargs": {"image_grid_pinpoints": [[9, 9]]}}, "image_grid_pinpo"),
        (CLIP, {"mm_processor_kwargs": {"do_sample_frames": True}}, "do_sample_frames=True: frame"),
        (CLIP, {"media_io_kwargs": {"video": {"num_frames": 0}}}, "num_frames=0: expected a"),
        (CLIP, {"media_io_kwargs": {"video": {"max_frames": 4}}}, "max_frames=4: unknown; allow"),
        ("long.mp4", {"media_io_kwargs": {"video": {"num_frames": 99}}}, "Input length (2493)"),
    ],
)
def test_bad_requests_are_refused_and_the_next_is_served(
    llava, media, good, name, extra, words
) -> None:
    client, server = llava
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, ("video_url", (media / name).as_uri()), **extra)
    assert words in refused.value.message
    assert server.process.poll() is None
    assert ask(client, ("video_url", (media / CLIP).as_uri()))[0] == good


def test_odd_images_do_not_end_the_engine(llava, media, good) -> None:
    """Sizes for which the token count and the model's rows are most likely to differ."""
    import cv2
    import numpy as np

    client, server = llava
    for number, (width, height) in enumerate([(1, 1), (900, 3), (3, 900), (251, 127), (97, 613)]):
        path = media / f"odd-{number}.png"
        assert cv2.imwrite(str(path), np.full((height, width, 3), 90, np.uint8))
        with suppress(openai.BadRequestError):  # which is fine; a 500 is not
            ask(client, ("image_url", path.as_uri()))
    assert server.process.poll() is None
    assert ask(client, ("video_url", (media / CLIP).as_uri()))[0] == good
