"""What the server tests share: the running server with its client, and requests to it."""

from __future__ import annotations

import base64
import json
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from server import VllmServer  # examples/demo

START_SECONDS = 600  # it takes about 20; on a machine that others use, minutes
ANSWER_SECONDS = 120  # it takes less than one
# Our command line.
PROGRAM = [sys.executable, "-c", "import sys; from vllm_adaspark.cli import main; sys.exit(main())"]
REPORT_SECONDS = 60  # on a busy machine; it takes less than one
# Not what engine tests set for engines inside the test process.
SERVER_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_PLUGINS": "adaspark,adaspark_http",
}
KEY = "the-key"  # of the server that has one
SETTINGS = {"p_attn": 0.6, "p_ffn": 0.5, "min_cubes": 1, "dense_below": 2}


@dataclass
class Answer:
    """What the client got to see."""

    id: str
    text: str
    prompt_tokens: int
    tokens: int


@dataclass
class Served:
    """A running server and its client."""

    server: VllmServer
    client: openai.OpenAI
    report_file: Path
    text_config: Any  # of the language model it serves
    answered: list[str] = field(default_factory=list)  # ids of all requests that were answered

    def ask(
        self,
        url: str | None,
        *,
        kind: str = "video_url",
        question: str = "What happens?",
        stream: bool = False,
        max_tokens: int = 16,
        **extra,
    ) -> Answer:
        """The greedy answer about a video; ``extra`` goes into the request's body."""
        media = [{"type": kind, kind: {"url": url}}] if url else []
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        reply = self.client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": [*media, {"type": "text", "text": question}]}],
            temperature=0,
            max_tokens=max_tokens,
            extra_body={"ignore_eos": True, **extra},
            **options,
        )
        if not stream:
            text, usage = reply.choices[0].message.content, reply.usage
        else:
            text = ""
            for reply in reply:  # noqa: B020, the last chunk has the usage
                text += "".join(choice.delta.content or "" for choice in reply.choices)
            usage = reply.usage
        self.answered.append(reply.id)
        return Answer(reply.id, text, usage.prompt_tokens, usage.completion_tokens)

    def reports(self, number: int) -> dict[str, dict]:
        """Lines of the report file by the id the client knows, once there are so many."""
        deadline = time.monotonic() + REPORT_SECONDS
        while True:
            text = self.report_file.read_text() if self.report_file.exists() else ""
            # Behind the last end of a line may stand a part of the next.
            lines = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
            if len(lines) >= number or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        # vLLM appends a random suffix to the id that the client sees.
        by_id = {line["request_id"].rpartition("-")[0]: line for line in lines}
        assert len(by_id) == len(lines), "a request was reported twice"
        return by_id

    def health(self) -> int:
        with urllib.request.urlopen(f"{self.server.url}/health", timeout=120) as response:
            return response.status


def mm(settings) -> dict:
    """The request field that carries AdaSpark's settings."""
    return {"mm_processor_kwargs": {"adaspark": settings}}


def about(path: Path) -> list[dict]:
    """Messages that show a video and ask nothing."""
    video = {"type": "video_url", "video_url": {"url": path.as_uri()}}
    return [{"role": "user", "content": [video]}]


def data_url(path: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
