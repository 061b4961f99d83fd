"""Our routes in vLLM's whole application, as a server with --api-key builds it, and who may ask."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import time
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from vllm_adaspark.server import plugin, refusals, traces
from vllm_adaspark.server.engine import Turns
from vllm_adaspark.traces.trace import Trace, Video

KEY = "secret"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
OPEN = {"/metrics", "/adaspark", "/adaspark/", "/adaspark/{name}"}  # these hold no user's data
CHAT = "/v1/chat/completions"
ANSWERING = {CHAT, "/v1/completions", "/v1/responses"}  # vLLM's, whose answers get a usage


class Workers:
    """Stands for the engine: notes what the workers are asked, and has no traces."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []

    async def __call__(self, *args) -> list:
        self.asked.append(args)
        return [[[] if args[1] == "adaspark_traces" else None]]


@pytest.fixture(scope="module")
def app():
    import vllm.plugins
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    with pytest.MonkeyPatch.context() as patch:
        # vLLM loads plugins once in a process: those of later tests must not be these.
        patch.setattr(vllm.plugins, "plugins_loaded", True)
        patch.setenv("VLLM_PLUGINS", "adaspark_http")
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--api-key", KEY])
        app = build_app(args, ("generate",))
    app.state.adaspark_accounts = True
    app.state.args = args
    model = SimpleNamespace(served_model_name="m")
    app.state.vllm_config = SimpleNamespace(model_config=model)
    return app


@pytest.fixture
def workers(app) -> Workers:
    workers = Workers()
    core = SimpleNamespace(call_utility_all_async=workers, engine_ranks_managed=[0])
    app.state.engine_client = SimpleNamespace(engine_core=core, get_tokenizer=lambda: None)
    return workers


@pytest.fixture
def client(app, workers) -> TestClient:
    return TestClient(app, raise_server_exceptions=False, follow_redirects=False)


def routes_of(routes) -> list[APIRoute]:
    """All routes of a list, those of routers that are included as they are, too."""
    found = []
    for route in routes:
        inner = getattr(route, "original_router", None) or getattr(route, "router", None)
        found += routes_of(inner.routes) if inner is not None else [route]
    return [route for route in found if isinstance(route, APIRoute)]


def ours(app) -> list[tuple[str, str]]:
    """(method, path) of every route whose handler is ours."""
    return [
        (method, route.path)
        for route in routes_of(app.routes)
        if route.endpoint.__module__.startswith("vllm_adaspark.")
        for method in sorted(route.methods)
    ]


def filled(path: str) -> str:
    values = {"trace_id": "0123456789abcdef", "video": "0", "n": "0", "name": "viewer.js"}
    return path.format(**values)


def ask(app, method: str, path: str, *headers: tuple[bytes, bytes], raw: bytes | None = None):
    """(status, headers) of a request as a server hands it on; its body must never be read."""
    sent = []

    async def receive():
        raise AssertionError("the body was read")

    async def send(message) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": path, "raw_path": raw or path.encode(), "query_string": b"",
        "root_path": "", "headers": [(b"host", b"server"), *headers], "client": ("1.2.3.4", 5),
        "server": ("server", 80), "state": {},
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"])


# -- with and without key -------------------------------------------------------------------------


def test_every_route_of_ours_is_known_here(app) -> None:
    paths = {path for _, path in ours(app)}
    data = {route.path for route in traces.data.routes}
    assert data | OPEN | ANSWERING == paths and len(data) >= 5


