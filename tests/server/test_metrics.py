"""GET /metrics: a valid exposition that adds up to the accounts, and never goes backwards."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import Served, about, mm

from vllm_adaspark.accounts.account import Account
from vllm_adaspark.accounts.flops import ModelShape
from vllm_adaspark.accounts.ledger import EDGES
from vllm_adaspark.server import metrics

pytestmark = pytest.mark.server
ROOT = Path(__file__).parents[2]
SETTLE_SECONDS = 60  # on a busy machine; it takes less than one
PARTS = ("qkvo", "attention", "selection", "ffn")


def parse(text: str) -> dict[tuple, float]:
    """Samples by (name, labels without the model's name); every family comes once."""
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    samples = [sample for family in families for sample in family.samples]
    by_key = {
        (s.name, *sorted((k, v) for k, v in s.labels.items() if k != "model_name")): s.value
        for s in samples
    }
    assert len(by_key) == len(samples), "a series is there twice"
    return by_key


class Scrape(dict):
    """What a scrape said."""

    def __init__(self, text: str) -> None:
        super().__init__(parse(text))

    def get_total(self, name: str, **labels: str) -> float:
        """Sum over the series of that name that have these labels."""
        wanted = set(labels.items())
        name = f"vllm_adaspark:{name}"
        return sum(v for (n, *have), v in self.items() if n == name and wanted <= set(have))

    def counters(self) -> dict[tuple, float]:
        ends = ("_total", "_bucket", "_count", "_sum")
        return {
            k: v
            for k, v in self.items()
            if k[0].startswith("vllm_adaspark:") and k[0].endswith(ends)
        }


def scrape(served: Served) -> Scrape:
    with urllib.request.urlopen(f"{served.server.url}/metrics", timeout=120) as response:
        assert response.headers["content-type"].startswith("text/plain; version=")
        return Scrape(response.read().decode())


def fresh_scrape(served: Served) -> Scrape:
    """A scrape that knows of all that ended before: an answer is good for a second."""
    time.sleep(metrics.FRESH_SECONDS)
    return scrape(served)


def settled(served: Served, ended: float) -> Scrape:
    """A scrape once so many requests have ended: the engine hears of it a moment later."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        now = scrape(served)
        if now.get_total("requests_total") >= ended or time.monotonic() > deadline:
            return now
        time.sleep(0.1)


def ask(served: Served, clip: str | None, **body) -> dict:
    """The account in the answer."""
    media = [{"type": "video_url", "video_url": {"url": clip}}] if clip else []
    reply = served.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": [*media, {"type": "text", "text": "What?"}]}],
        max_tokens=8,
        temperature=0,
        extra_body={"ignore_eos": True, **body},
    )
    served.answered.append(reply.id)
    return reply.usage.adaspark


@pytest.fixture
def clip(media: Path) -> str:
    return (media / "clip.mp4").as_uri()


# -- through the real server --------------------------------------------------------------------


def test_looped_scrapes_do_not_stall_answers(served: Served, clip) -> None:
    """The real server, scraped from four threads while it answers."""
    stop = threading.Event()
    failed: list[Exception] = []

    def loop() -> None:
        while not stop.is_set():
            try:
                assert scrape(served).get_total("up") == 1
            except Exception as error:
                failed.append(error)
                return

    threads = [threading.Thread(target=loop) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        usage = ask(served, clip, cache_salt="scraped")
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert usage["mode"] == "sparse" and failed == []


def test_vllms_series_and_ours(served: Served) -> None:
    now = scrape(served)
    assert now.get_total("up") == 1
    assert any(name.startswith("vllm:time_to_first_token_seconds") for name, *_ in now)
    assert any(name.startswith("python_info") for name, *_ in now)
    ours = {key for key in now if key[0].startswith("vllm_adaspark:")}
    of_engine = {k for k in ours if ("engine", "0") in k}
    assert {k[0] for k in ours - of_engine} == {
        "vllm_adaspark:up",
        "vllm_adaspark:requests_total",
        "vllm_adaspark:requests_created",
    }
    assert {value for k in of_engine for label, value in k[1:] if label == "layers"} == set("0123")


def test_metrics_add_up_to_the_accounts(served: Served, clip) -> None:
    before = fresh_scrape(served)
    accounts = [
        ask(served, clip, cache_salt="metrics"),
        ask(served, clip, cache_salt="metrics"),
        ask(served, clip, **mm({"p_attn": 0.2, "p_ffn": 0.2})),
        ask(served, clip, **mm("off")),
        ask(served, clip, **mm({"prune": 0.5})),
        ask(served, None),
    ]
    after = settled(served, before.get_total("requests_total") + len(accounts))

    def grew(name: str, **labels: str) -> float:
        return after.get_total(name, **labels) - before.get_total(name, **labels)

    for kind in ("executed", "dense"):
        for part in PARTS:
            want = sum(account["flops"][kind].get(part, 0) for account in accounts)
            assert grew(f"{kind}_flops_total", part=part) == pytest.approx(want)
    video = sum(account["video_tokens"] for account in accounts)
    tokens = sum(account["tokens"] for account in accounts)
    assert grew("tokens_total", kind="video") == video
    assert grew("tokens_total", kind="text") == tokens - video
    dropped = sum(account["dropped_tokens"] for account in accounts)
    assert grew("dropped_tokens_total") == dropped > 0
    for reason in ("cut_cube", "mixed_block", "long_text"):
        want = sum(account["fallback_tokens"][reason] for account in accounts)
        assert grew("planner_fallback_tokens_total", reason=reason) == want
    for name in ("selection_seconds", "planning_seconds"):
        want = sum(account[name] for account in accounts)
        assert grew(f"{name}_total") == pytest.approx(want) and want > 0
    assert grew("requests_total", mode="sparse", reason="") == 4
    assert grew("requests_total", mode="dense", reason="off") == 1
    assert grew("requests_total", mode="dense", reason="no_video") == 1
    assert grew("requests_total") == 6

    with_video = accounts[:5]
    for name, field in (
        ("attention_density", "attention_density"),
        ("ffn_density", "ffn_density"),
    ):
        groups = [str(layer) for layer in range(4)]
        assert [grew(f"{name}_count", layers=group) for group in groups] == [5] * 4
        # A group is a layer here, and an account's density is the mean of its layers'.
        want = sum(account[field] for account in with_video)
        assert grew(f"{name}_sum") / 4 == pytest.approx(want)


def test_refused_requests_are_counted_with_the_reason(served: Served, media: Path, clip) -> None:
    long, longer = ((media / name).as_uri() for name in ("long.mp4", "longer.mp4"))
    refused = {
        "settings": [(clip, mm({"p_attn": 2})), (clip, mm({"p_atn": 0.5})), (clip, mm(7))],
        "media": [
            ((media / "garbage.mp4").as_uri(), {}),
            ((media / "one-frame.mp4").as_uri(), {}),
            ("data:video/mp4;base64,@@@@", {}),
            ((media.parent / "outside.mp4").as_uri(), {}),
        ],
        "too_long": [(long, {}), (longer, {})],
    }
    for reason, requests in refused.items():
        before = scrape(served)
        for url, body in requests:
            with pytest.raises(openai.BadRequestError):
                ask(served, url, **body)
        after = scrape(served)
        grew = {
            why: after.get_total("requests_total", mode="refused", reason=why)
            - before.get_total("requests_total", mode="refused", reason=why)
            for why in ("settings", "media", "too_long", "other")
        }
        assert grew == dict.fromkeys(grew, 0) | {reason: len(requests)}


def test_a_request_refused_in_its_stream_is_counted(served: Served, media: Path) -> None:
    """The engine checks a prompt's length when it takes it, after the stream has begun."""
    before = scrape(served)
    with pytest.raises(openai.APIError):
        list(served.client.chat.completions.create(
            model="tiny", messages=about(media / "long.mp4"), stream=True
        ))  # fmt: skip
    assert scrape(served).get_total("requests_total", mode="refused") == 1 + before.get_total(
        "requests_total", mode="refused"
    )


def test_an_unknown_model_is_another_refusal(served: Served) -> None:
    before = scrape(served).get_total("requests_total", mode="refused", reason="other")
    with pytest.raises(openai.NotFoundError):
        served.client.chat.completions.create(
            model="nobody", messages=[{"role": "user", "content": "?"}]
        )
    assert scrape(served).get_total("requests_total", mode="refused", reason="other") == before + 1


def grown(served: Served, tokens: float) -> Scrape:
    """A scrape with more tokens than these."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        now = scrape(served)
        if now.get_total("tokens_total") > tokens or time.monotonic() > deadline:
            return now


def test_counters_grow_while_a_request_runs(served: Served, media: Path) -> None:
    scrapes = [fresh_scrape(served)]
    stream = served.client.chat.completions.create(
        model="tiny",
        messages=about(media / "clip.mp4"),
        max_tokens=3000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    served.answered.append(next(iter(stream)).id)
    for _ in range(3):
        scrapes.append(grown(served, scrapes[-1].get_total("tokens_total")))
    stream.close()
    before = scrapes[0].get_total("requests_total")
    running = [now for now in scrapes[1:] if now.get_total("requests_total") == before]
    grew = running[0].get_total("tokens_total") > scrapes[0].get_total("tokens_total")
    assert grew, "tokens count with every step, a request once it has ended"
    scrapes.append(settled(served, before + 1))
    assert scrapes[-1].get_total("requests_total") == before + 1
    for earlier, later in pairwise(scrapes):
        later_counters = later.counters()
        assert all(later_counters[key] >= value for key, value in earlier.counters().items())


def test_the_dashboard_and_the_rules_use_what_is_there(served: Served) -> None:
    names = {name for name, *_ in scrape(served)}
    board = json.loads((ROOT / "deploy/grafana/adaspark.json").read_text())
    rules = (ROOT / "deploy/prometheus/rules.yml").read_text()
    text = "\n".join(
        target["expr"] for panel in board["panels"] for target in panel.get("targets", [])
    )
    recorded = set(re.findall(r"record: (\S+)", rules))
    used = set(re.findall(r"\bvllm(?:_adaspark)?:\w+", text + rules)) - recorded
    used -= {"vllm_adaspark:mean"}  # of VideoNSA's gates: other servers have none
    assert len(used) > 12 and used <= names, used - names


# -- ranks and engines: no server needed --------------------------------------------------------

SHAPE = ModelShape(hidden=8, heads=4, kv_heads=4, head_size=2, intermediate=16)


def rank(
    layers: range, pairs: float, densities: dict[str, tuple[int, float]], ended: int = 2
) -> dict:
    """What a rank sends; ``densities``: group to (its layers here, density of all requests)."""
    account = Account(SHAPE, layers)
    account.tokens, account.video_tokens, account.dense_pairs = 100, 80, 1000.0
    account.pairs[:] = pairs
    account.selection_seconds = 0.5

    def histogram(layers: int, density: float) -> dict:
        observed = np.zeros(len(EDGES))
        observed[np.searchsorted(EDGES, density)] = ended
        return {"layers": layers, "counts": observed.tolist(), "sum": density * ended}

    histograms = {group: histogram(*seen) for group, seen in densities.items()}
    return {
        "total": account.to_counts(),
        "requests": [["sparse", None, ended], ["dense", "off", 1]],
        "attention_density": histograms,
        "ffn_density": histograms,
        "traces": {"held": 1, "bytes": 1000},
    }


def rendered(engines: dict[int, list[dict]]) -> Scrape:
    from prometheus_client import CollectorRegistry, generate_latest

    from vllm_adaspark.server.metrics import families

    class Collector:
        def collect(self):
            return families("m", engines)

    registry = CollectorRegistry()
    registry.register(Collector())
    return Scrape(generate_latest(registry).decode())


def test_tensor_parallel_ranks_are_averaged() -> None:
    left = rank(range(2), 200.0, {"0": (1, 0.2), "1": (1, 0.4)})
    right = rank(range(2), 400.0, {"0": (1, 0.6), "1": (1, 0.4)})
    now = rendered({0: [left, right]})
    assert now.get_total("executed_flops_total", part="attention") == 2 * 300 * 32
    assert now.get_total("dense_flops_total", part="attention") == 2 * 1000 * 32
    assert now.get_total("tokens_total") == 100
    assert now.get_total("selection_seconds_total") == 0.5
    assert now.get_total("requests_total") == 3
    assert now.get_total("traces") == 1 and now.get_total("trace_bytes") == 2000
    group = {"layers": "0"}
    assert now.get_total("attention_density_count", **group) == 2
    assert now.get_total("attention_density_sum", **group) == pytest.approx(2 * 0.4)
    # Half of each request was seen at 0.2, half at 0.6.
    edges = {"0.15": 0, "0.2": 1, "0.5": 1, "0.6": 2, "+Inf": 2}
    assert {le: now.get_total("attention_density_bucket", le=le, **group) for le in edges} == edges


def test_pipeline_stages_are_joined() -> None:
    first = rank(range(0, 3), 200.0, {"0-1": (2, 0.2), "2-3": (1, 0.3)})
    second = rank(range(3, 8), 400.0, {"2-3": (1, 0.5), "4-5": (2, 0.7), "6-7": (2, 0.9)})
    now = rendered({0: [first, second]})
    assert now.get_total("executed_flops_total", part="attention") == (3 * 200 + 5 * 400) * 32
    assert now.get_total("dense_flops_total", part="attention") == 8 * 1000 * 32
    assert now.get_total("tokens_total") == 100 and now.get_total("requests_total") == 3
    assert now.get_total("selection_seconds_total") == 1.0, "one stage after the other"
    sums = {
        group: now.get_total("attention_density_sum", layers=group) / 2
        for group in ("0-1", "2-3", "4-5", "6-7")
    }
    assert sums == pytest.approx({"0-1": 0.2, "2-3": 0.4, "4-5": 0.7, "6-7": 0.9})


def test_data_parallel_engines_are_kept_apart() -> None:
    now = rendered({
        0: [rank(range(2), 200.0, {"0": (1, 0.2)})],
        3: [rank(range(2), 400.0, {"0": (1, 0.6)}, ended=5)],
    })  # fmt: skip
    assert now.get_total("executed_flops_total", part="attention", engine="3") == 2 * 400 * 32
    assert now.get_total("requests_total", engine="0") == 3
    assert now.get_total("requests_total", engine="3") == 6
    assert now.get_total("attention_density_count", engine="3", layers="0") == 5


# -- when the workers do not answer, and with several API servers: no server needed --------------


def stock_app(ask) -> object:
    """vLLM's own /metrics with ours in its place, over an engine whose workers ``ask`` answers."""
    from fastapi import FastAPI
    from vllm.entrypoints.serve.instrumentator.metrics import attach_router

    app = FastAPI()
    metrics.attach(app)  # first come, first served
    attach_router(app)
    core = SimpleNamespace(call_utility_all_async=ask, engine_ranks_managed=[0])
    app.state.engine_client = SimpleNamespace(engine_core=core)
    app.state.adaspark_accounts = ask is not None
    model = SimpleNamespace(served_model_name="m")
    app.state.vllm_config = SimpleNamespace(model_config=model)
    return app


def get(app: object, path: str = "/metrics") -> Scrape:
    from starlette.testclient import TestClient

    response = TestClient(app).get(path)
    assert response.status_code == 200
    return Scrape(response.text)


def test_workers_that_fail_or_never_answer(monkeypatch) -> None:
    async def fails(*args):
        raise RuntimeError("the engine is dead")

    async def hangs(*args):
        await asyncio.sleep(60)

    async def without_accounts(*args):
        return [[None]]

    monkeypatch.setattr(metrics, "SECONDS", 0.05)
    for ask in (fails, hangs, without_accounts):
        now = get(stock_app(ask))
        assert now.get_total("up") == 0
        ours = {name for name, *_ in now if name.startswith("vllm_adaspark:")}
        assert "vllm_adaspark:up" in ours and not any("flops" in name for name in ours)
        assert any(name.startswith("python_info") for name, *_ in now), "vLLM's own are served"


class Engine:
    """Workers that answer when they are let, and count how often they were asked."""

    def __init__(self, answer: object = None) -> None:
        self.asked, self.answers, self.answer = 0, asyncio.Event(), answer

    async def __call__(self, *args) -> list:
        self.asked += 1
        await self.answers.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return [[rank(range(2), 200.0, {"0": (1, 0.2)})]]


async def get_many(app: object, number: int) -> list[Scrape]:
    """So many scrapes at once, through the application."""
    import httpx

    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        replies = await asyncio.gather(*(client.get("/metrics") for _ in range(number)))
    assert {reply.status_code for reply in replies} == {200}
    return [Scrape(reply.text) for reply in replies]


@pytest.fixture
def long_good(monkeypatch) -> None:
    """An answer stays good however long a busy machine takes over the scrapes of a test."""
    monkeypatch.setattr(metrics, "FRESH_SECONDS", 3600.0)


@pytest.mark.usefixtures("long_good")
def test_scrapes_share_one_question_and_its_answer(monkeypatch) -> None:
    """However many ask: the route needs no key, and workers answer between two steps."""

    async def scrape_often() -> None:
        engine = Engine()
        app = stock_app(engine)
        many = asyncio.create_task(get_many(app, 30))
        while not engine.asked:
            await asyncio.sleep(0)
        engine.answers.set()
        first = await many
        later = await get_many(app, 30)
        assert engine.asked == 1
        assert {now.get_total("up") for now in first + later} == {1}
        assert {now.get_total("tokens_total") for now in first + later} == {100}
        assert {now.get_total("requests_total") for now in first + later} == {3}
        monkeypatch.setattr(app.state.adaspark_metrics, "_fresh", -1)
        await get_many(app, 1)
        assert engine.asked == 2, "it is asked again once the answer is old"

    asyncio.run(scrape_often())


@pytest.mark.usefixtures("long_good")
def test_an_engine_that_does_not_answer_is_asked_once(monkeypatch) -> None:
    """A question cannot be taken back: each would wait in the engine's queue."""
    monkeypatch.setattr(metrics, "SECONDS", 0.05)

    async def scrape_a_silent_engine() -> None:
        engine = Engine()
        app = stock_app(engine)
        for _ in range(3):
            assert {now.get_total("up") for now in await get_many(app, 5)} == {0}
        assert engine.asked == 1
        engine.answers.set()
        await asyncio.sleep(0)
        assert {now.get_total("up") for now in await get_many(app, 5)} == {1}
        assert engine.asked == 1, "the late answer is good, too"

    asyncio.run(scrape_a_silent_engine())


@pytest.mark.usefixtures("long_good")
def test_an_engine_that_fails_is_asked_again_but_not_by_everybody() -> None:
    async def scrape_a_failing_engine() -> None:
        engine = Engine(RuntimeError("dead"))
        engine.answers.set()
        app = stock_app(engine)
        assert {now.get_total("up") for now in await get_many(app, 5)} == {0}
        assert engine.asked == 1
        app.state.engine_client.errored = True
        app.state.adaspark_metrics._fresh = -1
        assert {now.get_total("up") for now in await get_many(app, 5)} == {0}
        assert engine.asked == 1, "one that is known to be dead is not asked at all"

    asyncio.run(scrape_a_failing_engine())


def test_a_scraper_that_goes_away_takes_nobody_with_it() -> None:
    async def leave() -> None:
        engine = Engine()
        app = stock_app(engine)
        one, other = (asyncio.create_task(get_many(app, 1)) for _ in range(2))
        while not engine.asked:
            await asyncio.sleep(0)
        one.cancel()
        engine.answers.set()
        assert (await other)[0].get_total("up") == 1 and engine.asked == 1

    asyncio.run(leave())


def test_another_worker_class_has_vllms_series_only() -> None:
    now = get(stock_app(None))
    assert ("vllm_adaspark:up",) not in now and any("python_info" in name for name, *_ in now)


SEVERAL_API_SERVERS = """
import asyncio, os, sys
from types import SimpleNamespace
from prometheus_client import Counter
from vllm_adaspark.server import metrics, refusals

refusals.expose("m")
model = SimpleNamespace(served_model_name="m")
state = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model))
for _ in range(int(sys.argv[1])):
    refusals.count_error(state, ValueError("mm_processor_kwargs.adaspark: no"))
if len(sys.argv) > 2:
    from test_metrics import get, rank, stock_app
    async def ask(*args):
        return [[rank(range(2), 200.0, {"0": (1, 0.2)})]]
    now = get(stock_app(ask))
    print(now.get_total("requests_total", mode="refused"), now.get_total("requests_total"))
"""


def test_refusals_of_several_api_servers_are_added(tmp_path) -> None:
    """vLLM then has each process leave its counts in PROMETHEUS_MULTIPROC_DIR."""
    import os

    env = os.environ | {
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }

    def process(*arguments: str) -> str:
        command = [sys.executable, "-c", SEVERAL_API_SERVERS, *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    process("2")
    assert process("3", "scrape")[-2:] == ["5.0", "8.0"]


def test_an_api_key_guards_answers_and_not_metrics(monkeypatch) -> None:
    """vLLM's whole application with our plugin in it, as a server with --api-key builds it."""
    import vllm.plugins
    from starlette.testclient import TestClient
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # vLLM loads plugins once in a process: those of later tests must not be these.
    monkeypatch.setattr(vllm.plugins, "plugins_loaded", True)
    monkeypatch.setenv("VLLM_PLUGINS", "adaspark_http")
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--api-key", "secret"])
    app = build_app(args, ("generate",))
    app.state.adaspark_accounts = False
    routes = [
        (route.path, route.endpoint.__module__)
        for route in app.routes
        if getattr(route, "path", "") in ("/metrics", "/v1/chat/completions")
        and hasattr(route, "endpoint")
    ]
    assert sorted(routes) == [
        ("/metrics", "vllm_adaspark.server.metrics"),
        ("/v1/chat/completions", "vllm_adaspark.server.usage"),
    ]
    client = TestClient(app)
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
    assert client.post("/v1/chat/completions", json=body).status_code == 401
    wrong = {"Authorization": "Bearer wrong"}
    assert client.post("/v1/chat/completions", json=body, headers=wrong).status_code == 401
    assert client.get("/metrics").status_code == 200
