"""Requests that would end the engine, or spoil the next request: each is a 400, and life goes on.

Stock vLLM 0.32.0 dies of most of them, or answers the next good request about the same video
with a 500.
"""

from __future__ import annotations

import contextlib
import io
import time
from base64 import b64encode
from fractions import Fraction
from pathlib import Path

import av
import httpx
import numpy as np
import openai
import PIL.Image
import pytest
import torch
from serving import Served, about, data_url, mm

from vllm_adaspark.models.qwen2_5_vl_checks import position_limit

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("still_serves")]

HOUR = 3600


def write_slow(path: Path, hours: int, seed: int = 0) -> Path:
    """A small file of one frame an hour."""
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 112
        stream.time_base = stream.codec_context.time_base = Fraction(1)
        for hour in range(hours):
            image = rng.integers(0, 255, (112, 112, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts = hour * HOUR
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def ask_about(served: Served, *urls: str, **extra):
    """A request about several videos."""
    videos = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    return served.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": [*videos, {"type": "text", "text": "Well?"}]}],
        max_tokens=2,
        extra_body=extra,
    )


# -- time positions -----------------------------------------------------------------------------


def test_videos_that_are_too_long_in_time(served: Served, media: Path) -> None:
    """Four days of video in one message, and one that alone would do."""
    slow = [write_slow(media / f"day-{seed}.mp4", 24, seed).as_uri() for seed in range(4)]
    with pytest.raises(openai.BadRequestError, match="send fewer or shorter videos") as refused:
        ask_about(served, *slow)
    assert str(position_limit(served.text_config)) in refused.value.message
    # The second time they are in the processor's cache, and still refused.
    with pytest.raises(openai.BadRequestError, match="send fewer or shorter videos"):
        ask_about(served, *slow)


def test_positions_are_bounded_for_the_whole_prompt(served: Served, media: Path) -> None:
    """Each video fits alone; together they do not."""
    limit = position_limit(served.text_config)
    hours = max(2, int(0.4 * limit / 2 / HOUR))  # two positions a second
    urls = [write_slow(media / f"part-{s}.mp4", hours, seed=10 + s).as_uri() for s in range(3)]
    for url in urls:
        assert ask_about(served, url).choices
    with pytest.raises(openai.BadRequestError, match="positions"):
        ask_about(served, *urls)


# -- processor options --------------------------------------------------------------------------

BAD_OPTIONS = {
    "merge size": ({"merge_size": 4}, ["merge_size=4", "allowed: adaspark, min_pixels"]),
    "patch size": ({"patch_size": 7}, ["patch_size=7"]),
    "frames in a patch": ({"temporal_patch_size": 1}, ["temporal_patch_size=1"]),
    "nested": ({"videos_kwargs": {"merge_size": 1}}, ["videos_kwargs.merge_size=1"]),
    "no resizing": ({"do_resize": False}, ["do_resize=False"]),
    "mean": ({"image_mean": [0.0]}, ["image_mean"]),
    "sampled again": ({"do_sample_frames": True}, ["do_sample_frames=True", "media_io_kwargs"]),
    "misspelt": ({"max_pixel": 5000}, ["max_pixel=5000", "max_pixels"]),
    "no number": ({"max_pixels": "many"}, ["max_pixels='many'", "whole number"]),
    "none": ({"max_pixels": 0}, ["max_pixels=0"]),
    "far too many": ({"min_pixels": 10**12}, ["min_pixels=1000000000000"]),
    "crossed": ({"min_pixels": 9000, "max_pixels": 4000}, ["min_pixels=9000", "max_pixels=4000"]),
    "size": ({"size": {"height": 5}}, ["size=", "shortest_edge", "longest_edge"]),
    "one edge": ({"size": {"longest_edge": 5000}}, ["size=", "shortest_edge and longest_edge"]),
    "edge": ({"size": {"shortest_edge": -1, "longest_edge": 9}}, ["size.shortest_edge=-1"]),
    "rate": ({"fps": "fast"}, ["fps='fast'", "above 0"]),
    "device": ({"device": "cuda"}, ["device='cuda'"]),
}


@pytest.mark.parametrize("options, words", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_processor_options(served: Served, media: Path, options, words) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        served.ask((media / "clip.mp4").as_uri(), mm_processor_kwargs=options)
    for word in ["mm_processor_kwargs", *words]:
        assert word in refused.value.message


def test_processor_options_that_make_sense(served: Served, media: Path) -> None:
    url = (media / "clip.mp4").as_uri()
    small = served.ask(url, mm_processor_kwargs={"max_pixels": 84 * 84})
    for same in (
        {"size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 84 * 84}},
        {"videos_kwargs": {"max_pixels": 84 * 84}},
        {"max_pixels": 84 * 84, "fps": 2, "do_sample_frames": False},
    ):
        answer = served.ask(url, mm_processor_kwargs=same)
        assert (answer.text, answer.prompt_tokens) == (small.text, small.prompt_tokens)


# -- embeddings in place of pictures ------------------------------------------------------------


def packed(tensor: torch.Tensor) -> str:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return b64encode(buffer.getvalue()).decode()


def ask_embeddings(served: Served, rows: int, grid: list, hidden: int | None = None):
    width = served.text_config.hidden_size if hidden is None else hidden
    embeds = torch.linspace(-1, 1, rows * width).reshape(rows, width)
    part = {"image_embeds": packed(embeds), "image_grid_thw": packed(torch.tensor(grid))}
    content = [{"type": "image_embeds", "image_embeds": part}, {"type": "text", "text": "What?"}]
    return served.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], max_tokens=2
    )


def test_embeddings_that_fit(served: Served) -> None:
    assert ask_embeddings(served, 6, [1, 4, 6]).choices


BAD_EMBEDDINGS = {
    "too few rows": (5, [1, 4, 6], None, "image_embeds"),
    "too many rows": (7, [1, 4, 6], None, "image_embeds"),
    "rows that do not merge": (6, [1, 3, 8], None, "image_grid_thw"),
    "two frames": (12, [2, 4, 6], None, "image_grid_thw"),
    "no rows": (6, [1, 0, 6], None, "image_grid_thw"),
    "negative": (6, [1, -4, -6], None, "image_grid_thw"),
    "another width": (6, [1, 4, 6], 24, "image_embeds"),
    "fractions": (6, [1.0, 4.0, 6.0], None, "image_grid_thw"),
    "two numbers": (6, [4, 6], None, "image_grid_thw"),
}


@pytest.mark.parametrize("rows, grid, hidden, word", BAD_EMBEDDINGS.values(), ids=BAD_EMBEDDINGS)
def test_embeddings_that_do_not_fit(served: Served, rows, grid, hidden, word) -> None:
    with pytest.raises(openai.BadRequestError, match=word):
        ask_embeddings(served, rows, grid, hidden)


# -- requests that spoil the next one -----------------------------------------------------------


def refused_after_caching(served: Served, url: str) -> dict:
    """Name to a call that is refused once the video is in the processor's cache."""
    long = "word " * 5000
    return {
        "a budget": lambda: served.ask(url, **mm({"flops": 0.001})),
        "a long prompt": lambda: served.ask(url, question=long),
        "a long answer": lambda: served.ask(url, max_tokens=100_000),
        "logprobs": lambda: served.ask(url, logprobs=True, top_logprobs=100),
        "tokens": lambda: served.ask(url, allowed_token_ids=[10**9]),
        "a schema": lambda: served.ask(url, structured_outputs={"json": "{"}),
        "a stream": lambda: served.ask(url, stream=True, allowed_token_ids=[10**9]),
    }


KINDS = list(refused_after_caching(None, ""))


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_request_leaves_nothing_behind(served: Served, media: Path, kind) -> None:
    """Each time with a video that the server has never seen."""
    path = write_slow(media / f"fresh-{KINDS.index(kind)}.mp4", 4, seed=100 + KINDS.index(kind))
    url = data_url(path)
    with pytest.raises((openai.BadRequestError, openai.APIError)) as refused:
        refused_after_caching(served, url)[kind]()
    assert getattr(refused.value, "status_code", 400) == 400
    if kind == "a budget":
        first = served.ask(url, **mm({"flops": 1.0}))
        assert first.tokens == 16
    assert served.ask(url).tokens == 16


def test_a_client_that_leaves_leaves_nothing_behind(served: Served, media: Path) -> None:
    """Closed while the server still prepares the video, at several moments."""
    for number, wait in enumerate((0.01, 0.05, 0.2)):
        path = write_slow(media / f"left-{number}.mp4", 4, seed=200 + number)
        body = {"model": "tiny", "messages": about(path), "max_tokens": 4}
        body["messages"][0]["content"][0]["video_url"]["url"] = data_url(path)

        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{served.server.url}/v1/chat/completions", json=body, timeout=wait)
        time.sleep(0.5)
        assert served.ask(data_url(path)).tokens == 16


def test_what_hugging_face_refuses_is_told_without_the_pixels(served: Served, media: Path) -> None:
    """A picture 300 times as wide as high: its processor takes 200 at most."""
    path = media / "ribbon.png"
    PIL.Image.new("RGB", (3000, 10)).save(path)
    with pytest.raises(
        openai.BadRequestError, match=r"cannot be processed.*aspect ratio"
    ) as refused:
        served.ask(path.as_uri(), kind="image_url")
    assert len(refused.value.message) < 600