def test_routes_with_data_want_the_key(app, workers, client) -> None:
    """Whatever is wrong with the request: nobody learns more than that."""
    wrong = [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x"]
    for method, path in ours(app):
        if path in OPEN:
            continue
        for header in wrong:
            headers = {} if header is None else {"Authorization": header}
            reply = client.request(method, filled(path), headers=headers)
            assert (reply.status_code, reply.json()) == (401, {"error": "Unauthorized"}), path
        assert client.request(method, filled(path), headers=AUTHORIZED).status_code != 401
    assert workers.asked, "with the key they are"


def test_without_key_no_body_is_read(app, workers) -> None:
    large = (b"content-length", b"100000000000")
    for method, path in ours(app):
        if path not in OPEN:
            assert ask(app, method, filled(path), large)[0] == 401
    assert workers.asked == []


@pytest.mark.parametrize(
    "path",
    ["//v1/adaspark/traces", "/v1//adaspark/traces", "/x/../v1/adaspark/traces",
     "/V1/adaspark/traces", "/./v1/adaspark/traces", "/%2fv1/adaspark/traces",
     "/adaspark/../v1/adaspark/traces", "/adaspark/traces", "v1/adaspark/traces",
     "/\\v1/adaspark/traces", "/v1/adaspark/traces/", "/v1/adaspark/traces;x",
     "/\u00a0v1/adaspark/traces"],
)  # fmt: skip
@pytest.mark.parametrize("host", [b"server", b"evil/x?", b"[::1", b"x#/", b"a@b", b""])
def test_no_spelling_of_a_path_or_host_gets_past_the_key(app, workers, path, host) -> None:
    status, _ = ask(app, "GET", path, (b"host", host))
    assert status in (307, 400, 401, 404) and workers.asked == []


def test_open_routes_ask_for_no_user_data(app, workers, client) -> None:
    for method, path in ours(app):
        if path in OPEN:
            client.request(method, filled(path))
    assert {args[1] for args in workers.asked} == {"adaspark_metrics"}


# -- what comes back ------------------------------------------------------------------------------

MARK = "evil\u00e9"
HOSTILE = {
    "X-Request-Id": MARK.encode("latin-1"),
    "X-Forwarded-Host": MARK.encode("latin-1"),
    "X-Forwarded-Prefix": MARK.encode("latin-1"),
    "Origin": b"https://evil.example",
    "Referer": MARK.encode("latin-1"),
}


def test_no_header_says_what_the_client_said(app, client) -> None:
    for method, path in ours(app):
        reply = client.request(
            method,
            filled(path) + "?source=answer&evil=%0d%0aSet-Cookie:evil",
            headers=AUTHORIZED | HOSTILE,
        )
        told = " ".join(f"{key}: {value}" for key, value in reply.headers.items())
        assert "evil" not in told and "set-cookie" not in told.lower(), path
        if path == "/adaspark":
            assert reply.headers["location"] == "adaspark/", "relative: whatever host was named"
    reply = client.get("/adaspark/%0d%0aSet-Cookie:evil")
    assert reply.status_code == 404 and "set-cookie" not in reply.headers


def test_every_answer_of_the_viewer_is_guarded(app, client) -> None:
    for name in traces.FILES:
        policy = client.get(f"/adaspark/{name}").headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
    for _, path in ours(app):
        if path.startswith("/v1/adaspark/traces"):
            reply = client.get(filled(path), headers=AUTHORIZED)
            assert reply.headers["content-type"].startswith("application/json")
            if reply.status_code == 200:
                assert reply.headers["cache-control"] == "no-store"


WAYS = (
    "innerHTML, outerHTML, insertAdjacent, document.write, eval(, Function(, DOMParser, Fragment("
)
WAYS += ", setHTML, srcdoc, .src =, .href =, javascript:"


def test_scripts_make_no_html_of_what_they_are_told() -> None:
    scripts = "".join(path.read_text() for path in traces.PAGE.glob("*.js"))
    assert "textContent = " in scripts
    for way in WAYS.split(", "):
        assert way not in scripts
    page = (traces.PAGE / "index.html").read_text()
    assert page.count("<script") == 1 and not re.search(r"\son\w+=", page)


MALFORMED = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b"[]",
    "no text": b"\xff\xfe\x00",
    "nulls": b"\0" * 1000,
    "deep": b"[" * 200_000,
    "deep settings": b'{"mm_processor_kwargs": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "a number": b'{"model": "m", "messages": [], "n": ' + b"9" * 10_000 + b"}",
    "no message": b'{"model": "m"}',
    "settings of another kind": b'{"model": "m", "messages": [], "mm_processor_kwargs": 3}',
    "twice": b'{"model": "m"}{"model": "m"}',
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "multipart/form-data", "x"])
def test_malformed_bodies_are_the_clients_fault(client, workers, body: bytes, kind: str) -> None:
    headers = AUTHORIZED | {"Content-Type": kind}
    reply = client.post(CHAT, content=body, headers=headers)
    assert 400 <= reply.status_code < 500 and len(reply.content) < 20_000, reply.text[:300]
    assert b"Traceback" not in reply.content and workers.asked == []


def test_other_methods_are_none(app, client) -> None:
    for _, path in ours(app):
        if path not in {*ANSWERING, "/metrics"}:  # vLLM serves that by any method
            for method in ("POST", "PUT", "PATCH", "TRACE"):
                assert client.request(method, filled(path), headers=AUTHORIZED).status_code == 405


# -- readers in a loop ----------------------------------------------------------------------------


def test_readers_of_traces_take_turns() -> None:
    """However many ask, the workers have one question at a time, and time for steps after each."""
    under_way, most, free = 0, 0, []

    async def read() -> str:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        loop = asyncio.get_running_loop()
        free.append(loop.time())
        await asyncio.sleep(0.02)
        free.append(loop.time())
        under_way -= 1
        return "read"

    async def many() -> None:
        turns = Turns(most=5, longest_pause=60)
        readers = [turns.take(read, 60) for _ in range(8)]
        answers = await asyncio.gather(*readers, return_exceptions=True)
        assert answers[:5] == ["read"] * 5, "and the others do not wait in vain"
        assert all(isinstance(answer, TimeoutError) for answer in answers[5:])
        assert await turns.take(read, 60) == "read", "there is room again"

    asyncio.run(many())
    assert most == 1
    took = [end - start for start, end in zip(free[::2], free[1::2])]
    paused = [start - end for end, start in zip(free[1::2], free[2::2])]
    assert all(pause >= 0.9 * before for pause, before in zip(paused, took))


