"""The viewer on a real server with an API key: its routes, and its page in a real browser."""

from __future__ import annotations

import base64
import io
import json
import os
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from browser import Page, find_browser
from PIL import Image
from serving import KEY, Served, mm

from vllm_adaspark.traces import reader
from vllm_adaspark.traces.attended import cube_heat
from vllm_adaspark.traces.picture import gradient, save_heatmap
from vllm_adaspark.video.order import cube_order

pytestmark = pytest.mark.server
HAS_KEY = f"sessionStorage.setItem('adaspark-api-key', {json.dumps(KEY)})"
QUESTION = "Which number is shown on the card?"
VIDEO_TOKENS = 300  # of the clip: ten pairs of frames of 5 x 6 tokens


@pytest.fixture(scope="module")
def browser():
    executable = find_browser()
    if executable is None:
        told = "no Chromium found; Debian: apt-get install chromium, or set CHROMIUM to its path"
        if os.environ.get("CI") == "true":
            pytest.fail(told)
        pytest.skip(told)
    return executable


@pytest.fixture(scope="module")
def trace(viewed, media, empty_page) -> dict:
    """A traced request, asked after the empty page was looked at, and its whole trace."""
    answer = viewed.ask(
        (media / "clip.mp4").as_uri(), question=QUESTION, **mm({"trace": True}), cache_salt="traced"
    )
    untraced = viewed.ask((media / "clip.mp4").as_uri(), question=QUESTION)
    assert untraced.text == answer.text
    return reader.read_http(viewed.server.url, answer.id, api_key=KEY) | {"answer": answer}


def fetch(viewed, path: str, *, key: str | None = KEY, method: str = "GET"):
    """(status, headers, body) of a request."""
    request = urllib.request.Request(viewed.server.url + path, method=method)
    if key is not None:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


# -- the page without traces ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty_page(viewed, browser) -> dict:
    """What the page says before anything was traced: to a visitor without key, with it, after."""
    seen = {}
    with Page(browser) as page:
        page.open(f"{viewed.server.url}/adaspark/")
        page.wait("!document.getElementById('key').hidden")
        seen["focus"] = page.run("document.activeElement.id")
        seen["first"] = page.run("document.getElementById('message').textContent")
        seen["401"], page.errors = page.errors, []
        type_key(page, "wrong")
        page.wait("document.getElementById('message').textContent !== ''")
        seen["wrong"] = page.run("document.getElementById('message').textContent")
        page.errors = []  # the browser itself notes the 401
        type_key(page, KEY)
        page.wait("!document.getElementById('empty').hidden")
        seen["empty"] = page.run("document.getElementById('empty').innerText")
        seen["key hidden"] = page.run("document.getElementById('key').hidden")
        seen["stored"] = page.run("[Object.values(sessionStorage), Object.keys(localStorage)]")
        seen["errors"] = page.errors
    return seen


def type_key(page: Page, key: str) -> None:
    page.run(f"document.getElementById('key-value').value = {json.dumps(key)}")
    page.click("#key button")


def test_page_asks_for_the_key_and_says_how_to_trace(empty_page) -> None:
    assert len(empty_page["401"]) == 1 and "401" in empty_page["401"][0]
    assert empty_page["focus"] == "key-value" and empty_page["first"] == ""
    assert empty_page["wrong"] == "The server refuses this key."
    assert empty_page["key hidden"] and empty_page["errors"] == []
    assert empty_page["stored"] == [[KEY], []]
    for words in ('{"adaspark": {"trace": True}}', "--trust-request-mm-kwargs", "cache_salt"):
        assert words in empty_page["empty"]


def test_page_of_a_server_without_key(served: Served, browser) -> None:
    with Page(browser) as page:
        page.open(f"{served.server.url}/adaspark/")
        page.wait(
            "!(document.getElementById('empty').hidden && document.querySelector('main').hidden)"
        )
        assert page.run("document.getElementById('key').hidden")
        assert page.errors == []


# -- routes ---------------------------------------------------------------------------------------


def test_every_data_route_wants_the_key(viewed, trace) -> None:
    base = f"/v1/adaspark/traces/{trace['id']}"
    paths = ["/v1/adaspark/traces", base, f"{base}/heat?source=answer", f"{base}/ffn"]
    for path in [*paths, f"{base}/frames/0/0.jpg"]:
        assert fetch(viewed, path)[0] == 200
        for key in (None, "", "wrong"):
            status, _, body = fetch(viewed, path, key=key)
            assert status == 401 and trace["id"].encode() not in body
    assert fetch(viewed, base, key=None, method="DELETE")[0] == 401
    for path in ("/adaspark/", "/adaspark/viewer.js"):  # these hold no data
        assert fetch(viewed, path, key=None)[0] == 200


