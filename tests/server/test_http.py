"""The real server and the real OpenAI client: good requests, bad requests, and a clean end.

All tests share one server; the last one ends it.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from serving import SETTINGS, Served, about, data_url, mm

pytestmark = pytest.mark.server
PROMPT_TOKENS = 316  # of the clip: ten pairs of frames of 6 x 5 tokens, and 16 of text
VIDEO_TOKENS = 300
STOP_SECONDS = 120  # it takes two


# -- good requests ------------------------------------------------------------------------------


def test_file_base64_and_streaming_agree(served: Served, media: Path) -> None:
    clip = media / "clip.mp4"
    answers = {
        (way, stream): served.ask(url, stream=stream, cache_salt=f"{way} {stream}")
        for way, url in (("file", clip.as_uri()), ("base64", data_url(clip)))
        for stream in (False, True)
    }
    assert len({answer.text for answer in answers.values()}) == 1
    assert {(a.prompt_tokens, a.tokens) for a in answers.values()} == {(PROMPT_TOKENS, 16)}


def open_stream(served: Served, clip: Path, max_tokens: int):
    return served.client.chat.completions.create(
        model="tiny",
        messages=about(clip),
        max_tokens=max_tokens,
        stream=True,
        extra_body={"ignore_eos": True},
    )


def test_streaming_comes_in_pieces(served: Served, media: Path) -> None:
    stream = open_stream(served, media / "clip.mp4", max_tokens=64)
    chunks = list(stream)
    served.answered.append(chunks[0].id)
    # vLLM joins the tokens that a busy client has not fetched yet: how many pieces, nobody knows.
    assert sum(bool(chunk.choices[0].delta.content) for chunk in chunks if chunk.choices) > 1


def test_two_concurrent_requests_answer_as_each_alone(served: Served, media: Path) -> None:
    questions = [
        (media / "clip.mp4", {"p_attn": 0.2, "p_ffn": 0.2}),
        (media / "other.mp4", {"enabled": False}),
    ]

    def ask(nth: int, salt: str, start: threading.Barrier | None = None):
        clip, settings = questions[nth]
        if start is not None:
            start.wait(60)
        began = time.monotonic()
        # The salt keeps the prefix cache out of it: both compute their whole prompt.
        answer = served.ask(clip.as_uri(), max_tokens=64, cache_salt=salt, **mm(settings))
        return answer.text, began, time.monotonic()

    alone = [ask(nth, "alone")[0] for nth in range(2)]
    barrier = threading.Barrier(2)
    for attempt in range(20):  # a busy system may let one run only when the other has ended
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(ask, range(2), [f"{attempt}"] * 2, [barrier] * 2))
        assert [text for text, _, _ in together] == alone
        if max(began for _, began, _ in together) < min(ended for _, _, ended in together):
            return
    pytest.fail("they never ran beside each other")


def test_settings_of_a_request_take_effect(served: Served, media: Path) -> None:
    """Sparser settings do less, ``enabled: false`` does everything, and the answers differ."""
    url = (media / "clip.mp4").as_uri()
    asked = {
        "sparse": {"p_attn": 0.1, "p_ffn": 0.1},
        "server": {},
        "none": None,
        "dense": {"enabled": False},
    }
    answers = {name: served.ask(url, **mm(settings)) for name, settings in asked.items()}
    reports = served.reports(len(served.answered))
    report = {name: reports[answer.id] for name, answer in answers.items()}
    assert report["sparse"]["flops_ratio"] < report["server"]["flops_ratio"] < 1
    assert report["dense"]["flops_ratio"] == 1.0
    assert report["dense"]["attention_density"] == report["dense"]["ffn_density"] == 1.0
    assert answers["none"].text == answers["server"].text
    assert len({answers[name].text for name in ("sparse", "server", "dense")}) == 3


def test_report_has_a_consistent_line_for_every_request(served: Served, media: Path) -> None:
    clip = served.ask((media / "clip.mp4").as_uri(), cache_salt="report")
    text = served.ask(None)
    reports = served.reports(len(served.answered))
    assert set(reports) == set(served.answered)

    report = reports[clip.id]
    assert report["finished"] and report["cached_tokens"] == 0
    assert report["tokens"] == clip.prompt_tokens + clip.tokens - 1  # the last is not computed on
    assert report["video_tokens"] == VIDEO_TOKENS
    assert SETTINGS["p_ffn"] <= report["ffn_density"] < 1
    assert 0.2 < report["attention_density"] < 1
    for line in reports.values():
        check_sums(line)

    report = reports[text.id]
    assert report["video_tokens"] == 0 and report["flops_ratio"] == 1.0


def check_sums(report: dict) -> None:
    """What a report says in all is what it says layer by layer."""
    layers, tokens, video = report["layers"], report["tokens"], report["video_tokens"]
    dense, executed = report["flops"]["dense"], report["flops"]["executed"]
    for kind in (dense, executed):
        assert kind["total"] == pytest.approx(sum(v for k, v in kind.items() if k != "total"))
    assert report["flops_ratio"] == pytest.approx(executed["total"] / dense["total"])
    assert executed["qkvo"] == dense["qkvo"]
    assert executed["attention"] <= dense["attention"] and executed["ffn"] <= dense["ffn"]

    assert [layer["layer"] for layer in layers] == [0, 1, 2, 3]
    ran = sum(tokens - video + layer["ffn_active"] for layer in layers)
    assert executed["ffn"] / dense["ffn"] == pytest.approx(ran / (tokens * len(layers)), abs=1e-3)
    for name in ("attention_density", "ffn_density"):
        mean = sum(layer[name] for layer in layers) / len(layers)
        assert report[name] == pytest.approx(mean)
    for layer in layers:
        assert layer["ffn_tokens"] == video
        assert 0 <= layer["cubes_attended"] <= layer["cubes_seen"] == layers[0]["cubes_seen"]
        if layer["cubes_seen"]:
            share = layer["cubes_attended"] / layer["cubes_seen"]
            assert layer["attention_density"] == pytest.approx(share, abs=0.01)


def test_image(served: Served, media: Path) -> None:
    answer = served.ask((media / "frame.png").as_uri(), kind="image_url")
    assert served.reports(len(served.answered))[answer.id]["flops_ratio"] == 1.0


def test_client_that_goes_away(served: Served, media: Path, still_serves) -> None:
    stream = open_stream(served, media / "clip.mp4", max_tokens=3000)
    served.answered.append(next(iter(stream)).id)
    stream.close()
    assert len(served.reports(len(served.answered))) == len(served.answered)


# -- bad requests -------------------------------------------------------------------------------

BAD_SETTINGS = {
    "p 0": ({"p_attn": 0}, ["p_attn=0", "above 0 and at most 1"]),
    "p 1.5": ({"p_attn": 1.5}, ["p_attn=1.5", "above 0 and at most 1"]),
    "p text": ({"p_attn": "x"}, ["p_attn='x'", "expected a number"]),
    "p null": ({"p_ffn": None}, ["p_ffn=None", "expected a number"]),
    "prune 1": ({"prune": 1}, ["prune=1", "from 0 to below 1"]),
    "unknown key": ({"p_atn": 0.5}, ["unknown key 'p_atn'", "did you mean 'p_attn'?", "p_ffn"]),
    "server's key": ({"dense_below": 3}, ["'dense_below' is a server setting", "p_attn"]),
    "server's file": ({"report_file": "x.jsonl"}, ["'report_file' is a server setting"]),
    "cube of another volume": ({"cube": [8, 4, 4]}, ["cube=[8, 4, 4]", "128", "64"]),
    "cube of two": ({"cube": [4, 4]}, ["cube=[4, 4]", "three integers [t, h, w]"]),
    "choice": ({"order": "hilbert"}, ["order='hilbert'", "'cube', 'raster'"]),
    "no object": (3, ["must be an object of settings", "got 3 (int)"]),
    "list": ([0.5], ["must be an object of settings", "got [0.5] (list)"]),
}


@pytest.mark.parametrize("settings, words", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
@pytest.mark.usefixtures("still_serves")
def test_bad_settings(served: Served, media: Path, settings, words) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            served.ask((media / "clip.mp4").as_uri(), stream=stream, **mm(settings))
        for word in ["mm_processor_kwargs.adaspark", *words]:
            assert word in caught.value.message


@pytest.mark.usefixtures("still_serves")
def test_bad_settings_of_an_image_request(served: Served, media: Path) -> None:
    image = (media / "frame.png").as_uri()
    with pytest.raises(openai.BadRequestError, match=r"p_attn=1\.5"):
        served.ask(image, kind="image_url", **mm({"p_attn": 1.5}))


def test_settings_of_a_text_request_are_not_looked_at(served: Served) -> None:
    """vLLM calls no processor for a prompt without media, so nothing sees them.  A known gap."""
    assert served.ask(None, **mm({"p_attn": 1.5})).text == served.ask(None).text


BAD_VIDEOS = {
    "garbage": ("garbage.mp4", ["Could not open video stream"]),
    "zero bytes": ("empty.mp4", ["the video is empty: 0 bytes"]),
    "cut off": ("cut.mp4", ["Could not open video stream"]),
    "damaged frames": ("damaged.mp4", ["none of the video's 80 frames could be decoded"]),
    "one frame": ("one-frame.mp4", ["frames in pairs", "send a single frame as an image"]),
    "past the encoder cache": ("long.mp4", ["2700", "2048", "reduce the input size"]),
    "past the context": ("longer.mp4", ["7216", "maximum context length (4096)"]),
}


@pytest.mark.parametrize("name, words", BAD_VIDEOS.values(), ids=BAD_VIDEOS)
@pytest.mark.usefixtures("still_serves")
def test_bad_video(served: Served, media: Path, name, words) -> None:
    urls = [(media / name).as_uri()]
    if (media / name).stat().st_size < 100_000:
        urls.append(data_url(media / name))
    for url in urls:
        with pytest.raises(openai.BadRequestError) as caught:
            served.ask(url)
        for word in words:
            assert word in caught.value.message


@pytest.mark.usefixtures("still_serves")
def test_bad_base64(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="base64"):
        served.ask("data:video/mp4;base64,@@@@")


@pytest.mark.usefixtures("still_serves")
def test_path_outside_the_allowed_folder(served: Served, media: Path) -> None:
    outside = media.parent / "outside.mp4"
    outside.write_bytes((media / "clip.mp4").read_bytes())
    for url in (outside.as_uri(), f"{media.as_uri()}/../outside.mp4"):
        with pytest.raises(openai.BadRequestError, match="--allowed-local-media-path"):
            served.ask(url)


@pytest.mark.usefixtures("still_serves")
def test_missing_file(served: Served, media: Path) -> None:
    with pytest.raises(openai.BadRequestError, match="No such file"):
        served.ask((media / "missing.mp4").as_uri())


# -- the end ------------------------------------------------------------------------------------


def test_sigterm_ends_the_server(served: Served) -> None:
    """Last, because no request is answered after it."""
    process = served.server.process
    assert served.health() == 200
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(STOP_SECONDS) == 0
    deadline = time.monotonic() + STOP_SECONDS
    while group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not group_lives(process.pid), "a worker outlived the server"
    host, port = served.server.url.removeprefix("http://").split(":")
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0


def group_lives(group: int) -> bool:
    """Whether a process of the group is left; the server has a group of its own."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