def test_a_question_that_is_never_answered_is_the_last() -> None:
    asked = []

    async def hangs() -> None:
        asked.append(1)
        await asyncio.Event().wait()

    async def fails() -> None:
        raise RuntimeError("the engine is dead")

    async def try_often() -> None:
        turns = Turns()
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await turns.take(hangs, 0.01)
        assert len(asked) == 1, "those behind it would wait in the engine's queue"
        turns = Turns(longest_pause=0)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                await turns.take(fails, 60)

    asyncio.run(try_often())


def test_a_reader_that_has_gone_is_not_asked_for() -> None:
    asked = []

    async def quick() -> None:
        asked.append(1)

    async def leave() -> None:
        turns, go = Turns(), asyncio.Event()
        first = asyncio.create_task(turns.take(go.wait, 60))
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await turns.take(quick, 0.01)
        go.set()
        await first
        await turns.take(quick, 60)

    asyncio.run(leave())
    assert asked == [1]


def test_busy_readers_are_told_to_come_again(client, app, monkeypatch) -> None:
    monkeypatch.setitem(app.state._state, "adaspark_turns", Turns(most=0))
    reply = client.get("/v1/adaspark/traces", headers=AUTHORIZED)
    assert reply.status_code == 503 and "try again" in reply.text


def test_a_trace_is_put_together_within_its_readers_turn(client, app, workers) -> None:
    """A long text takes seconds to decode: 32 readers at once must not do it side by side."""
    inside, most = 0, 0

    class Tokenizer:
        def decode(self, ids) -> str:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            inside -= 1
            return "x"

    async def traced(*args) -> list:
        trace = Trace(
            id="0123456789abcdef", request_id="r", started=1.0, settings={}, block_size=64,
            prompt_ids=np.arange(8, dtype=np.int32), layers=range(2),
            videos=[Video(0, (1, 2, 2), (4, 4, 4), "cube")],
        )  # fmt: skip
        return [[trace.meta() | {"usage": None}]]

    core = SimpleNamespace(call_utility_all_async=traced, engine_ranks_managed=[0])
    app.state.engine_client = SimpleNamespace(engine_core=core, get_tokenizer=Tokenizer)

    async def readers() -> list:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as many:
            path = "/v1/adaspark/traces/0123456789abcdef"
            return await asyncio.gather(*(many.get(path, headers=AUTHORIZED) for _ in range(4)))

    replies = asyncio.run(readers())
    assert [reply.json()["spans"][1]["text"] for reply in replies] == ["x"] * 4 and most == 1


@pytest.mark.parametrize(
    "status, taken", [(200, 0), (400, 1), (401, 0), (404, 0), (405, 0), (500, 1)]
)
def test_requests_that_prepared_no_media_take_none_back(monkeypatch, status, taken) -> None:
    """Else whoever has no key could spoil the cache of media for those who have."""
    forgotten: list[float] = []
    monkeypatch.setattr(refusals.sent_items, "forget_since", forgotten.append)

    async def answer(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    ask(refusals.TakeBackMedia(answer), "POST", CHAT)
    assert len(forgotten) == taken


# -- the end --------------------------------------------------------------------------------------


async def endless(scope, receive, send) -> None:
    """An application whose answers have no end."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while True:
        await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})


@pytest.mark.parametrize("end", ["signal", "watchdog"])
def test_a_server_ends_though_a_client_does_not_read(monkeypatch, end) -> None:
    """uvicorn as vLLM runs it (launcher.py), and an answer that nobody takes."""
    monkeypatch.setattr(plugin, "LEAVE_SECONDS", 0.2)

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            server = uvicorn.Server(uvicorn.Config(endless, log_config=None, lifespan="off"))
            state = SimpleNamespace()
            waiting = asyncio.create_task(plugin.end_in_time(state))
            await asyncio.sleep(0)
            state.server = server  # vLLM makes it later
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            await asyncio.wait_for(waiting, 60)
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            server.should_exit = True
            try:
                if end == "signal":
                    serving.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await serving
                    serving = server.shutdown()
                await asyncio.wait_for(serving, 60)
            finally:
                writer.close()

    asyncio.run(run())


def test_a_time_that_somebody_else_set_stays() -> None:
    server = uvicorn.Server(uvicorn.Config("x", timeout_graceful_shutdown=3))
    asyncio.run(plugin.end_in_time(SimpleNamespace(server=server)))
    assert server.config.timeout_graceful_shutdown == 3
