"""What goes wrong on a running server, and what users see of it: one server for most of it.

Its disk is full (``report_file``), its memory for traces is small, it runs one request at a time,
and Prometheus scrapes it all along.  At last its worker is killed.  Three more servers end in other
ways: one's engine is killed, the others are asked to end (SIGTERM) while they answer, with and
without time to do so.  The rows of the table in docs/operations.md are these tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import checkpoint as demo_checkpoint  # examples/demo
import httpx
import openai
import pytest
import warm
from prometheus_client.parser import text_string_to_metric_families
from server import VllmServer  # examples/demo
from serving import ANSWER_SECONDS, SERVER_ENV, SETTINGS, START_SECONDS, Served, about, mm

from vllm_adaspark import ARCHITECTURE

pytestmark = pytest.mark.server
END_SECONDS = 120  # it takes ten
DRAIN_SECONDS = 600  # for answers of two thousand tokens, which take twenty
ENDLESS = 12_000  # tokens of an answer that nobody waits for: they take a minute
SCRAPE_SECONDS = 60.0  # Prometheus would give up after ten; on a busy machine a test must not


class ColdServer(VllmServer):
    """Its processes are spawned as users' are: which of them ends with which is what is tested."""

    start = staticmethod(warm.start_cold)


class Scraper(threading.Thread):
    """Prometheus: scrapes twice a second, and notes what it got."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url, self._ending = url, threading.Event()
        self.ups: list[float] = []
        self.errors: list[Exception] = []

    def run(self) -> None:
        while not self._ending.wait(0.5):
            try:
                self.ups.append(scrape(self._url)["vllm_adaspark:up"])
            except Exception as error:
                self.errors.append(error)

    def stop(self) -> None:
        self._ending.set()
        self.join(2 * SCRAPE_SECONDS)
        assert not self.is_alive(), "a scrape hangs"


def scrape(url: str) -> dict[str, float]:
    """The series that have one sample, by name; of others, the last sample."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=SCRAPE_SECONDS) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    return {sample.name: sample.value for family in families for sample in family.samples}


def requests(served: Served) -> int:
    """How many the engine has that are not answered yet."""
    now = scrape(served.server.url)
    return now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"]


def wait_for_requests(served: Served, number: int) -> None:
    wait_for(lambda: requests(served) == number, f"{number} requests")


def beside_each_other(served: Served, pool: ThreadPoolExecutor, *asks: Callable) -> list[Future]:
    """Ask all, until the engine has them all at once; then return what they will answer.

    A system that stalls for seconds may answer one before it takes the next: it is asked again.
    """
    for _ in range(20):
        jobs = [pool.submit(ask) for ask in asks]
        while not any(job.done() for job in jobs):
            # A scrape, too, may take seconds.
            if requests(served) == len(asks) and not any(job.done() for job in jobs):
                return jobs
        for job in jobs:
            job.result(DRAIN_SECONDS)
    pytest.fail("they never ran beside each other")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    return demo_checkpoint.build(folder / "checkpoint", dtype="float32", seed=3)


@contextlib.contextmanager
def serving(
    checkpoint: Path,
    media: Path,
    folder: Path,
    *options: str,
    kind: type[VllmServer] = ColdServer,
    **more,
) -> Iterator[Served]:
    settings = {**SETTINGS, **more}
    arguments = [
        *("--served-model-name", "tiny", "--trust-request-mm-kwargs", "--enforce-eager"),
        *("--hf-overrides", json.dumps({"architectures": [ARCHITECTURE]})),
        *("--additional-config", json.dumps({"adaspark": settings})),
        *("--allowed-local-media-path", str(media), "--dtype", "float32"),
        *("--max-model-len", "16384", "--max-num-batched-tokens", "2048"),
        *("--distributed-executor-backend", "mp"),  # so that the worker is a process of its own
        *options,
    ]
    with kind(checkpoint, *arguments, log=folder / "server.log", env=SERVER_ENV) as server:
        server.wait_until_ready(START_SECONDS)
        client = openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="none", timeout=ANSWER_SECONDS, max_retries=0
        )
        yield Served(server, client, Path("/dev/full"), None)


@pytest.fixture(scope="module")
def faulty(checkpoint, media, tmp_path_factory) -> Iterator[Served]:
    folder, small = tmp_path_factory.mktemp("faulty"), {"report_file": "/dev/full", "trace_mb": 1}
    with serving(checkpoint, media, folder, "--max-num-seqs", "1", **small) as served:
        yield served


@pytest.fixture(scope="module")
def scraper(faulty) -> Iterator[Scraper]:
    scraper = Scraper(faulty.server.url)
    scraper.start()
    yield scraper
    scraper.stop()


