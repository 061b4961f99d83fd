"""AdaTP and FastV beside stock, EVS and AdaSpark at the same FLOPs, on a deep and narrow model.

Tokens that leave between the layers save nothing in the first of them, so this needs a model with
more layers than the others of this benchmark have.  An engine of each contender is alive, in a
process of its own, and they are asked in turn; only the one that is asked works.  Videos are arrays
of frames, and a round has videos of its own, so that nothing is found in a cache.

What is timed is the language model, all of a prompt or of so many at once: its seconds, and beside
them its processor's (``cpu_s``), which depend less on what else the machine does.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .clips import prompt, start_engine
from .model import SHAPES, flops, pruning_rate, write_checkpoint
from .record import DENSE, Cell, Record, in_turn, progress

SHAPE, LAYERS = SHAPES["deep"], 16
FLOPS = 0.273  # of dense, AdaTP's default
EVS = "EVS"
# Dummy weights make all frames alike, and AdaTP's rule would keep one token of each place:
# ``refill`` spends what the budget allows.
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdaSpark": ("adaspark", {"flops": FLOPS}),
    "AdaTP": ("adatp", {"flops": FLOPS, "refill": True}),
    "FastV": ("adatp", {"flops": FLOPS, "fastv": True}),
}
PREFIX = "dropping"


@dataclass(frozen=True)
class Plan:
    """So many requests at once, of so many video tokens each."""

    requests: int
    tokens: int
    rounds: int = 3
    answer_tokens: int = 1
    contenders: tuple[str, ...] = (DENSE, EVS, *OURS)

    @property
    def name(self) -> str:
        return f"{PREFIX}, {self.requests} at once"


def measure(record: Record, plans: list[Plan], folder: Path) -> None:
    """All samples of all plans.

    Args:
        record: gets the samples.
        plans: what to measure.
        folder: for the checkpoint.
    """
    missing = {
        cell.contender: None
        for plan in plans
        for cell in _cells(plan)
        if record.count(cell) < plan.rounds
    }
    if not missing:
        return
    longest = max(plan.tokens for plan in plans)
    checkpoint = write_checkpoint(folder / "checkpoint", SHAPE, LAYERS)
    rate = pruning_rate(SHAPE, longest, FLOPS)
    record.note(PREFIX, {"video_pruning_rate": rate, "matched_at": longest, "layers": LAYERS})
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        engines = {}
        for name in missing:
            progress(f"engine {name}: start")
            start = (str(checkpoint), longest, name, rate)
            pool = ProcessPoolExecutor(1, context, initializer=_start, initargs=start)
            engines[name] = stack.enter_context(pool)
            engines[name].submit(_ask, 1, 128, 0, 4).result()  # one short request
        for plan in plans:
            contenders = {
                cell: _sampler(record, engines[cell.contender], plan, cell)
                for cell in _cells(plan)
                if cell.contender in missing
            }
            if contenders:
                in_turn(record, contenders, dict.fromkeys(contenders, plan.rounds))


def _cells(plan: Plan) -> list[Cell]:
    return [Cell(plan.name, contender, plan.tokens) for contender in plan.contenders]


def _sampler(
    record: Record, engine: ProcessPoolExecutor, plan: Plan, cell: Cell
) -> Callable[[], dict]:
    def sample() -> dict:
        # Numbers that no other cell of this length uses.
        first = 1000 * plan.requests + plan.requests * record.count(cell)
        job = engine.submit(_ask, plan.requests, plan.tokens, first, plan.answer_tokens)
        return job.result()

    return sample


# -- in an engine's own process -------------------------------------------------------------------

_engine: dict[str, Any] = {}


def _start(checkpoint: str, longest: int, name: str, rate: float) -> None:
    """Start a contender's engine, and time its language model."""
    import time

    from vllm_adaspark import ARCHITECTURE

    options: dict[str, Any] = {}
    if name == EVS:
        options["video_pruning_rate"] = rate
    elif name in OURS:
        method, settings = OURS[name]
        options["hf_overrides"] = {"architectures": [ARCHITECTURE]}
        options["additional_config"] = {"method": method, "adaspark": settings}
    llm = start_engine(checkpoint, longest, cache_gib=2, max_num_seqs=32, **options)
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    model = runner.get_model()
    if name == EVS:
        # As in instrument.py: vLLM's CPU runner does not set this when it has loaded the model.
        runner.is_multimodal_pruning_enabled = model.is_multimodal_pruning_enabled
    spent: list[tuple[float, float]] = []
    forward = model.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter(), time.process_time()
        result = forward(*args, **kwargs)
        spent.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        return result

    model.forward = timed
    _engine.update(llm=llm, spent=spent, name=name, rate=rate)


def _ask(requests: int, tokens: int, first: int, answer_tokens: int) -> dict[str, Any]:
    """A sample: ``requests`` at once, about videos of their own."""
    from vllm import SamplingParams

    llm, spent = _engine["llm"], _engine["spent"]
    prompts = [prompt(tokens, number) for number in range(first, first + requests)]
    sampling = SamplingParams(max_tokens=answer_tokens, temperature=0, ignore_eos=True)
    spent.clear()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds, cpu = (sum(times) for times in zip(*spent, strict=True))
    prompt_tokens = len(outputs[0].prompt_token_ids)
    return {
        "time_s": seconds,
        "cpu_s": cpu,
        "requests_per_s": requests / seconds,
        **_work(llm, prompt_tokens, tokens),
    }


def _work(llm: Any, prompt: int, tokens: int) -> dict[str, float]:
    """Executed FLOPs over dense, and the share of the video tokens that layers saw in the mean.

    Stock engines do not say, so from the prompt's length.
    """
    if _engine["name"] in OURS:
        from vllm_adaspark.accounts.reports import merge_reports

        report = merge_reports(llm.collective_rpc("adaspark_report"))["requests"][-1]
        alive = report.get("means", {}).get("alive", 1.0)
        return {"work": report["flops_ratio"], "alive": alive}
    rate = _engine["rate"] if _engine["name"] == EVS else 0.0
    spent = flops(SHAPE, prompt) / flops(SHAPE, prompt + round(tokens * rate))
    return {"work": spent, "alive": 1 - rate}
