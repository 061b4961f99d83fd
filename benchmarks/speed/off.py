"""What the plugin costs those who leave nothing out: p = 1, "off", text alone, decoding.

Stock vLLM, AdaSpark and VideoNSA are engines in processes of their own, alive at once and asked in
turn; only the one that is asked works.  What is measured is the processor time of the whole
process, which neighbours on the machine hardly change, with one thread, apart for a request's way
to its first token and for each token after it.  Runs of a round are pairs, and what is told is the
median of the ratios of pairs with its confidence interval.  A second stock engine says what two
engines that do the same differ by: no difference below that can be told.  Engines are started
afresh several times, since what two of them differ by is partly settled when they start.

The model is deep and narrow: what a step and a layer cost beside their matrix products weighs more
than in any real model.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vllm_adaspark import ARCHITECTURE, VIDEONSA_ARCHITECTURE

from .clips import prompt, start_engine
from .model import SHAPES, write_checkpoint
from .record import DENSE, Cell, Record, in_turn, progress

SHAPE, LAYERS = SHAPES["deep"], 16
PREFIX = "off"
AGAIN = "stock again"
TEXT, VIDEO, QUESTION = "text", "a video", "text after videos"
PREFILL, DECODING = "first token", "each further token"
CONFIDENCE = 0.95
OF_A_START = 10  # pairs, before all engines are started afresh
# By engine: the architecture it serves the checkpoint as; None for the checkpoint's own.
ENGINES = {DENSE: None, AGAIN: None, "AdaSpark": ARCHITECTURE, "VideoNSA": VIDEONSA_ARCHITECTURE}
SPARSE = "VideoNSA"  # its prompt is not dense, but its further tokens are
# By what is asked: contenders, with their engine and the request's settings.
CONTENDERS: dict[str, dict[str, tuple[str, Any]]] = {
    TEXT: {name: (name, None) for name in ENGINES},
    VIDEO: {
        DENSE: (DENSE, None),
        AGAIN: (AGAIN, None),
        "AdaSpark off": ("AdaSpark", "off"),
        "AdaSpark p=1": ("AdaSpark", {"p_attn": 1.0, "p_ffn": 1.0}),
        "VideoNSA off": ("VideoNSA", "off"),
        SPARSE: ("VideoNSA", None),
    },
    QUESTION: {name: (name, None) for name in ENGINES},
}


@dataclass(frozen=True)
class Plan:
    """So many pairs of requests about ``what``; a video's tokens, and tokens of the answer."""

    what: str
    tokens: int
    rounds: int = 40
    answer_tokens: int = 17

    def cells(self, part: str = DECODING) -> dict[str, Cell]:
        """Of each contender."""
        name = f"{PREFIX}, {self.what}, {part}"
        return {
            contender: Cell(name, contender, self.tokens) for contender in CONTENDERS[self.what]
        }