def test_trace_says_what_was_asked(viewed, trace) -> None:
    assert trace["request_id"].startswith(trace["answer"].id)
    assert trace["video_tokens"] == VIDEO_TOKENS and trace["cached_tokens"] == 0
    assert trace["prompt_tokens"] == trace["answer"].prompt_tokens
    texts = {span["kind"]: span.get("text", "") for span in trace["spans"]}
    assert QUESTION in texts["question"] and texts["answer"] == trace["answer"].text
    assert trace["settings"]["p_attn"] == 0.5 and trace["layers"] == [0, 1, 2, 3]
    (video,) = trace["videos"]
    assert video["grid"] == [10, 5, 6] and video["frames"] == 10
    token_order = np.frombuffer(base64.b64decode(video["token_order"]), "<i4")
    assert (token_order == cube_order((10, 5, 6), (4, 4, 4))).all()
    ids = [each["id"] for each in json.loads(fetch(viewed, "/v1/adaspark/traces")[2])["traces"]]
    assert ids == [trace["id"]], "a request that did not ask was traced"


def test_trace_adds_up_to_the_usage(viewed, trace) -> None:
    assert 0 < trace["usage"]["flops_ratio"] < 1
    ffn = json.loads(fetch(viewed, f"/v1/adaspark/traces/{trace['id']}/ffn")[2])
    # Usage counts a cube's centroid as an evaluation, the trace the tokens that ran.
    assert -1e-3 < trace["usage"]["ffn_density"] - np.mean(ffn["share"]) < 1 / 64 + 1e-3
    ran = [np.frombuffer(base64.b64decode(bits), np.uint8) for bits in ffn["ran"]]
    shares = [np.unpackbits(row, count=VIDEO_TOKENS, bitorder="little").mean() for row in ran]
    assert shares == pytest.approx(ffn["share"], abs=1e-3)


def test_data_is_not_cached_and_not_sniffed(viewed, trace) -> None:
    base = f"/v1/adaspark/traces/{trace['id']}"
    for path in ("/v1/adaspark/traces", base, f"{base}/ffn", f"{base}/frames/0/0.jpg"):
        headers = fetch(viewed, path)[1]
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
    policy = fetch(viewed, "/adaspark/")[1]["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_frames_are_jpegs(viewed, trace) -> None:
    status, headers, body = fetch(viewed, f"/v1/adaspark/traces/{trace['id']}/frames/0/9.jpg")
    assert status == 200 and headers["Content-Type"] == "image/jpeg"
    assert Image.open(io.BytesIO(body)).size == (168, 140)


def all_traces(viewed) -> list[dict]:
    return json.loads(fetch(viewed, "/v1/adaspark/traces")[2])["traces"]


@pytest.fixture
def forgotten(viewed):
    """After the test: only the traces that were there before.  Needs no browser."""
    before = {each["id"] for each in all_traces(viewed)}
    yield
    for other in {each["id"] for each in all_traces(viewed)} - before:
        fetch(viewed, f"/v1/adaspark/traces/{other}", method="DELETE")


def readable(viewed, trace_id: str) -> dict:
    """What a trace says of itself, after every route to it has answered."""
    base = f"/v1/adaspark/traces/{trace_id}"
    for path in (f"{base}/heat?source=question", f"{base}/heat?source=answer", f"{base}/ffn"):
        assert fetch(viewed, path)[0] == 200, path
    status, _, body = fetch(viewed, base)
    assert status == 200
    return json.loads(body)


def test_trace_of_a_request_that_was_left(viewed, media, forgotten) -> None:
    """Its client closes the stream; the trace is of what ran until then."""
    video = {"type": "video_url", "video_url": {"url": (media / "clip.mp4").as_uri()}}
    stream = viewed.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": [video]}],
        max_tokens=3000,
        stream=True,
        extra_body={"ignore_eos": True, "cache_salt": "left", **mm({"trace": True})},
    )
    first = next(iter(stream))
    running = readable(viewed, all_traces(viewed)[0]["id"])
    stream.close()
    for _ in range(100):
        viewed.ask(None, max_tokens=1)  # a step, in which the worker learns of it
        left = all_traces(viewed)[0]
        if left["finished"] is not None:
            break
    assert left["id"] == running["id"] and left["request_id"].startswith(first.id)
    whole = readable(viewed, left["id"])
    assert whole["finished"] and whole["answer_tokens"] < 3000
    assert whole["usage"]["mode"] == "sparse" and whole["truncated"] is None


