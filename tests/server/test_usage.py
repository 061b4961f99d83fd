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

from vllm_adaspark.accounts.account import Account
from vllm_adaspark.accounts.flops import ModelShape

pytestmark = pytest.mark.server
WAIT_SECONDS = 60  # on a busy machine; it takes less than one
FIELDS = {
    "mode",
    "reason",
    "flops_ratio",
    "attention_density",
    "ffn_density",
    "flops",
    "tokens",
    "video_tokens",
    "dropped_tokens",
    "cached_tokens",
    "fallback_tokens",
    "selection_seconds",
    "planning_seconds",
    "settings",
    "budget",
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


def test_usage_tells_what_was_dropped(served: Served, clip) -> None:
    """Two requests about one video prune it differently; dense is the same."""
    whole, pruned = (
        create(served, clip, extra_body=mm({"p_attn": 1.0, "p_ffn": 1.0, "prune": share}))
        for share in (0.0, 0.5)
    )
    told = cost(pruned)
    assert told["dropped_tokens"] == told["video_tokens"] == cost(whole)["video_tokens"] // 2
    assert pruned.usage.prompt_tokens == whole.usage.prompt_tokens - told["dropped_tokens"]
    assert told["flops"]["dense"] == pytest.approx(cost(whole)["flops"]["dense"])
    assert told["flops"]["dropped"]["total"] == pytest.approx(
        (1 - told["flops_ratio"]) * told["flops"]["dense"]["total"]
    )
    assert (told["mode"], told["settings"]["prune"]) == ("sparse", 0.5)


def test_cached_tokens_are_told_and_not_counted(served: Served, clip) -> None:
    cold, warm = (cost(create(served, clip, extra_body={"cache_salt": "warm"})) for _ in range(2))
    assert cold["cached_tokens"] == 0 < warm["cached_tokens"]
    assert cold["tokens"] == warm["tokens"] + warm["cached_tokens"]


def test_text_needs_no_workers_and_its_cost_is_the_same(served: Served, clip) -> None:
    """What is worked out from the answer's tokens is what the workers counted."""
    question = "Which number is shown on the card? " * 30

    def ask(stream: bool):
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        reply = served.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": question}], max_tokens=9,
            temperature=0, extra_body={"ignore_eos": True, **mm({"trace": True})}, **options,
        )  # fmt: skip
        reply = list(reply)[-1] if stream else reply
        served.answered.append(reply.id)
        return reply

    for reply in (ask(False), ask(True), ask(False)):
        usage, line = cost(reply), served.reports(len(served.answered))[reply.id]
        assert usage.keys() == FIELDS
        for key in FIELDS - {"planning_seconds", "flops"}:
            assert usage[key] == pytest.approx(line[key]), key
        for kind, parts in usage["flops"].items():
            assert parts == pytest.approx(line["flops"][kind])
        assert usage["tokens"] + usage["cached_tokens"] == reply.usage.prompt_tokens + 8
        assert reply.usage.prompt_tokens_details.cached_tokens == usage["cached_tokens"]
    assert usage["cached_tokens"] > 64


def test_a_beam_search_is_counted_as_one(served: Served, clip) -> None:
    options = {"use_beam_search": True, "cache_salt": "beams"}
    reply = create(served, clip, n=3, extra_body=options, max_tokens=5)
    served.answered = served.answered[:-3]
    usage = cost(reply)
    assert len(reply.choices) == 3 and usage["mode"] == "sparse"
    # One request at first, then three a step.  Each starts anew, from the cached blocks.
    requests = 1 + 3 * 4
    prompt = reply.usage.prompt_tokens
    computed = usage["tokens"] + usage["cached_tokens"]
    assert requests * prompt <= computed <= requests * (prompt + 5)
    assert usage["cached_tokens"] >= 3 * 3 * 256
    assert usage["settings"]["p_attn"] == 0.6 and 0 < usage["flops_ratio"] < 1
    lines = served.reports(len(served.answered) + requests)
    mine = [line for name, line in lines.items() if name.startswith(f"{reply.id}-")]
    served.answered += [name for name in lines if name.startswith(f"{reply.id}-")]
    assert len(mine) == requests
    assert sum(line["tokens"] for line in mine) == usage["tokens"]
    text = create(served, None, n=2, extra_body={"use_beam_search": True}, max_tokens=3)
    served.answered = served.answered[:-2]
    assert cost(text)["reason"] == "no_video"
    lines = served.reports(len(served.answered) + 1 + 2 * 2)
    served.answered += [name for name in lines if name.startswith(f"{text.id}-")]


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
    with urllib.request.urlopen(f"{served.server.url}/load", timeout=120) as response:
        return json.load(response)["server_load"]


