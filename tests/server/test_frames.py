"""What a request may say of its video: where it lies, how many frames, how many pixels."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import openai
import pytest
from PIL import Image
from serving import Served, data_url, mm
from video_files import encode, picture, sound
from webserver import serve_folder

pytestmark = pytest.mark.server
TEXT_TOKENS = 16
PAIR_TOKENS = 30  # of two frames: 6 x 5


@pytest.fixture(scope="module")
def web(media: Path):
    with serve_folder(media) as url:
        yield url


def frames(**options) -> dict:
    """The request field that says which frames are read."""
    return {"media_io_kwargs": {"video": options}}


def test_file_url_and_base64_are_one_video(served: Served, media: Path, web: str) -> None:
    clip = media / "clip.mp4"
    answers = [
        served.ask(url, cache_salt=way)
        for way, url in {
            "file": clip.as_uri(),
            "url": f"{web}/clip.mp4",
            "base64": data_url(clip),
        }.items()
    ]
    assert len({answer.text for answer in answers}) == 1
    assert {answer.prompt_tokens for answer in answers} == {TEXT_TOKENS + 10 * PAIR_TOKENS}
    # Without a salt the URL finds the file's blocks: what counts are bytes, not where they lie.
    served.ask(clip.as_uri())
    second = served.ask(f"{web}/clip.mp4")
    assert served.reports(len(served.answered))[second.id]["cached_tokens"] == 256


@pytest.mark.parametrize(
    "options, pairs",
    [
        ({"fps": 1}, 5),
        ({"fps": 4}, 20),
        ({"max_frames": 8}, 4),
        ({"fps": 8, "max_frames": 16}, 8),
        ({"fps": 0.1, "min_frames": 6}, 3),
    ],
)
def test_a_request_sets_its_frames(served: Served, media: Path, options, pairs) -> None:
    """With two loaders, beside sparsity settings of its own."""
    clip = (media / "clip.mp4").as_uri()
    tokens = TEXT_TOKENS + pairs * PAIR_TOKENS
    dense = served.ask(clip, **frames(**options), **mm({"enabled": False}))
    sparse = served.ask(clip, **frames(**options), **mm({"p_attn": 0.2, "p_ffn": 0.2}))
    assert dense.prompt_tokens == sparse.prompt_tokens == tokens
    pytest.importorskip("decord")
    decord = served.ask(
        clip,
        **frames(video_backend="adaspark_decord", **options),
        **mm({"p_attn": 0.2, "p_ffn": 0.2}),
    )
    assert (decord.text, decord.prompt_tokens) == (sparse.text, tokens)
    reports = served.reports(len(served.answered))
    assert reports[dense.id]["flops_ratio"] == 1.0
    assert reports[sparse.id]["flops_ratio"] == reports[decord.id]["flops_ratio"]
    if pairs >= 5:  # fewer do not fill a KV block
        assert reports[sparse.id]["flops_ratio"] < 1.0


def test_a_request_sets_the_pixels_of_a_frame(served: Served, media: Path) -> None:
    """Alone, with fewer frames, and with sparsity."""
    clip = (media / "clip.mp4").as_uri()
    small = {"max_pixels": 84 * 84}  # 3 x 2 tokens
    sparse = {"p_attn": 0.5, "p_ffn": 0.5}
    plain = served.ask(clip, mm_processor_kwargs=small)
    assert plain.prompt_tokens == TEXT_TOKENS + 10 * 6
    fewer = served.ask(clip, mm_processor_kwargs={**small, "adaspark": sparse}, **frames(fps=1))
    assert fewer.prompt_tokens == TEXT_TOKENS + 5 * 6
    large = {"min_pixels": 200 * 200}  # 7 x 8 tokens
    larger = served.ask(clip, mm_processor_kwargs={**large, "adaspark": sparse})
    assert larger.prompt_tokens == TEXT_TOKENS + 10 * 56


@pytest.mark.parametrize(
    "options, words",
    [
        ({"fps": 0}, ["media_io_kwargs.video.fps=0", "above 0"]),
        ({"fps": "fast"}, ["video.fps='fast'"]),
        ({"max_frames": 1}, ["video.max_frames=1", "from 2 to"]),
        ({"max_frames": None}, ["video.max_frames=None"]),
        ({"num_frames": 8}, ["video.num_frames=8", "use fps or max_frames"]),
        ({"max_frame": 8}, ["video.max_frame=8", "unknown", "max_frames"]),
        ({"video_backend": "adaspark_decord", "fps": -1}, ["video.fps=-1"]),
        ({"video_backend": "adaspark_decord", "frame_recovery": True}, ["frame_recovery=True"]),
        ({"video_backend": "adaspark_opencv", "fps": 31}, ["video.fps=31"]),
        ({"video_backend": "adaspark_pyav"}, ["video.video_backend='adaspark_pyav'", "known: "]),
    ],
)
def test_bad_options_are_400(served: Served, media: Path, options, words) -> None:
    clip = (media / "clip.mp4").as_uri()
    with pytest.raises(openai.BadRequestError) as caught:
        served.ask(clip, **frames(**options))
    for word in words:
        assert word in caught.value.message
    assert served.health() == 200


@pytest.mark.parametrize(
    "name, words",
    [
        ("garbage", ["Could not open video stream"]),
        ("empty", ["the video is empty: 0 bytes"]),
        ("cut", ["Could not open video stream"]),
        ("damaged", ["none of the video's 80 frames could be decoded"]),
        ("one-frame", ["frames in pairs", "send a single frame as an image"]),
    ],
)
def test_bad_videos_are_400_with_decord_too(served: Served, media: Path, name, words) -> None:
    pytest.importorskip("decord")
    url = (media / f"{name}.mp4").as_uri()
    with pytest.raises(openai.BadRequestError) as caught:
        served.ask(url, **frames(video_backend="adaspark_decord"))
    for word in words:
        assert word in caught.value.message
    assert served.health() == 200


def test_a_url_that_leads_nowhere(served: Served, web: str) -> None:
    """Refused without harm; the codes are vLLM's."""
    for url in (f"{web}/missing.mp4", "http://127.0.0.1:9/clip.mp4", "ftp://127.0.0.1/clip.mp4"):
        with pytest.raises(openai.APIStatusError) as caught:
            served.client.copy(http_client=openai.DefaultHttpxClient()).chat.completions.create(
                model="tiny",
                messages=[
                    {"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}]}
                ],
            )
        assert 400 <= caught.value.status_code < 600
    assert served.health() == 200


# -- files of every kind ---------------------------------------------------------------------------

SIZE = (168, 140)
UNEVEN = [number / 30 for number in range(300)] + [10 + 2.0 * number for number in range(25)]


def sent(data: bytes, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def jpeg(number: int, size: tuple[int, int] = SIZE) -> str:
    file = io.BytesIO()
    Image.fromarray(picture(number, *size)).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def listed(*pictures: str) -> str:
    return "data:video/jpeg;base64," + ",".join(pictures)


def png() -> str:
    file = io.BytesIO()
    Image.fromarray(picture(1, *SIZE)).save(file, "PNG")
    return sent(file.getvalue(), "image/png")


@pytest.fixture
def as_before(served: Served, media: Path):
    """After the test the server is well, and the same question gets the same answer."""
    clip = (media / "clip.mp4").as_uri()
    before = served.ask(clip, cache_salt="before").text
    yield
    assert served.health() == 200
    assert served.ask(clip, cache_salt=f"after {len(served.answered)}").text == before


def half(**how) -> bytes:
    data = encode(frames=40, rate=2, size=SIZE, **how)
    return data[: len(data) * 55 // 100]


FILES = {
    "variable rate": (lambda: encode(times=UNEVEN, size=SIZE), 59),
    "webm without a length": (
        lambda: encode("webm", "libvpx-vp9", size=SIZE, container_options={"live": "1"}),
        4,
    ),
    "AV1": (lambda: encode("webm", "libsvtav1", size=SIZE), 4),
    "ts": (lambda: encode("mpegts", size=SIZE, b_frames=2), 4),
    "fragmented": (
        lambda: encode(size=SIZE, container_options={"movflags": "frag_keyframe+empty_moov"}),
        4,
    ),
    "HEVC, 10 bit": (lambda: encode(codec="libx265", pixels="yuv420p10le", size=SIZE), 4),
    "turned": (lambda: encode(rotation=180, size=SIZE), 4),
    "GIF": (lambda: encode("gif", "gif", size=SIZE), 4),
    "half a file": (lambda: half(container_options={"movflags": "faststart"}), range(7, 14)),
    "list of JPEGs": (lambda: listed(*map(jpeg, range(40))), 20),
}


@pytest.mark.usefixtures("as_before")
def test_files_of_every_kind_are_answered(served: Served) -> None:
    for name, (make, pairs) in FILES.items():
        video = make()
        answer = served.ask(video if isinstance(video, str) else sent(video))
        got = (answer.prompt_tokens - TEXT_TOKENS) / PAIR_TOKENS
        assert got in (pairs if isinstance(pairs, range) else (pairs,)), name


@pytest.mark.usefixtures("as_before")
def test_a_list_of_jpegs_keeps_to_the_options(served: Served) -> None:
    video = listed(*map(jpeg, range(12)))
    for options, pairs in (({}, 6), ({"max_frames": 8}, 4), ({"fps": 4, "max_frames": 6}, 3)):
        answer = served.ask(video, **frames(**options))
        assert answer.prompt_tokens == TEXT_TOKENS + pairs * PAIR_TOKENS


REFUSED = {
    "PNG": (png, {}, ["send a single frame as an image"]),
    "sound": (lambda: sent(sound()), {}, ["the file has no video, only audio"]),
    "zero frames": (lambda: sent(encode(frames=0, size=SIZE)), {}, ["the file has no video"]),
    "playlist": (lambda: sent(b"ffconcat version 1.0\nfile 'clip.mp4'\n"), {}, ["Could not open"]),
    "a list's fps": (lambda: listed(jpeg(0), jpeg(1)), {"fps": 0}, ["video.fps=0", "above 0"]),
    "a list's max_frames": (
        lambda: listed(jpeg(0), jpeg(1)),
        {"max_frames": 1},
        ["video.max_frames=1", "from 2 to"],
    ),
    "a list's unknown key": (
        lambda: listed(jpeg(0), jpeg(1)),
        {"max_frame": 8},
        ["video.max_frame=8", "unknown"],
    ),
    "a list's num_frames": (
        lambda: listed(jpeg(0), jpeg(1)),
        {"num_frames": 1},
        ["video.num_frames=1", "use max_frames"],
    ),
    "a list's indices": (
        lambda: listed(jpeg(0), jpeg(1)),
        {"frames_indices": [3]},
        ["video.frames_indices=[3]", "expected 2 numbers"],
    ),
    "a list of one": (lambda: listed(jpeg(0)), {}, ["send a single frame as an image"]),
    "a list of two sizes": (
        lambda: listed(jpeg(0), jpeg(1, (84, 84))),
        {},
        ["frame 1 is 84x84", "168x140", "one size"],
    ),
    "a list of no JPEGs": (
        lambda: listed(jpeg(0), "AAAA"),
        {},
        ["frame 1 is not a base64 picture"],
    ),
}


@pytest.mark.usefixtures("as_before")
def test_what_is_no_video_is_400(served: Served) -> None:
    for name, (make, options, words) in REFUSED.items():
        with pytest.raises(openai.BadRequestError) as caught:
            served.ask(make(), **(frames(**options) if options else {}))
        for word in words:
            assert word in caught.value.message, name
