"""What accounts and traces cost when nobody asks for them: interleaved, in one engine.

    python benchmarks/off_cost.py

The same request (prefill of a video, then decoding) with the worker's books switched off, as
served (accounts kept, nothing traced) and traced.  Printed are medians, and medians of the ratios
of runs that followed each other.
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

CONTENDERS = ("no books", "as served", "traced")


def switch(worker, on: bool) -> None:
    """Take the worker's books away, or give them back."""
    kept = getattr(worker, "kept_books", (worker._accounts, worker._tracer))
    worker.kept_books = kept
    worker._accounts, worker._tracer = kept if on else (None, None)


def run(llm, prompt: dict, answer_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and per token after it."""
    from vllm import SamplingParams

    times = []
    for tokens in (1, answer_tokens):
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        start = time.perf_counter()
        llm.generate([prompt], sampling, use_tqdm=False)
        times.append(time.perf_counter() - start)
    return times[0], (times[1] - times[0]) / (answer_tokens - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--answer-tokens", type=int, default=100)
    options = parser.parse_args()
    import checkpoint  # examples/demo
    from engine.engines import clip, engine, video_prompt  # tests

    settings = {"p_attn": 0.7, "p_ffn": 0.5}
    os.environ["OMP_NUM_THREADS"] = str(os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint.build(Path(folder) / "checkpoint", layers=8)
        with engine(model, settings, enable_prefix_caching=False, dtype="bfloat16") as llm:
            video = clip(120, 252, 252)
            prompts = {name: video_prompt(video, trace=name == "traced") for name in CONTENDERS}
            times = {name: [] for name in CONTENDERS}
            for repeat in range(options.repeats + 1):
                for name in CONTENDERS[:: 1 if repeat % 2 else -1]:
                    llm.collective_rpc(switch, args=(name != "no books",))
                    measured = run(llm, prompts[name], options.answer_tokens)
                    if repeat:  # the first warms up
                        times[name].append(measured)
    print("| | first token, s | ratio | per token, ms | ratio |\n|---|---|---|---|---|")
    for name in CONTENDERS:
        cells = []
        for part, unit in ((0, 1), (1, 1000)):
            mine = [t[part] for t in times[name]]
            ratios = [a / b[part] for a, b in zip(mine, times["no books"], strict=True)]
            cells += [
                f"{statistics.median(mine) * unit:.3f}",
                f"{statistics.median(ratios):.3f}",
            ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
