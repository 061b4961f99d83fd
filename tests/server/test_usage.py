"""``usage.adaspark`` in the answer: through the real server, and what must not break it."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import video as demo_video  # examples/demo
from serving import Served, about, data_url, mm

from vllm_adaspark.accounts.account import Account, ModelShape

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]
FIELDS = {
    "mode",
    "reason",
    "flops_ratio",
    "attention_density",
    "ffn_density",
    "flops",
    "tokens",
    "video_tokens",
    "cached_tokens",
    "fallback_tokens",
    "selection_seconds",
    "planning_seconds",
    "settings",
}


def create(served: Served, url: str | None, **options):
    """A reply of the OpenAI client; ``options`` are the client's."""
    media = [{"type": "video_url", "video_url": {"url": url}}] if url else []
    content = [*media, {"type": "text", "text": "What happens?"}]
    body = {"ignore_eos": True, **options.pop("extra_body", {})}
    options = {"max_tokens": 8, "temperature": 0, **options}
    reply = served.client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}], extra_body=body, **options
    )
    if not options.get("stream"):
        served.answered += request_ids(reply.id, options.get("n", 1))
    return reply


def request_ids(client_id: str, n: int) -> list[str]:
    """What the report file calls the n answers of a request."""
    return [client_id] if n == 1 else [f"{i}_{client_id}" for i in range(n)]


def cost(reply) -> dict:
    return reply.usage.model_extra["adaspark"]


def comparable(usage: dict) -> dict:
    """Without what differs from run to run."""
    return {k: v for k, v in usage.items() if not k.endswith("_seconds")}


@pytest.fixture
def clip(media: Path) -> str:
    return (media / "clip.mp4").as_uri()


# -- what it says -------------------------------------------------------------------------------


def test_usage_is_the_account_of_the_request(served: Served, clip) -> None:
    reply = create(served, clip, extra_body={"cache_salt": "usage"})
    usage = reply.usage.adaspark
    assert usage.keys() == FIELDS
    line = served.reports(len(served.answered))[reply.id]
    assert usage == {key: line[key] for key in FIELDS}
    assert (usage["mode"], usage["reason"]) == ("sparse", None)
    assert usage["tokens"] == reply.usage.prompt_tokens + reply.usage.completion_tokens - 1
    assert 0 < usage["flops_ratio"] < 1 and usage["cached_tokens"] == 0
    assert usage["settings"]["p_attn"] == 0.6 and usage["settings"]["flops"] is None
    assert usage["selection_seconds"] > 0 and usage["planning_seconds"] > 0


def test_a_stream_says_it_in_its_usage_chunk(served: Served, clip) -> None:
    whole = create(served, clip, extra_body={"cache_salt": "stream a"})
    stream = create(
        served,
        clip,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"cache_salt": "stream b"},
    )
    chunks = list(stream)
    served.answered.append(chunks[0].id)
    with_usage = [chunk for chunk in chunks if chunk.usage is not None]
    assert with_usage == chunks[-1:] and not chunks[-1].choices
    assert comparable(cost(chunks[-1])) == comparable(cost(whole))
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content


def test_a_stream_without_usage_stays_without(served: Served, clip) -> None:
    chunks = list(create(served, clip, stream=True))
    served.answered.append(chunks[0].id)
    assert all(chunk.usage is None for chunk in chunks)