def test_traces_of_several_answers_and_of_beams(viewed, media, forgotten) -> None:
    """n answers have a trace each, a beam search has one, of its first request."""
    video = {"type": "video_url", "video_url": {"url": (media / "clip.mp4").as_uri()}}
    for n, beams, expected in ((2, False, 2), (2, True, 1)):
        reply = viewed.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": [video]}],
            max_tokens=4,
            n=n,
            temperature=1,
            extra_body={
                "ignore_eos": True, "use_beam_search": beams, "cache_salt": f"{n} {beams}",
                **mm({"trace": True}),
            },
        )  # fmt: skip
        mine = [each for each in all_traces(viewed) if reply.id in each["request_id"]]
        assert len(mine) == expected
        found = reader.read_http(viewed.server.url, reply.id, api_key=KEY)
        assert found["id"] in [each["id"] for each in mine]
        assert reply.usage.adaspark["mode"] == "sparse"
        readable(viewed, found["id"])


UNKNOWN = "0123456789abcdef"
BAD = {
    "unknown": (f"/traces/{UNKNOWN}", 404),
    "unknown heat": (f"/traces/{UNKNOWN}/heat?source=answer", 404),
    "unknown ffn": (f"/traces/{UNKNOWN}/ffn", 404),
    "unknown frame": (f"/traces/{UNKNOWN}/frames/0/0.jpg", 404),
    "too short": ("/traces/0123", 400),
    "capitals": ("/traces/0123456789ABCDEF", 400),
    "too long": ("/traces/" + "0" * 17, 400),
    "huge": ("/traces/" + "a" * 20_000, 400),
    "letters": ("/traces/0123456789abcdeg", 400),
    "newline": ("/traces/0123456789abcdef%0a", 400),
    "null": ("/traces/0123456789abcde%00", 400),
    "quote": ("/traces/%22%3E%3Cscript%3E", 400),
    "dots": ("/traces/..%2f..%2f..%2fetc%2fpasswd", 404),
    "plain dots": ("/traces/../../../../etc/passwd", 404),
    "encoded dots": ("/traces/%2e%2e/%2e%2e/etc/passwd", 404),
    "bad source": ("/traces/{id}/heat?source=video", 400),
    "empty source": ("/traces/{id}/heat?source=", 400),
    "long source": ("/traces/{id}/heat?source=token:" + "9" * 5000, 400),
    "negative": ("/traces/{id}/heat?source=token:-1", 400),
    "no such token": ("/traces/{id}/heat?source=token:99999", 404),
    "no such cube": ("/traces/{id}/heat?source=cube:4", 404),
    "no such video": ("/traces/{id}/frames/1/0.jpg", 404),
    "no such frame": ("/traces/{id}/frames/0/10.jpg", 404),
    "negative frame": ("/traces/{id}/frames/0/-1.jpg", 400),
    "huge frame": ("/traces/{id}/frames/0/" + "9" * 40 + ".jpg", 400),
    "frame by name": ("/traces/{id}/frames/0/x.jpg", 400),
    "other folder": ("/traces/{id}/other", 404),
}


@pytest.mark.parametrize("path, status", BAD.values(), ids=BAD)
def test_bad_requests(viewed, trace, path: str, status: int) -> None:
    got, headers, body = fetch(viewed, "/v1/adaspark" + path.replace("{id}", trace["id"]))
    assert got == status, body[:300]
    assert headers["Content-Type"].startswith("application/json")
    assert b"root:" not in body and b"Traceback" not in body
    assert fetch(viewed, f"/v1/adaspark/traces/{UNKNOWN}", method="DELETE")[0] == 404


@pytest.mark.parametrize(
    "name",
    ["../traces.py", "..%2ftraces.py", "%2e%2e/traces.py", "viewer.js%00", "VIEWER.JS", "x" * 9000,
     "__init__.py", "/etc/passwd", "%2fetc%2fpasswd", "index.html/.."],
)  # fmt: skip
def test_page_has_its_own_files_only(viewed, name: str) -> None:
    status, _, body = fetch(viewed, f"/adaspark/{name}", key=None)
    assert status in (404, 307) and b"import" not in body and b"root:" not in body
    if status == 307:
        assert name == "index.html/.."


# -- the page -------------------------------------------------------------------------------------