def wait_for_load(served: Served, number: int) -> int:
    deadline = time.monotonic() + WAIT_SECONDS
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
        urllib.request.urlopen(request, timeout=120)


# -- requests that are odd, but not ours to refuse ------------------------------------------------

TOOL = {"type": "function", "function": {"name": "see", "parameters": {"type": "object"}}}
NOTHING_RAN = "beams of no tokens"
STOCK_FAILS = ("echo", "many answers")  # with HTTP 500, where the echoed message has a video
ODD = {
    "no messages": {"messages": []},
    "an empty message": {"messages": [{"role": "user", "content": ""}]},
    "no content": {"messages": [{"role": "user", "content": []}]},
    "a null": {"messages": [{"role": "user", "content": None}]},
    "n": {"n": 4, "max_tokens": 2, "temperature": 1},
    "no answers": {"n": 0},
    "many answers": {"n": 100_000},
    "top_logprobs": {"logprobs": True, "top_logprobs": 20},
    "huge top_logprobs": {"logprobs": True, "top_logprobs": 1_000_000},
    "all logprobs": {"logprobs": True, "top_logprobs": -1},
    "prompt_logprobs": {"prompt_logprobs": 3},
    "echo": {"echo": True, "add_generation_prompt": False},
    "stop": {"stop": ["a", "e", " "], "ignore_eos": False},
    "a stop of nothing": {"stop": [""]},
    "tools": {"tools": [TOOL]},
    "one tool": {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "see"}}},
    "no tokens": {"max_tokens": 0},
    "minus one token": {"max_tokens": -1},
    "one token": {"max_tokens": 1},
    "json": {"response_format": {"type": "json_object"}},
    "token ids": {"return_token_ids": True},
    NOTHING_RAN: {"use_beam_search": True, "n": 2, "max_tokens": 0},
    "more beams than logprobs": {"use_beam_search": True, "n": 40},
    "an id": {"request_id": "0_1_a-beam"},
    "an id of its own kind": {"request_id": f"x-{'0' * 16}-beam-0"},
    "a long id": {"request_id": "x" * 50_000},
    "an id of signs": {"request_id": "../%s {} [a-z]+(\\ \n\0 ü"},
    "priority": {"priority": 7},
    "a long text": {"messages": [{"role": "user", "content": "x " * 20_000}]},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("video", [False, True], ids=["text", "video"])
def test_odd_requests(served: Served, clip, video: bool, stream: bool) -> None:
    """All with a trace: the answer is a good one or a clear refusal, and the next is as ever."""
    before = create(served, clip, max_tokens=4).choices[0].message.content
    media = [{"type": "video_url", "video_url": {"url": clip}}] if video else []
    content = [*media, {"type": "text", "text": "What happens?"}]
    shared = {"model": "tiny", "max_tokens": 4, "temperature": 0, **mm({"trace": True})}
    if stream:
        shared |= {"stream": True, "stream_options": {"include_usage": True}}
    for name, options in ODD.items():
        body = shared | {"messages": [{"role": "user", "content": content}]} | options
        if "request_id" in body:  # each is used once
            body["request_id"] = f"{video:d}{stream:d}{body['request_id']}"
        status, text = post(served, body)
        assert status in (200, 400, 404) or name in STOCK_FAILS, (name, status, text)
        if status != 200:
            assert "error" in json.loads(text)
        elif not stream:
            usage = json.loads(text)["usage"]
            assert (usage["adaspark"] or {}).get("tokens", 0) > 0 or name == NOTHING_RAN, name
        elif '"usage":' in text:  # else it was refused in its stream
            assert '"adaspark":{"mode":' in text or name == NOTHING_RAN, (name, text[-600:])
        assert served.health() == 200, name
    unanswered(served)
    assert create(served, clip, max_tokens=4).choices[0].message.content == before