@pytest.fixture(scope="module")
def good(faulty, media, scraper) -> str:
    """What the server says about the clip."""
    return faulty.ask((media / "clip.mp4").as_uri()).text


@pytest.fixture
def as_ever(faulty, media, good, scraper) -> Iterator[None]:
    """After a test the server is healthy, answers alike, and is being scraped."""
    yield
    if faulty.server.process.poll() is None and not scraper._ending.is_set():
        assert faulty.health() == 200
        assert faulty.ask((media / "clip.mp4").as_uri()).text == good
        seen = len(scraper.ups)
        wait_for(lambda: 1.0 in scraper.ups[seen:], "scrape")
        assert scraper.errors == []


def wait_for(what, name: str, seconds: float = END_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"no {name} within {seconds} s"
        time.sleep(0.1)


def traces(faulty) -> list[dict]:
    url = f"{faulty.server.url}/v1/adaspark/traces"
    with urllib.request.urlopen(url, timeout=SCRAPE_SECONDS) as response:
        return json.load(response)["traces"]


@pytest.mark.usefixtures("as_ever")
def test_a_full_disk_costs_the_report_and_nothing_else(faulty, media) -> None:
    for salt in "ab":
        faulty.ask((media / "clip.mp4").as_uri(), cache_salt=salt)
    told = "AdaSpark cannot write report_file=/dev/full: [Errno 28] No space left on device"
    wait_for(lambda: told in faulty.server.log.read_text(), "warning")
    assert faulty.server.log.read_text().count("cannot write report_file") == 1, "once"


@pytest.mark.usefixtures("as_ever")
def test_traces_without_room_make_room_and_answers_are_the_same(faulty, media, good) -> None:
    clip = (media / "clip.mp4").as_uri()
    for n in range(20):
        settings = mm({"trace": True})
        answer = faulty.ask(clip, cache_salt=f"trace {n}", max_tokens=2, **settings)
        assert good.startswith(answer.text)
    kept = traces(faulty)
    assert 0 < len(kept) < 20 and sum(trace["bytes"] for trace in kept) <= 1 << 20
    assert kept[0]["request_id"].startswith(answer.id), "the latest is there"


@pytest.mark.usefixtures("as_ever")
def test_one_request_at_a_time_answers_all(faulty, media, good) -> None:
    """``--max-num-seqs 1``: the others wait for their turn."""
    with ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(faulty.ask, (media / "clip.mp4").as_uri()) for _ in range(6)]
        assert {job.result(ANSWER_SECONDS).text for job in jobs} == {good}


def open_unread(faulty, media, tokens: int = 150) -> socket.socket:
    """A client that asks for a long stream with much in it, and does not read."""
    host, port = faulty.server.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(ANSWER_SECONDS)
    client.connect((host, int(port)))
    body = json.dumps({
        "model": "tiny", "messages": about(media / "clip.mp4"), "stream": True,
        "max_tokens": tokens, "ignore_eos": True, "logprobs": True, "top_logprobs": 20,
    })  # fmt: skip
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json"
    client.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    return client


@pytest.mark.usefixtures("as_ever")
def test_a_client_that_never_reads_holds_up_nobody(faulty, media, good) -> None:
    client = open_unread(faulty, media)
    assert client.recv(12) == b"HTTP/1.1 200"
    assert faulty.ask((media / "clip.mp4").as_uri()).text == good
    rest = b""
    while not rest.endswith(b"0\r\n\r\n"):  # it reads after all: nothing was lost
        more = client.recv(1 << 20)
        assert more, "the server closed the connection"
        rest += more
    client.close()
    assert b"data: [DONE]" in rest and rest.count(b'"top_logprobs"') == 150


def descendants(pid: int) -> dict[int, str]:
    """Names of the living processes below one."""
    found, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            stat = (folder / "stat").read_text()
            name, rest = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :]
            state, parent = rest.split()[:2]
            names[int(folder.name)] = (int(parent), (folder / "cmdline").read_text() or name, state)
    todo = [pid]
    while todo:
        above = todo.pop()
        for child, (parent, name, state) in names.items():
            if parent == above and state != "Z":
                found[child] = name
                todo.append(child)
    return found


def test_a_killed_worker_ends_the_server(faulty, media, scraper) -> None:
    unread = open_unread(faulty, media, tokens=ENDLESS)
    wait_for_requests(faulty, 1)
    with killed(faulty, media, "Worker"):
        scraper.stop()
        unread.close()


@pytest.fixture(scope="module")
def another(checkpoint, media, tmp_path_factory) -> Iterator[Served]:
    with serving(checkpoint, media, tmp_path_factory.mktemp("another")) as served:
        yield served


