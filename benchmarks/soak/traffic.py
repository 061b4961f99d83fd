"""What clients do to a server, well and badly, and whether it answers as when it is idle."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

CHAT = "/v1/chat/completions"
TRACES = "/v1/adaspark/traces"
SETTINGS: tuple[Any, ...] = (
    None,
    {"p_attn": 0.3, "p_ffn": 0.5},
    {"p_attn": 0.8, "min_cubes": 2},
    {"selection": "top_k", "keep": 0.3},
    {"text_queries": "dense"},
    {"prune": 0.5},
    {"p_attn": 1.0, "p_ffn": 1.0},
    "off",
)
BAD_SETTINGS: tuple[Any, ...] = (
    {"p_attn": 0},
    {"p_atn": 0.5},
    {"flops": 0.0001},
    {"min_cubes": 10**9},
    "on",
    [1, 2],
    {"cube": [1, 1, 1]},
)


@dataclass
class Traffic:
    """Clients of one server.

    Attributes:
        url: of the server.
        videos: URLs of good ones.
        bad: URLs of what is no video.
        rng: decides what is asked.
        kinds: how many requests of each kind ended as they should.
        wrong: what did not.
    """

    url: str
    videos: list[str]
    bad: list[str]
    rng: random.Random
    kinds: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _alone: dict[str, str] = field(default_factory=dict)  # by body: the answer when idle
    _client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Traffic:
        # With an expiry of its own httpx closes idle connections also under a request that was just
        # given one: a ReadError, of a ClosedResourceError.  The server keeps them open.
        limits = httpx.Limits(max_connections=200, keepalive_expiry=None)
        self._client = httpx.AsyncClient(base_url=self.url, timeout=600, limits=limits)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.aclose()

    # -- good requests --------------------------------------------------------------------------

    def bodies(self) -> list[dict[str, Any]]:
        """All good requests there are: few, so that each can be asked alone, too."""
        made = []
        for nth, settings in enumerate(SETTINGS):
            for video in self.videos[nth % 3 :: 3]:
                asked = {} if settings is None else mm(settings)
                made.append(body([video], f"What is shown? {'Really? ' * (3 * nth)}") | asked)
        made.append(body(self.videos[:2], "Compare the two.") | mm({"p_attn": 0.5}))
        made.append(body([], "Which number is shown on the card? " * 20))
        return made

    async def ask_alone(self) -> None:
        """Learn the answers of an idle server, one request at a time."""
        for each in self.bodies():
            self._alone[json.dumps(each)] = await self._answer(each)

    async def ask_alone_again(self) -> None:
        """Compare an idle server's answers with those that it gave at first."""
        for each in self.bodies():
            if await self._answer(each) != self._alone[json.dumps(each)]:
                self.wrong.append(f"after the storm: {short(each)}")

    async def _answer(self, each: dict[str, Any]) -> str:
        reply = await self._client.post(CHAT, json=each)
        reply.raise_for_status()
        answer = reply.json()
        return answer["choices"][0]["message"]["content"]

    # -- kinds of requests ------------------------------------------------------------------------

    async def good(self) -> str | None:
        each = self.rng.choice(self.bodies())
        return self._compare(each, await self._answer(each))

    async def streamed(self, pause: float = 0.0) -> str | None:
        """A stream, read at once or slowly."""
        each = self.rng.choice(self.bodies())
        text, usage = "", None
        options = {"stream": True, "stream_options": {"include_usage": True}}
        async with self._client.stream("POST", CHAT, json=each | options) as reply:
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    return f"error in a stream: {chunk['error']}"
                text += "".join(c["delta"].get("content") or "" for c in chunk["choices"])
                usage = chunk.get("usage") or usage
                await asyncio.sleep(pause)
        if not (usage or {}).get("adaspark"):
            return f"no account in the stream's usage: {short(each)}"
        return self._compare(each, text)

    async def slow(self) -> str | None:
        return await self.streamed(pause=0.2)

    async def aborted(self) -> str | None:
        """A client that goes away: before the answer, or in its middle."""
        each = self.rng.choice(self.bodies()) | {"stream": True}
        each |= mm({"p_attn": 0.5, "trace": True}) if self.rng.random() < 0.3 else {}
        try:
            async with asyncio.timeout(self.rng.uniform(0.05, 4)):
                async with self._client.stream("POST", CHAT, json=each) as reply:
                    async for _ in reply.aiter_lines():
                        if self.rng.random() < 0.3:
                            break
        except TimeoutError:
            pass
        return None

    async def bad_media(self) -> str | None:
        return await self._refused(body([self.rng.choice(self.bad)], "What is shown?"))

    async def bad_settings(self) -> str | None:
        settings = self.rng.choice(BAD_SETTINGS)
        return await self._refused(body(self.videos[:1], "What is shown?") | mm(settings))

    async def _refused(self, each: dict[str, Any]) -> str | None:
        reply = await self._client.post(CHAT, json=each)
        if not 400 <= reply.status_code < 500:
            return f"{reply.status_code} for {short(each)}: {reply.text[:200]}"
        return None

    async def traced(self) -> str | None:
        """A trace, looked at and deleted."""
        settings = {"p_attn": 0.5, "trace": True}
        reply = await self._client.post(
            CHAT, json=body([self.rng.choice(self.videos)], "What is shown?") | mm(settings)
        )
        reply.raise_for_status()
        name, listed = reply.json()["id"], (await self._client.get(TRACES)).json()["traces"]
        trace = next((t["id"] for t in listed if t["request_id"].startswith(name)), None)
        if trace is None:
            return f"no trace of {name}"
        for path in ("", "/heat", "/ffn"):
            looked = await self._client.get(f"{TRACES}/{trace}{path}")
            if looked.status_code != 200:
                return f"{looked.status_code} for {path} of a trace: {looked.text[:200]}"
        await self._client.delete(f"{TRACES}/{trace}")
        return None

    async def scraped(self) -> str | None:
        reply = await self._client.get("/metrics")
        if reply.status_code != 200 or "vllm_adaspark:" not in reply.text:
            return f"/metrics: {reply.status_code}"
        return None

    def _compare(self, each: dict[str, Any], answer: str) -> str | None:
        alone = self._alone[json.dumps(each)]
        if answer == alone:
            return None
        return f"{short(each)}: {answer[:60]!r} instead of {alone[:60]!r}"

    # -- the storm --------------------------------------------------------------------------------

    async def storm(self, at_once: int, until: float) -> None:
        """``at_once`` clients that ask one thing after another."""
        await asyncio.gather(*(self._client_of(until) for _ in range(at_once)))

    async def _client_of(self, until: float) -> None:
        kinds: dict[Callable[[], Awaitable[str | None]], int] = {
            self.good: 8,
            self.streamed: 4,
            self.slow: 2,
            self.aborted: 4,
            self.bad_media: 1,
            self.bad_settings: 1,
            self.traced: 1,
            self.scraped: 1,
        }
        while time.monotonic() < until:
            (kind,) = self.rng.choices(list(kinds), list(kinds.values()))
            try:
                wrong = await kind()
            except Exception as error:
                wrong = " of ".join(f"{type(e).__name__}: {e}" for e in causes(error))
            if wrong is None:
                self.kinds[kind.__name__] += 1
            else:
                self.wrong.append(f"{kind.__name__}: {wrong}")
                print(self.wrong[-1], flush=True)

    async def traces_left(self) -> tuple[int, int]:
        """Traces that nobody deleted, and how many of them are not ended; deletes them."""
        listed = (await self._client.get(TRACES)).json()["traces"]
        for trace in listed:
            await self._client.delete(f"{TRACES}/{trace['id']}")
        return len(listed), sum(trace["finished"] is None for trace in listed)

    async def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        lines = (await self._client.get("/metrics")).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


def body(videos: list[str], question: str) -> dict[str, Any]:
    """A greedy request."""
    content: list[dict[str, Any]] = [
        {"type": "video_url", "video_url": {"url": url}} for url in videos
    ]
    content.append({"type": "text", "text": question})
    return {
        "model": "soak",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 16,
        "ignore_eos": True,
    }


def mm(settings: Any) -> dict[str, Any]:
    """The field of a request that has its settings."""
    return {"mm_processor_kwargs": {"adaspark": settings}}


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def short(each: dict[str, Any]) -> str:
    """A request in a line."""
    content = each["messages"][0]["content"]
    names = [part["video_url"]["url"].rpartition("/")[2] for part in content[:-1]]
    return f"{names} {each.get('mm_processor_kwargs')} {content[-1]['text'][:30]!r}"
