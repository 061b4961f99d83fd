"""The process that has an engine: it asks what it is told and sends back what was answered.

Each engine lives in a process of its own, so that all its memory is free before the next one
starts.  The process that started it owns the terminal and the files; this one writes into a log,
and ends when nobody listens any more.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..accounts.cost import Cost, Model
from ..cli import CommandError, UsageError, offline
from ..models.layout import Sampling
from .grid import Contender
from .questions import Question

LOGPROBS = 20  # vLLM's own limit
FIRST_TOKENS = 4  # of an answer, whose probabilities are kept
AT_ONCE = 16  # questions about one video, asked together once it is computed
MATRIX = 2048  # side of the matrices by whose product a machine's speed is told


@dataclass(frozen=True)
class Job:
    """What an engine is started with, and what it is asked.

    Attributes:
        model, sampling: the checkpoint, and which frames are taken.
        folder: that it may read videos in.
        rest: options for vLLM.
        cost: of the longest prompt.
        volume: tokens in a KV block.
        contenders: of this engine.
        videos: for each contender's name the videos to ask about, with their questions.
        max_tokens: of an answer.
        max_pixels: of a frame.
        log: what the engine writes goes there.
    """

    model: Model
    sampling: Sampling
    folder: Path
    rest: list[str]
    cost: Cost
    volume: int
    contenders: list[Contender]
    videos: dict[str, list[list[Question]]]
    max_tokens: int
    max_pixels: int | None
    log: Path


def serve(job: Job, pipe: Any) -> None:
    """Run a job in this process: ``("speed", FLOPs per second)``, ``("up", seconds)``, then
    ``("answers", line of the journal)`` for each contender and video; ``("failed", why)`` if the
    engine does not start.
    """
    os.setsid()  # a terminal's Ctrl-C is for the process that tells this one to end
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        for message in run(job):
            pipe.send(message)
    except (UsageError, CommandError) as error:
        pipe.send(("failed", str(error)))
    except BrokenPipeError:  # the other process was killed
        os._exit(1)


def run(job: Job) -> Iterator[tuple[str, Any]]:
    """The messages of :func:`serve`."""
    offline.prepare_environment()
    yield "speed", matrix_speed()
    began = time.monotonic()
    options = offline.engine_options(job.model, job.sampling, job.folder, job.rest)
    first = job.contenders[0]
    with ExitStack() as stack:
        engine = offline.engine(
            options, job.model, first.method, first.of_server, job.volume, job.cost
        )
        llm = stack.enter_context(engine)
        asker = Asker(llm, job)
        asker.warm_up()
        yield "up", time.monotonic() - began
        for contender in job.contenders:
            for questions in job.videos[contender.name]:
                yield "answers", asker.ask(contender, questions)


class Asker:
    """Asks an engine, and makes lines of the journal."""

    def __init__(self, llm: Any, job: Job) -> None:
        self._llm, self._job = llm, job
        self._memory, self._device = Memory(), device_name()

    def warm_up(self) -> None:
        """Ask once for nothing: the first request of an engine takes longer than others."""
        contender = next(c for c in self._job.contenders if self._job.videos[c.name])
        (questions, *_) = self._job.videos[contender.name]
        try:
            self._chat(contender, questions[:1])
        except CommandError:
            return  # it is told when it is asked for
        engine = self._llm.llm_engine
        engine.reset_mm_cache()
        engine.reset_encoder_cache()
        self._llm.reset_prefix_cache()

    def ask(self, contender: Contender, questions: Sequence[Question]) -> dict[str, Any]:
        """All questions about one video: the first computes it, the others may find it cached."""
        line = {"contender": contender.name, "video": questions[0].name, "device": self._device}
        self._memory.reset()
        try:
            (first,) = self._chat(contender, questions[:1])
            account = offline.last_account(self._llm)
            others = questions[1:]
            answers = [first]
            for start in range(0, len(others), AT_ONCE):
                answers += self._chat(contender, others[start : start + AT_ONCE])
        except CommandError as error:
            return line | {"refused": str(error)}
        told = [
            {"question": question.prompt, **answer_of(output)}
            for question, output in zip(questions, answers, strict=True)
        ]
        times = first.metrics
        return line | {
            "answers": told,
            "cost": cost_of(account),
            "prefill": times.first_token_ts - times.queued_ts,
            "memory": self._memory.peak(),
        }

    def _chat(self, contender: Contender, questions: Sequence[Question]) -> list[Any]:
        asked = [
            offline.Question(each.video, each.prompt, self._job.max_pixels) for each in questions
        ]
        return offline.chat(
            self._llm,
            asked,
            contender.of_request,
            max_tokens=self._job.max_tokens,
            logprobs=LOGPROBS,
        )


def answer_of(output: Any) -> dict[str, Any]:
    """An answer's words, tokens, and the most probable tokens at each of its first places.

    Args:
        output: vLLM's ``RequestOutput``.
    """
    said = output.outputs[0]
    return {
        "text": said.text.strip(),
        "tokens": list(said.token_ids)[:FIRST_TOKENS],
        "logprobs": [
            {str(token): round(found.logprob, 5) for token, found in place.items()}
            for place in list(said.logprobs or [])[:FIRST_TOKENS]
        ],
    }


def cost_of(account: dict[str, Any]) -> dict[str, Any]:
    """What the journal keeps of a request's account."""
    flops = account["flops"]
    layers = account["layers"]
    kept: dict[str, Any] = {
        "executed": flops["executed"]["total"],
        "dense": flops["dense"]["total"],
        "dense_attention": flops["dense"]["attention"],
        "dense_ffn": flops["dense"]["ffn"],
        "mode": account["mode"],
        "reason": account["reason"],
        "attention": [round(layer["attention_density"], 4) for layer in layers],
        "ffn": [round(layer["ffn_density"], 4) for layer in layers],
    }
    alive = [layer.get("means", {}).get("alive") for layer in layers]
    return kept | ({"alive": alive} if None not in alive else {})


class Memory:
    """The most memory that this process has held since it was asked to look: of its GPU, or else of
    the machine's.
    """

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda if torch.cuda.is_available() else None

    def reset(self) -> None:
        """Look from now on."""
        if self._cuda is not None:
            self._cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError):  # then it is the most since the process began
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int | None:
        """Bytes; None where nobody can say."""
        if self._cuda is not None:
            return self._cuda.max_memory_allocated() or None  # other processes hold the model
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        return int(found[0]) * 1024 if found else None


def device_name() -> str:
    """What the model runs on."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda_alike():
        return current_platform.get_device_name()
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = (line.partition(":")[2].strip() for line in lines.splitlines() if "model name" in line)
    return f"{next(found, platform.processor())}, {os.cpu_count()} CPUs"


def matrix_speed() -> float:
    """FLOPs per second of this machine at the product of two matrices."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    side = MATRIX if device == "cuda" else MATRIX // 4
    one = torch.ones(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        began = time.monotonic()
        product = one @ one
        product[0, 0].item()  # waits for it
        best = min(best, time.monotonic() - began)
    return 2 * side**3 / best
