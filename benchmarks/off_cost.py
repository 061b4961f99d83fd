"""What accounts, traces and plans cost those who have no use for them: interleaved, in one engine.

    python benchmarks/off_cost.py

Two requests, prefill and decoding: one about a video, with the worker's accounts switched off and
as served (accounts kept, nothing traced); and one of text alone, after the engine has seen videos,
with the accounts and the planning switched off and as served.  Printed are the fastest run, the
median, and the median of the ratios of runs that followed each other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples" / "demo")]

CONTENDERS = ("stock path", "as served")


def switch(worker, on: bool, plans: bool) -> None:
    """Take the worker's accounts away, and its plans unless ``plans``; or give them back."""
    for owner, name in (
        (worker, "_before_step"),
        (worker, "_after_step"),
        (worker._runtime, "begin_step"),
    ):
        if on or (plans and name == "begin_step"):
            vars(owner).pop(name, None)
        else:
            setattr(owner, name, lambda *_: None)
    worker._runtime.plan = None  # of the last step, which nobody replaces without planning


def settle(worker) -> None:
    """Steps are accounted for one step late: do it now, outside the timing."""
    worker._accounts.settle()
    worker._tracer.settle()


def run(llm, prompt: dict, answer_tokens: int) -> tuple[float, float]:
    """Seconds of a request for one token, and of one for many."""
    from vllm import SamplingParams

    times = []
    for tokens in (1, answer_tokens):
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        start = time.perf_counter()
        llm.generate([prompt], sampling, use_tqdm=False)
        times.append(time.perf_counter() - start)
        llm.collective_rpc(settle)
    return times[0], times[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--answer-tokens", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16", help="float32 on CPUs that lack AVX-512")
    options = parser.parse_args()
    import checkpoint  # examples/demo
    from engine.engines import chat, clip, engine, video_prompt  # tests

    settings = {"p_attn": 0.7, "p_ffn": 0.5}
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint.build(Path(folder) / "checkpoint", layers=8)
        with engine(model, settings, enable_prefix_caching=False, dtype=options.dtype) as llm:
            prompts = {
                "a video": video_prompt(clip(120, 252, 252)),
                "text after videos": {"prompt": chat("Which number is on the card? " * 12)},
            }
            times = {(kind, name): [] for kind in prompts for name in CONTENDERS}
            for repeat in range(options.repeats + 1):
                for kind, prompt in prompts.items():
                    for name in CONTENDERS[:: 1 if repeat % 2 else -1]:
                        on = name == "as served"
                        llm.collective_rpc(switch, args=(on, kind == "a video"))
                        measured = run(llm, prompt, options.answer_tokens)
                        if repeat:  # the first warms up
                            times[kind, name].append(measured)
    print(f"| request | | 1 token, s | ratio | {options.answer_tokens} tokens, s | ratio |")
    print("|---|---|---|---|---|---|")
    for kind, name in times:
        cells = []
        for part in (0, 1):
            mine = [t[part] for t in times[kind, name]]
            stock = [t[part] for t in times[kind, CONTENDERS[0]]]
            ratios = [a / b for a, b in zip(mine, stock, strict=True)]
            cells += [
                f"{min(mine):.3f}, {statistics.median(mine):.3f}",
                f"{statistics.median(ratios):.3f}",
            ]
        print(f"| {kind} | {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