def measure(record: Record, plans: list[Plan], folder: Path) -> None:
    """All samples of all plans, in their order: for text before any video, that plan is the first.

    ``folder`` is for the checkpoint.
    """
    checkpoint = write_checkpoint(folder / "checkpoint", SHAPE, LAYERS)
    longest = max(plan.tokens for plan in plans)
    record.note(PREFIX, {"layers": LAYERS, "hidden": SHAPE.hidden})
    context = multiprocessing.get_context("spawn")
    starts = -(-max(plan.rounds for plan in plans) // OF_A_START)
    for number in range(1, starts + 1):
        wanted = {
            cell: min(plan.rounds, OF_A_START * number)
            for plan in plans
            for cell in plan.cells().values()
        }
        if all(record.count(cell) >= rounds for cell, rounds in wanted.items()):
            continue
        with ExitStack() as stack:
            engines = {}
            names = list(ENGINES)
            # When an engine is started changes its times by some per cent: each comes first once.
            for name in names[number % len(names) :] + names[: number % len(names)]:
                progress(f"engine {name}: start {number} of {starts}")
                start = (str(checkpoint), longest, ENGINES[name])
                pool = ProcessPoolExecutor(1, context, initializer=_start, initargs=start)
                engines[name] = stack.enter_context(pool)
                pool.submit(int).result()  # starts it, before the next one
            for plan in plans:
                samplers = {
                    cell: _sampler(record, engines, plan, name)
                    for name, cell in plan.cells().items()
                }
                for name in plan.cells():  # warm up
                    _ask_of(engines, plan, name)
                in_turn(record, samplers, {cell: wanted[cell] for cell in samplers})


def _ask_of(
    engines: dict[str, ProcessPoolExecutor], plan: Plan, contender: str
) -> tuple[float, float]:
    engine, settings = CONTENDERS[plan.what][contender]
    asked = (plan.what, plan.tokens, settings, plan.answer_tokens)
    return engines[engine].submit(_ask, *asked).result()


def _sampler(
    record: Record, engines: dict[str, ProcessPoolExecutor], plan: Plan, contender: str
) -> Callable[[], dict]:
    prefill = plan.cells(PREFILL)[contender]
    dense = not (plan.what == VIDEO and contender == SPARSE)

    def sample() -> dict:
        first, each = _ask_of(engines, plan, contender)
        if dense:
            record.add(prefill, first)
        return {"time_s": each}

    return sample


# -- in an engine's own process -------------------------------------------------------------------

_engine: dict[str, Any] = {}


def _start(checkpoint: str, longest: int, architecture: str | None) -> None:
    """Start an engine."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    import torch

    torch.set_num_threads(1)  # threads that wait would count as work
    options: dict[str, Any] = {}
    if architecture is not None:
        options["hf_overrides"] = {"architectures": [architecture]}
    _engine["llm"] = start_engine(
        checkpoint, longest, cache_gib=1, enable_prefix_caching=False, max_num_seqs=4, **options
    )


def _ask(what: str, tokens: int, settings: Any, answer_tokens: int) -> tuple[float, float]:
    """Processor seconds of a request's way to its first token, and of a token after it: of the
    fastest, which other processes of the machine disturbed least.

    The video is always the same, and its encoding stays in the engine: no tower runs but once.
    """
    import gc
    import time

    from vllm import SamplingParams

    asked: dict[str, Any] = {"prompt": "Which number is shown on the card? " * (tokens // 8)}
    if what == VIDEO:
        asked = prompt(tokens, 0)
    if settings is not None:
        asked["mm_processor_kwargs"] = {"adaspark": settings}
    sampling = SamplingParams(max_tokens=answer_tokens, temperature=0, ignore_eos=True)
    llm = _engine["llm"]
    gc.collect()
    gc.disable()  # a collection falls upon one contender or another by chance
    times = [time.process_time()]
    llm.enqueue([asked], sampling, use_tqdm=False)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        times.append(time.process_time())
    gc.enable()
    assert len(times) == answer_tokens + 1, "the prompt fits a step, and each step is one token"
    each = [b - a for a, b in pairwise(times)]
    return each[0], min(each[1:])


# -- what pairs say -------------------------------------------------------------------------------


def paired(mine: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """The median of the ratios of pairs, and the ends of its confidence interval.

    The interval's ends are samples, by rank: whatever the ratios' distribution is, the median lies
    between the k-th from below and the k-th from above unless fewer than k samples fell on one of
    its sides, which the binomial distribution says how rarely happens.

    Raises:
        ValueError: there are too few pairs for an interval (six are needed).
    """
    ratios = sorted(a / b for a, b in zip(mine, base, strict=True))
    number = len(ratios)
    below, k = 0.0, 0  # chance that at most k samples fall on one side
    while True:
        below += math.comb(number, k) / 2**number
        if below > (1 - CONFIDENCE) / 2:
            break
        k += 1
    if not k:
        raise ValueError(f"{number} pairs are too few for an interval")
    middle = (ratios[(number - 1) // 2] + ratios[number // 2]) / 2
    return middle, ratios[k - 1], ratios[-k]