def post(served: Served, body: dict) -> tuple[int, str]:
    """(status, text) of a request that the client would not send."""
    request = urllib.request.Request(
        f"{served.server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def unanswered(served: Served) -> None:
    """Note requests that were not asked by way of the client, once all have ended."""
    wait_for_load(served, 0)
    create(served, None)
    mine = served.answered[-1]
    deadline = time.monotonic() + WAIT_SECONDS
    while mine not in (lines := served.reports(0)) and time.monotonic() < deadline:
        time.sleep(0.05)
    served.answered += [name for name in lines if name not in served.answered]


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


@pytest.mark.parametrize("answer", [[[None, None]], [[None], [None]], [[]], [[counts(), None]]])
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


def test_nobody_waits_for_an_engine_that_ends() -> None:
    """Nor does whoever had asked before: a stream would be cut off while it waits."""
    from vllm_adaspark.server import plugin, usage

    asked = []

    async def hangs(*args):
        asked.append(args)
        await asyncio.Event().wait()

    async def end() -> None:
        state = state_with(hangs)
        client = state.engine_client
        client.errored, client.shutdown = False, lambda timeout: None
        plugin.watch_the_end(client)
        waiting = asyncio.create_task(usage.account_of("chatcmpl-1", state))
        while not asked:
            await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, client.shutdown, 600)
        assert await waiting is None
        assert await usage.account_of("chatcmpl-2", state) is None and len(asked) == 1

    asyncio.run(asyncio.wait_for(end(), usage.SECONDS / 2))


def test_other_workers_are_not_asked() -> None:
    assert account_of(state_with(None, worker=False)) is None


def through(chunks: list[str], state, one: bool = False) -> tuple[list[str], list[str]]:
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
        return [chunk async for chunk in _with_account(stream(), state, one)]

    return asyncio.run(collect()), happened


def text_state(shows_details: bool) -> SimpleNamespace:
    """A server whose workers must not be asked."""

    async def ask(*args):
        raise AssertionError("nobody needs to be asked")

    state = state_with(ask)
    config = {
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
    }
    model = SimpleNamespace(hf_text_config=SimpleNamespace(**config))
    state.vllm_config = SimpleNamespace(model_config=model)
    state.adaspark_shows_details = shows_details
    return state


def usage_chunk(details: dict) -> str:
    usage = {"prompt_tokens": 100, "completion_tokens": 5, "prompt_tokens_details": details}
    return f"data: {json.dumps({'id': 'c', 'choices': [], 'usage': usage}, separators=(',', ':'))}"


@pytest.mark.parametrize("shows_details", [False, True])
def test_nobody_is_asked_about_text(shows_details) -> None:
    state = text_state(shows_details)
    got, _ = through([usage_chunk({"cached_tokens": 64})], state, one=True)
    told = json.loads(got[0].removeprefix("data: "))["usage"]
    assert ("prompt_tokens_details" in told) == shows_details
    account = told["adaspark"]
    assert account.keys() == FIELDS
    assert (account["mode"], account["reason"], account["settings"]) == ("dense", "no_video", None)
    assert (account["tokens"], account["cached_tokens"], account["video_tokens"]) == (40, 64, 0)
    pairs = sum(range(65, 105))  # tokens 64 to 103, each sees itself and all before
    assert account["flops"]["dense"]["attention"] == 3 * pairs * 4 * 4 * 2
    assert account["flops_ratio"] == account["attention_density"] == account["ffn_density"] == 1


@pytest.mark.parametrize(
    "details, one",
    [({"cached_tokens": 0, "multimodal_tokens": {"video": 3}}, True), ({"cached_tokens": 0}, False),
     ({}, True), (None, True)],
    ids=["video", "several requests", "unknown", "null"],
)  # fmt: skip
def test_the_workers_are_asked_about_all_else(details, one) -> None:
    asked = []

    async def ask(*args):
        asked.append(args)
        return [[counts()]]

    got, _ = through([usage_chunk(details)], state_with(ask), one=one)
    assert len(asked) == 1 and '"adaspark":{"mode":"dense"' in got[0]


def test_an_answer_gets_through_whatever_fails() -> None:
    """Here the server's model has no text config."""
    state = text_state(True)
    state.vllm_config = None
    chunk = usage_chunk({"cached_tokens": 64})
    assert through([chunk, 'data: {"error": 3}\n\n'], state, one=True)[0][0] == chunk


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
