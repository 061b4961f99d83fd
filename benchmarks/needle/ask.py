"""All questions about one video, to one server, under one contender's settings."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from .servers import AT_ONCE, MODEL_NAME
from .videos import Video

MAX_TOKENS = 3  # an answer is one token and the end


@dataclass(frozen=True)
class Answers:
    """What a server said.

    Attributes:
        texts: one answer for each of ``Video.asked``.
        prompt_tokens: of each prompt.
        usage: ``usage.adaspark`` of the first, which computes the video; None from stock servers.
        seconds: the first answer took, and all of them.
    """

    texts: list[str]
    prompt_tokens: list[int]
    usage: dict[str, Any] | None
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Client:
    """Of a running server."""

    openai: openai.OpenAI
    at_once: int = AT_ONCE  # videos

    def ask(self, video: Video, files: list[Path], settings: dict[str, Any] | None) -> Answers:
        """Ask the first question alone, then the others at once.

        The others find the video in the prefix cache (EVS: in the encoder cache), as further
        questions about one video would in service.

        Args:
            video: what is asked about.
            files: its mp4 files.
            settings: of ``mm_processor_kwargs.adaspark``; None sends none.

        Raises:
            openai.OpenAIError: the server refused or failed.
        """
        extra = {} if settings is None else {"mm_processor_kwargs": {"adaspark": settings}}
        media = [{"type": "video_url", "video_url": {"url": path.as_uri()}} for path in files]

        def one(question) -> Any:
            content = [*media, {"type": "text", "text": question.text}]
            return self.openai.chat.completions.create(
                model=MODEL_NAME,
                messages=[{"role": "user", "content": content}],
                temperature=0,
                max_tokens=MAX_TOKENS,
                extra_body=extra,
            )

        start = time.monotonic()
        first, *others = video.asked
        replies = [one(first)]
        computed = time.monotonic() - start
        with ThreadPoolExecutor(max_workers=max(1, len(others))) as pool:
            replies += pool.map(one, others)
        return Answers(
            texts=[(reply.choices[0].message.content or "").strip() for reply in replies],
            prompt_tokens=[reply.usage.prompt_tokens for reply in replies],
            usage=getattr(replies[0].usage, "adaspark", None),
            seconds=(computed, time.monotonic() - start),
        )