@pytest.fixture
def page(viewed, browser, trace):
    """The page with the key given and the trace shown; it must end without console errors."""
    with Page(browser) as page:
        page.at_start(HAS_KEY)
        page.open(f"{viewed.server.url}/adaspark/#{trace['id']}")
        page.wait("document.getElementById('chart').childElementCount === 1")
        settled(page)
        yield page
        assert page.errors == []


HOSTILE = "\"'><img src=x onerror=document.title='owned'><script>document.title='owned'</script>"


def test_hostile_text_stays_text(viewed, media, browser, forgotten) -> None:
    """In a question, in the id that a client chose, in the name of a video."""
    named = media / f"{HOSTILE.replace('/', '')}.mp4"
    named.write_bytes((media / "clip.mp4").read_bytes())
    client = viewed.client.with_options(default_headers={"X-Request-Id": HOSTILE})
    asked = replace(viewed, client=client).ask(
        named.as_uri(), question=HOSTILE, **mm({"trace": True})
    )
    found = reader.read_http(viewed.server.url, asked.id, api_key=KEY)
    with Page(browser) as page:
        page.at_start(HAS_KEY)
        page.open(f"{viewed.server.url}/adaspark/#{found['id']}")
        page.wait("document.getElementById('chart').childElementCount === 1")
        settled(page)
        for shown in ("trace", "facts", "text"):
            assert HOSTILE in page.run(f"document.getElementById('{shown}').textContent"), shown
        assert page.run("document.title") == "AdaSpark viewer" and page.errors == []
        assert page.run("document.querySelectorAll('main script, main img, [onerror]').length") == 0


def settled(page: Page) -> None:
    """Wait for what was asked of the server, and for the drawing after it."""
    page.wait("!document.querySelector('main').hidden && document.body.ariaBusy === 'false'")
    page.run("new Promise(requestAnimationFrame)")


def stage(page: Page) -> np.ndarray:
    """The pixels of the picture, ``[height, width, 3]``."""
    url = page.run("document.getElementById('stage').toDataURL('image/png')")
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def show(page: Page, identifier: str, checked: bool) -> None:
    page.run(
        f"(e => {{ if (e.checked !== {json.dumps(checked)}) e.click(); }})"
        f"(document.getElementById('{identifier}'))"
    )


def choose(page: Page, identifier: str, value: object) -> None:
    """Set a control's value as a user would, with its events."""
    page.run(
        f"(e => {{ e.value = {json.dumps(str(value))}; e.dispatchEvent(new Event('input'));"
        f"e.dispatchEvent(new Event('change')); }})(document.getElementById('{identifier}'))"
    )
    settled(page)


def cell_colors(pixels: np.ndarray) -> np.ndarray:
    """The colour in the middle of each token's cell, ``[5, 6, 3]``."""
    height, width, _ = pixels.shape
    rows = ((np.arange(5) + 0.5) * height / 5).astype(int)
    columns = ((np.arange(6) + 0.5) * width / 6).astype(int)
    return pixels[rows][:, columns].astype(int)


