"""Stands in for the process that has an engine (vllm_adaspark.tune.engine.serve), without vLLM.

It answers as the file of questions says, and the sparser the setting the more wrongly.  What else
it does is told by the environment, which a spawned process inherits.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_adaspark.tune import journal

FLOPS = 1e9
LAYERS = 4


def serve(job: Any, pipe: Any) -> None:
    """As vllm_adaspark.tune.engine.serve, in a process of its own."""
    os.setsid()
    answer_all(job, pipe, os.getppid())


@contextlib.contextmanager
def thread(job: Any) -> Iterator[tuple[Any, Any]]:
    """As vllm_adaspark.tune.run.process, in a thread: a process takes seconds to start."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        with theirs, contextlib.suppress(BrokenPipeError):
            answer_all(job, theirs, os.getpid())

    child = threading.Thread(target=work, daemon=True)
    child.exitcode = 0
    child.start()
    with ours:
        yield ours, child


def answer_all(job: Any, pipe: Any, parent: int) -> None:
    with open(job.log, "a") as log:
        log.write(f"started for {job.contenders[0].method}\n")
    if job.contenders[0].method == os.environ.get("FAKE_FAILS"):
        pipe.send(("failed", "the engine did not start: no such thing"))
        return
    if job.contenders[0].method == os.environ.get("FAKE_DIES"):
        os._exit(7)
    pipe.send(("speed", 1e12))
    pipe.send(("up", 1.0))
    left = asked = int(os.environ.get("FAKE_STOPS_AFTER", "-1"))
    for contender in job.contenders:
        for questions in job.videos[contender.name]:
            if left == 0:
                wait_for_lines(job.log.with_name(journal.NAME), 1 + asked)
                os.kill(parent, int(os.environ.get("FAKE_SIGNAL", signal.SIGINT)))
                return
            left -= 1
            pipe.send(("answers", line(contender, questions)))


def wait_for_lines(path: Path, number: int) -> None:
    """Until what was sent has been read and kept."""
    while path.read_text().count("\n") < number:
        time.sleep(0.01)


def kept(contender: Any) -> float:
    """The share of the FLOPs that a contender spends."""
    settings = contender.settings
    if "off" in settings:
        return 1.0
    return settings.get("flops") or settings.get("p_attn", 0.5)


def line(contender: Any, questions: list[Any]) -> dict[str, Any]:
    said = {"contender": contender.name, "video": questions[0].name, "device": "a fake"}
    if contender.settings.get("flops") == 0.01:
        return said | {"refused": "flops=0.01 cannot be met"}
    share = kept(contender)
    return said | {
        "answers": [answer(question, share) for question in questions],
        "cost": {
            "executed": share * FLOPS,
            "dense": FLOPS,
            "dense_attention": 0.6 * FLOPS,
            "dense_ffn": 0.3 * FLOPS,
            "mode": "dense" if share == 1 else "sparse",
            "reason": "off" if share == 1 else None,
            "attention": [1.0, *[share] * (LAYERS - 1)],
            "ffn": [0.95, *[share] * (LAYERS - 1)],
        },
        "prefill": 2 * share,
        "memory": 1 << 30,
    }


def answer(question: Any, share: float) -> dict[str, Any]:
    """Right, unless the setting is so sparse that it loses this question."""
    luck = zlib.crc32(question.prompt.encode() + question.name.encode()) % 1000 / 1000
    right = question.answers[0] if question.answers else "yes"
    text = right if luck >= (1 - share) ** 4 else "lost"
    sure = math.log(0.9) if text == right else math.log(0.6)
    other = math.log(1 - math.exp(sure))
    return {
        "question": question.prompt,
        "text": text,
        "tokens": [1 if text == right else 2],
        "logprobs": [{"1": sure, "2": other}] if text == right else [{"2": sure, "1": other}],
    }