def test_a_url_without_a_server_is_the_clients_fault(another) -> None:
    with socket.socket() as taken:  # nobody listens
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(openai.UnprocessableEntityError, match="no connection to its server"):
            another.ask(f"http://127.0.0.1:{taken.getsockname()[1]}/none.mp4")


def test_a_killed_engine_ends_the_server(another, media) -> None:
    scraper = Scraper(another.server.url)
    scraper.start()
    stream = streamed(another, media)
    assert next(stream)
    with killed(another, media, "EngineCore"):
        scraper.stop()
    with pytest.raises((openai.APIError, httpx.TransportError)):
        list(stream)


@contextlib.contextmanager
def killed(served: Served, media: Path, name: str) -> Iterator[None]:
    """Kill a process of the server's while somebody waits for an answer, and another has a stream.

    Answers under way fail, nothing hangs, and who watches the server's process starts it again.
    """
    process = served.server.process
    found = [pid for pid, title in descendants(process.pid).items() if name in title]
    assert len(found) == 1, descendants(process.pid)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(served.ask, (media / "other.mp4").as_uri(), max_tokens=ENDLESS)
        wait_for_requests(served, 2)
        os.kill(found[0], signal.SIGKILL)
        with pytest.raises(openai.APIError) as failed:
            waiting.result(END_SECONDS)
        assert not isinstance(failed.value, openai.APITimeoutError), "it hung"
    wait_for(lambda: process.poll() is not None, "end of the server")
    yield
    assert process.returncode != 0, "a container's restart policy asks for this"
    wait_for(lambda: not group(process.pid), "end of its processes")


def streamed(served: Served, media: Path, tokens: int = ENDLESS) -> Iterator:
    """A long answer's chunks."""
    return iter(
        served.client.chat.completions.create(
            model="tiny", messages=about(media / "clip.mp4"), stream=True, max_tokens=tokens,
            extra_body={"ignore_eos": True}, stream_options={"include_usage": True},
        )
    )  # fmt: skip


def test_sigterm_lets_answers_end(checkpoint, media, tmp_path) -> None:
    """``--shutdown-timeout``: what was asked is answered to its end; then all ends well."""
    clip = (media / "clip.mp4").as_uri()
    options = ("--shutdown-timeout", str(DRAIN_SECONDS))
    with serving(checkpoint, media, tmp_path, *options, kind=VllmServer) as served:
        process = served.server.process
        served.client = served.client.with_options(timeout=DRAIN_SECONDS)
        with ThreadPoolExecutor(2) as pool:
            answer, chunks = beside_each_other(
                served, pool,
                lambda: served.ask(clip, max_tokens=1990),
                lambda: list(streamed(served, media, tokens=2000)),
            )  # fmt: skip
            process.send_signal(signal.SIGTERM)
            answer, chunks = answer.result(DRAIN_SECONDS), chunks.result(DRAIN_SECONDS)
        assert answer.tokens == 1990 and chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].usage.completion_tokens == 2000
        # On a machine that stalls the signal may come when both are answered.
        if "draining in-flight requests count=2" in served.server.log.read_text():
            assert chunks[-1].usage.adaspark is None, "an engine that ends answers no questions"
        assert process.wait(END_SECONDS) == 0
        wait_for(lambda: not group(process.pid), "end of its processes")


def test_sigterm_without_a_timeout_ends_answers(checkpoint, media, tmp_path) -> None:
    """vLLM's default: nothing looks like a whole answer, nothing hangs, and all ends well.

    The engine aborts what runs and ends.  Clients get what it had answered, marked as aborted, or
    an error where the engine's end is known first: which of the two is a matter of milliseconds.
    """
    asked = {
        "model": "tiny",
        "messages": about(media / "clip.mp4"),
        "max_tokens": ENDLESS,
        "extra_body": {"ignore_eos": True},
    }
    with serving(checkpoint, media, tmp_path, kind=VllmServer) as served:
        process = served.server.process
        stream = streamed(served, media)
        assert next(stream)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(served.client.chat.completions.create, **asked)
            wait_for_requests(served, 2)
            process.send_signal(signal.SIGTERM)
            try:
                assert waiting.result(END_SECONDS).choices[0].finish_reason == "abort"
            except (openai.InternalServerError, openai.APIConnectionError) as failed:
                assert not isinstance(failed, openai.APITimeoutError), "it hung"
            with contextlib.suppress(openai.APIError, httpx.TransportError):
                reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
                assert reasons[-1:] == ["abort"]
        assert process.wait(END_SECONDS) == 0
        wait_for(lambda: not group(process.pid), "end of its processes")


def group(pgid: int) -> bool:
    try:
        os.killpg(pgid, 0)
    except ProcessLookupError:
        return False
    return True