def expected_colors(trace: dict, source: str, layer: int | None, frame: int) -> np.ndarray:
    """What the cells of whole cubes must be at full opacity; NaN elsewhere."""
    heat = cube_heat(trace["heat"][source]["heat"], trace["layers"], layer)
    token_order = cube_order((10, 5, 6), (4, 4, 4))
    block = (trace["videos"][0]["offset"] + np.arange(VIDEO_TOKENS)) // 64
    starts = [start // 64 for start in trace["cube_starts"]]
    colors = np.full((VIDEO_TOKENS, 3), np.nan)
    for nth, cell in enumerate(token_order):
        if block[nth] in starts:
            colors[cell] = gradient(heat[starts.index(block[nth])])
    return colors.reshape(10, 5, 6, 3)[frame]


def test_heat_map_has_the_traces_colours(page, trace) -> None:
    choose(page, "opacity", 100)
    for source in ("question", "answer"):
        page.click(f"input[value={source}]")
        settled(page)
        for layer in (None, 0, 3):
            choose(page, "layer", -1 if layer is None else layer)
            for frame in (0, 5, 9):
                choose(page, "frame", frame)
                want = expected_colors(trace, source, layer, frame)
                got = cell_colors(stage(page))
                known = ~np.isnan(want)
                assert known.any()
                assert np.abs(got - want)[known].max() <= 2, (source, layer, frame)


def test_heat_map_changes_with_layer_and_source(page) -> None:
    pictures = {}
    choose(page, "frame", 5)
    for source in ("question", "answer"):
        page.click(f"input[value={source}]")
        settled(page)
        for layer in (-1, 0, 3):
            choose(page, "layer", layer)
            pictures[source, layer] = stage(page).tobytes()
    assert len(set(pictures.values())) == len(pictures)
    show(page, "show-heat", False)
    assert stage(page).tobytes() not in pictures.values()


def test_picture_is_the_frame(page, viewed, trace) -> None:
    show(page, "show-heat", False)
    choose(page, "frame", 7)
    body = fetch(viewed, f"/v1/adaspark/traces/{trace['id']}/frames/0/7.jpg")[2]
    shown = stage(page)
    sent = Image.open(io.BytesIO(body)).resize(shown.shape[1::-1], Image.Resampling.BICUBIC)
    assert np.abs(shown.astype(int) - np.array(sent)).mean() < 6


def test_keys_clicks_and_overlays(page, trace, tmp_path) -> None:
    page.run("document.getElementById('stage').focus()")
    page.key("ArrowRight", 39)
    page.key("ArrowDown", 40)
    settled(page)
    assert page.run("document.getElementById('frame').value") == "1"
    assert page.run("document.getElementById('layer').value") == "0"

    before = stage(page).tobytes()
    show(page, "show-ffn", True)
    with_ffn = stage(page).tobytes()
    show(page, "show-ffn", False)
    show(page, "show-order", True)
    with_order = stage(page).tobytes()
    assert len({before, with_ffn, with_order}) == 3
    show(page, "show-order", False)
    assert stage(page).tobytes() == before

    page.click("#stage", (0.9, 0.9))
    settled(page)
    assert page.run("document.querySelector('[name=source]:checked').value") == "cube"
    assert stage(page).tobytes() != before

    start = next(span["start"] for span in trace["spans"] if span["kind"] == "question")
    page.click(f"#text button[data-token='{start + 2}']")
    settled(page)
    assert page.run("document.querySelector('[name=source]:checked').value") == "token"
    assert page.run("document.getElementById('token').value") == str(start + 2)

    choose(page, "token", 99999)
    assert "99999" in page.run("document.getElementById('message').textContent")
    page.errors = [error for error in page.errors if "404" not in error]
    page.click("#play")
    page.wait("Number(document.getElementById('frame').value) >= 3")
    page.click("#play")
    assert len(page.picture(tmp_path / "page.png")) > 20_000


def test_page_says_what_the_request_was(page, trace) -> None:
    text = page.run("document.querySelector('main').innerText")
    assert f"{100 * trace['usage']['flops_ratio']:.1f} % of dense" in text
    assert "p_attn 0.5" in text and "300 video" in text
    chart = page.run("document.querySelectorAll('#chart .dot.answer').length")
    assert chart == 4
    buttons = page.run("[...document.querySelectorAll('#text button')].map(b => b.textContent)")
    assert QUESTION in "".join(buttons).replace("⏎", "\n")
    # All labels are text: nothing of a request is ever read as HTML.
    assert page.run("document.querySelectorAll('#text script, #text img').length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_narrow_screen(page, scheme: str, tmp_path) -> None:
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    page.call("Emulation.setEmulatedMedia", features=media)
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.call("Emulation.setDeviceMetricsOverride", **size)
    settled(page)
    assert page.run("document.documentElement.scrollWidth") <= 400
    corner = np.array(Image.open(io.BytesIO(page.picture())).convert("L"))[2, 2]
    assert (corner < 60) == (scheme == "dark")


def test_picture_of_a_served_trace(trace, tmp_path) -> None:
    path = save_heatmap(trace, tmp_path / "heat.png")
    assert Image.open(path).format == "PNG"


# -- the end --------------------------------------------------------------------------------------


def test_deleting_a_trace(viewed, media, browser, trace) -> None:
    """A deleted trace is gone for good, and the page falls back to another."""
    other = viewed.ask((media / "other.mp4").as_uri(), **mm({"trace": True}))
    other_id = reader.read_http(viewed.server.url, other.id, api_key=KEY)["id"]
    with Page(browser) as page:
        page.at_start(HAS_KEY)
        page.open(f"{viewed.server.url}/adaspark/#{other_id}")
        page.wait("document.getElementById('chart').childElementCount === 1")
        settled(page)  # else what is on its way of the deleted trace is not found
        page.click("#delete")
        page.wait(f"location.hash === '#{trace['id']}'")
        assert page.errors == []
    assert fetch(viewed, f"/v1/adaspark/traces/{other_id}")[0] == 404
    assert fetch(viewed, f"/v1/adaspark/traces/{trace['id']}")[0] == 200
    with pytest.raises(LookupError, match="no trace of request"):
        reader.read_http(viewed.server.url, other.id, api_key=KEY)