def test_running_usage_stays_as_it_is(served: Served, clip) -> None:
    """With usage in every chunk, only the last, of the whole request, has the account."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(create(served, clip, stream=True, stream_options=options))
    served.answered.append(chunks[0].id)
    told = [(chunk.usage.model_extra or {}).get("adaspark") for chunk in chunks]
    assert told[-1]["mode"] == "sparse" and told[:-1] == [None] * (len(chunks) - 1)


def test_several_answers_add_up(served: Served, clip) -> None:
    reply = create(served, clip, n=3, extra_body={"cache_salt": "n"}, temperature=1)
    assert len(reply.choices) == 3
    reports = served.reports(len(served.answered))
    lines = [reports[name] for name in request_ids(reply.id, 3)]
    usage = cost(reply)
    for key in ("tokens", "video_tokens", "cached_tokens"):
        assert usage[key] == sum(line[key] for line in lines)
    executed = sum(line["flops"]["executed"]["total"] for line in lines)
    assert usage["flops"]["executed"]["total"] == pytest.approx(executed)


def test_why_a_request_ran_dense(served: Served, clip, tmp_path) -> None:
    short = demo_video.write_mp4(tmp_path / "short.mp4", seconds=2, width=168, height=140)
    told = {
        "no_video": cost(create(served, None)),
        "off": cost(create(served, clip, extra_body=mm("off"))),
        "few_cubes": cost(create(served, data_url(short))),
    }
    for reason, usage in told.items():
        assert (usage["mode"], usage["reason"]) == ("dense", reason)
        assert usage["flops_ratio"] == usage["attention_density"] == usage["ffn_density"] == 1
    assert told["no_video"]["settings"] is None
    assert told["off"]["settings"]["order"] == "raster"


def test_usage_tells_the_settings_and_the_budget(served: Served, clip) -> None:
    usage = cost(create(served, clip, extra_body=mm({"flops": 0.9})))
    assert usage["settings"]["flops"] == 0.9 and "p_attn" not in usage["settings"]
    asked = {"selection": "top_k", "keep": 0.5, "compensation": "bypass"}
    usage = cost(create(served, clip, extra_body=mm(asked)))
    assert usage["settings"].items() >= asked.items()


def test_cached_tokens_are_told_and_not_counted(served: Served, clip) -> None:
    cold, warm = (cost(create(served, clip, extra_body={"cache_salt": "warm"})) for _ in range(2))
    assert cold["cached_tokens"] == 0 < warm["cached_tokens"]
    assert cold["tokens"] == warm["tokens"] + warm["cached_tokens"]


def test_concurrent_requests_get_their_own(served: Served, clip) -> None:
    settings = [{"p_attn": 0.3, "p_ffn": 0.3}, {"p_attn": 0.8}, "off"]

    def ask(nth: int, salt: str) -> dict:
        body = {"cache_salt": f"{salt} {nth}", **mm(settings[nth])}
        return comparable(cost(create(served, clip, extra_body=body, max_tokens=32)))

    alone = [ask(nth, "alone") for nth in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(ask, range(3), ["together"] * 3))
    assert len({usage["flops_ratio"] for usage in alone}) == 3
    for mine, theirs in zip(together, alone, strict=True):
        assert mine.pop("flops_ratio") == pytest.approx(theirs.pop("flops_ratio"), rel=1e-3)
        assert (mine["tokens"], mine["settings"]) == (theirs["tokens"], theirs["settings"])


# -- what stays as in stock ---------------------------------------------------------------------


def load(served: Served) -> int:
    with urllib.request.urlopen(f"{served.server.url}/load", timeout=10) as response:
        return json.load(response)["server_load"]


def wait_for_load(served: Served, number: int) -> int:
    deadline = time.monotonic() + 10
    while load(served) != number and time.monotonic() < deadline:
        time.sleep(0.05)
    return load(served)


def test_load_is_tracked(served: Served, clip) -> None:
    create(served, clip)
    assert wait_for_load(served, 0) == 0
    stream = create(served, clip, stream=True, max_tokens=2000)
    served.answered.append(next(iter(stream)).id)
    assert load(served) == 1
    stream.close()
    assert wait_for_load(served, 0) == 0, "a client that goes away is no load"
    with pytest.raises(openai.BadRequestError):
        create(served, clip, extra_body=mm({"p_attn": 2}))
    assert wait_for_load(served, 0) == 0


def test_errors_are_stock(served: Served, media: Path) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        served.client.chat.completions.create(model="nobody", messages=about(media / "clip.mp4"))
    with pytest.raises(openai.BadRequestError, match="messages"):
        served.client.chat.completions.create(model="tiny", messages="hello")
    request = urllib.request.Request(
        f"{served.server.url}/v1/chat/completions", b"{}", {"Content-Type": "text/plain"}
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=10)


# -- what must not break an answer: no server needed --------------------------------------------


def state_with(ask, worker: bool = True) -> SimpleNamespace:
    core = SimpleNamespace(call_utility_all_async=ask, engine_ranks_managed=[0])
    client = SimpleNamespace(engine_core=core)
    return SimpleNamespace(adaspark_accounts=worker, engine_client=client)


def counts() -> dict:
    return Account(ModelShape(8, 4, 2, 2, 16), range(2)).to_counts()


def account_of(state) -> dict | None:
    from vllm_adaspark.server import usage

    return asyncio.run(usage.account_of("chatcmpl-1", state))


@pytest.mark.parametrize("answer", [[[None, None]], [[None], [None]], [[]]])
def test_a_request_that_no_worker_knows(answer) -> None:
    async def ask(*args):
        assert args == ("collective_rpc", "adaspark_usage", None, ("chatcmpl-1",), {})
        return answer

    assert account_of(state_with(ask)) is None


def test_one_engine_of_several_knows_the_request() -> None:
    async def ask(*args):
        return [[None, None], [counts(), counts()]]

    assert account_of(state_with(ask))["reason"] == "no_video"


def test_workers_that_fail_or_never_answer(monkeypatch) -> None:
    from vllm_adaspark.server import usage

    async def fails(*args):
        raise RuntimeError("the engine is dead")

    async def hangs(*args):
        await asyncio.sleep(60)

    monkeypatch.setattr(usage, "SECONDS", 0.05)
    assert account_of(state_with(fails)) is None
    assert account_of(state_with(hangs)) is None


def test_other_workers_are_not_asked() -> None:
    assert account_of(state_with(None, worker=False)) is None


def through(chunks: list[str], state) -> tuple[list[str], list[str]]:
    """(chunks after the route's wrapper, what happened to the stream)."""
    from vllm_adaspark.server.usage import _with_account

    happened = []

    async def stream():
        try:
            for chunk in chunks:
                yield chunk
        finally:
            happened.append("closed")

    async def collect():
        return [chunk async for chunk in _with_account(stream(), state)]

    return asyncio.run(collect()), happened


def test_only_the_usage_chunk_is_touched() -> None:
    async def ask(*args):
        return [[counts()]]

    other = [
        ": keep-alive\n\n",
        'data: {"id":"chatcmpl-1","choices":[{"delta":{"content":"\\"choices\\":[] ü"}}]}\n\n',
        'data: {"id":"chatcmpl-1","choices":[]}\n\n',
        "data: [DONE]\n\n",
    ]
    last = 'data: {"id":"chatcmpl-1","choices":[],"usage":{"prompt_tokens":3}}\n\n'
    got, happened = through([*other[:3], last, other[3]], state_with(ask))
    assert got[:3] + got[4:] == other and happened == ["closed"]
    assert got[3].startswith("data: {") and got[3].endswith("}\n\n")
    told = json.loads(got[3].removeprefix("data: "))
    assert told["usage"].pop("adaspark")["mode"] == "dense"
    assert told == json.loads(last.removeprefix("data: "))


def test_a_stream_that_is_left_is_closed() -> None:
    from vllm_adaspark.server.usage import _with_account

    happened = []

    async def stream():
        try:
            while True:
                yield ": keep-alive\n\n"
        finally:
            happened.append("closed")

    async def leave():
        chunks = _with_account(stream(), state_with(None))
        await anext(chunks)
        await chunks.aclose()
        assert happened == ["closed"]

    asyncio.run(leave())
