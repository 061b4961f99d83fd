"""What it costs that chunks end at the edges of cubes: steps, and tokens of steps that stay empty.

Our scheduler and vLLM's serve the same requests, without an engine: videos of random length, text
prompts among them, all of them waiting from the start.

    python benchmarks/chunk_edges.py
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("tests", "examples/demo")]

import checkpoint  # noqa: E402  examples/demo
from fuzz.schedules import Case, Limits, Prompt, Schedulers, Seen, run  # noqa: E402

from vllm_adaspark import scheduler  # noqa: E402
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig  # noqa: E402


def case_of(step_tokens: int, requests: int = 48, rows: int = 32) -> Case:
    """Videos of 1K to 6K tokens, a quarter of all prompts text, answers of 50 tokens."""
    rng = np.random.default_rng(step_tokens)
    prompts = []
    for seed in range(requests):
        pieces = [("text", int(rng.integers(10, 40)))]
        if rng.random() < 0.75:
            pieces.append(("video", int(rng.integers(1000, 6000))))
        pieces.append(("text", int(rng.integers(10, 300))))
        prompts.append(Prompt(pieces, seed, 0, 50, {"p_attn": 0.5}))
    return Case(Limits(step_tokens, 4000, 8192, rows, is_async=False), prompts)


def seen_of(case: Case, schedulers: Schedulers, ours: bool) -> Seen:
    if ours:
        return run(case, schedulers.make(case), AdaSparkConfig)
    mixin = scheduler.ChunkRulesMixin
    with (
        patch.object(mixin, "_uncut", lambda self, rules, start, new: new),
        patch("fuzz.schedules.check_chunk"),
    ):
        return run(case, schedulers.make(case), AdaSparkConfig)


def main() -> None:
    logging.getLogger("vllm").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint.build(Path(folder), dtype="float32")
        measure(Schedulers(str(path), ("adaspark",)))


def measure(schedulers: Schedulers) -> None:
    print("| tokens in a step | steps, stock | steps, ours | more | tokens left empty in a step |")
    print("|---|---|---|---|---|")
    for step_tokens in (256, 512, 1024, 2048, 8192):
        case = case_of(step_tokens)
        stock, ours = (seen_of(case, schedulers, which) for which in (False, True))
        more = ours.steps / stock.steps - 1
        print(
            f"| {step_tokens:,} | {stock.steps} | {ours.steps} | {more:.1%} | "
            f"{np.mean(ours.left):.0f} |"
        )


if __name__ == "__main__":
    main()
