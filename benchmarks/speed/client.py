"""Requests to a server under test, timed as its client sees them."""

from __future__ import annotations

import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import openai

QUESTION = "What happens in the video?"
SECONDS = 900  # for one answer


@dataclass(frozen=True)
class Answer:
    """How long a request took, and what it was."""

    first: float  # seconds to the first token
    last: float  # seconds to the last
    tokens: int  # of the answer
    prompt_tokens: int
    flops_ratio: float | None  # executed over dense, where the server says so

    @property
    def per_token(self) -> float:
        """Seconds per token after the first (TPOT)."""
        return (self.last - self.first) / (self.tokens - 1)


class Client:
    """Of the server at ``url``, which serves ``model``."""

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model = url, model
        self._openai = openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", timeout=SECONDS, max_retries=0
        )

    def ask(self, video: str, settings: dict | None, max_tokens: int = 1) -> Answer:
        """One question about a video, answered with exactly so many tokens."""
        extra: dict[str, Any] = {"ignore_eos": True}
        if settings is not None:
            extra["mm_processor_kwargs"] = {"adaspark": settings}
        media = {"type": "video_url", "video_url": {"url": video}}
        content = [media, {"type": "text", "text": QUESTION}]
        began = time.perf_counter()
        stream = self._openai.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": content}],
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
        first = last = usage = None
        for chunk in stream:  # the first comes with the first token, the last but one with the last
            if chunk.choices:
                last = time.perf_counter() - began
                first = first or last
            usage = chunk.usage or usage
        account = (usage.model_extra or {}).get("adaspark")
        return Answer(
            first=first,
            last=last,
            tokens=usage.completion_tokens,
            prompt_tokens=usage.prompt_tokens,
            flops_ratio=account["flops_ratio"] if account else None,
        )

    def ask_at_once(
        self, videos: list[str], settings: dict | None, max_tokens: int
    ) -> tuple[float, list[Answer]]:
        """(seconds until all are answered, answers) of questions asked at the same time."""
        with ThreadPoolExecutor(len(videos)) as pool:
            began = time.perf_counter()
            answers = list(pool.map(lambda video: self.ask(video, settings, max_tokens), videos))
            return time.perf_counter() - began, answers

    def parts(self) -> dict[str, float]:
        """Seconds the server spent since the last call, by part: see instrument.py."""
        with urllib.request.urlopen(f"{self._url}/speed", timeout=SECONDS) as response:
            return {part: sum(times) for part, times in json.load(response).items()}
