"""An engine in a process of its own, in place of a server: the same questions, without HTTP.

It takes the options that the server would, reads the same mp4 files and starts in a fraction of the
time, which counts where many contenders need an engine of their own and the machine is busy.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from .ask import MAX_TOKENS, Answers
from .servers import Server, command
from .videos import Video

SERVER_ONLY = ("--trust-request-mm-kwargs",)  # options that no engine has


class Engine:
    """An engine of a kind of server; it ends with its ``with`` block.

    Args:
        server: which.
        checkpoint: its model.
        videos: the folder that requests may name files of.
        tokens: the longest video.
    """

    at_once = 1  # videos: it is asked from one thread

    def __init__(self, server: Server, checkpoint: Path, videos: Path, tokens: int) -> None:
        arguments, env = command(server, videos, tokens)
        start = (str(checkpoint), [a for a in arguments if a not in SERVER_ONLY], env)
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, initializer=_start, initargs=start)

    def __enter__(self) -> Engine:
        self._pool.submit(_ready).result()
        return self

    def __exit__(self, *exception) -> None:
        self._pool.shutdown(cancel_futures=True)

    def ask(self, video: Video, files: list[Path], settings: dict[str, Any] | None) -> Answers:
        """As ask.Client: the first question alone, then the others at once."""
        questions = [question.text for question in video.asked]
        urls = [path.as_uri() for path in files]
        return self._pool.submit(_ask, questions, urls, settings).result()


_llm: Any = None  # of the engine's own process


def _ready() -> bool:
    return _llm is not None


def _start(checkpoint: str, arguments: list[str], env: dict[str, str]) -> None:
    global _llm
    os.environ.update(env | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(add_help=False))
    options = EngineArgs.from_cli_args(parser.parse_args(["--model", checkpoint, *arguments]))
    options.distributed_executor_backend = "uni"
    _llm = LLM.from_engine_args(options)


def _ask(questions: list[str], urls: list[str], settings: dict[str, Any] | None) -> Answers:
    from vllm import SamplingParams

    media = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    extra = {} if settings is None else {"mm_processor_kwargs": {"adaspark": settings}}
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)

    def ask(some: list[str]) -> list[Any]:
        chats = [
            [{"role": "user", "content": [*media, {"type": "text", "text": text}]}] for text in some
        ]
        return _llm.chat(chats, sampling, use_tqdm=False, **extra)

    start = time.monotonic()
    outputs, usage = ask(questions[:1]), None
    computed = time.monotonic() - start
    if settings is not None:
        from vllm_adaspark.accounts.reports import merge_reports

        usage = merge_reports(_llm.collective_rpc("adaspark_report"))["requests"][-1]
    outputs += ask(questions[1:])
    return Answers(
        texts=[output.outputs[0].text.strip() for output in outputs],
        prompt_tokens=[len(output.prompt_token_ids) for output in outputs],
        usage=usage,
        seconds=(computed, time.monotonic() - start),
    )
