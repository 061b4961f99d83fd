"""Attention on a GPU: dense kernels against paged ones over the chosen blocks, and choosing them.

    python benchmarks/gpu_attention.py --json benchmarks/results/gpu_attention.json

Stands alone with torch and Triton; vLLM's kernels take part where vLLM is installed.  The head
shape is Qwen2.5-VL-7B's (28/4 heads of 128, bf16), KV blocks have 64 or 128 tokens.  Before
anything is timed, every contender and every kernel of ours is compared with fp32 on fresh random
data, with outputs full of NaN beforehand.  Times are CUDA events, contenders in turn, over several
copies of the inputs, so that no cache is warm.

*Prefill* is a whole prompt at once; *chunk* is 8192 new tokens on a cache.  Blocks are chosen at
random, at the density wanted: what a block costs does not depend on what is in it.  Selection
(scores, nucleus, tables, and the transpositions around the kernel) is timed apart, by its parts.
The JSON file is written after every shape.

Without a CUDA device it says so and ends.  ``--check`` runs all of it on tiny inputs, on the CPU in
Triton's interpreter where there is no GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
NOT_MEASURED = "no CUDA device: not measured"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--density", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.25, 0.5])
    parser.add_argument("--minutes", type=float, default=7.0, help="shapes past this are left out")
    parser.add_argument("--json", help="write all samples to this file")
    parser.add_argument("--markdown", help="write the table to this file, too")
    parser.add_argument("--check", action="store_true", help="tiny inputs; times mean nothing")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        if not args.check:
            print(NOT_MEASURED)
            return
        os.environ["TRITON_INTERPRET"] = "1"

    def save(result: dict) -> None:
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    result = run(args.density, args.minutes, args.check, save)
    save(result)
    text = f"{result['machine']}\n\n{table(result['rows'])}\n"
    if args.check:
        text = "A check on tiny inputs: the times mean nothing.\n\n" + text
    if args.markdown:
        Path(args.markdown).write_text(text, encoding="utf-8")
    print(text)


def run(densities: list[float], minutes: float, check: bool, save: Callable[[dict], None]) -> dict:
    """Everything, as the JSON file holds it; ``save`` gets what there is after each shape."""
    # The package may not be installed; and Triton must see TRITON_INTERPRET when it is imported.
    sys.path.insert(0, str(ROOT))
    import triton
    from gpu_measure import check_correct, measure
    from gpu_scene import Shape

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    if check:
        small = dict(heads=4, kv_heads=2, head_size=32)
        every = [Shape(192, 192, 64, **small), Shape(384, 128, 128, **small)]
        first, densities = [Shape(192, 192, 64, **small)], densities[:1]
    else:
        every = [Shape(*sizes) for sizes in cases()]
        first = [Shape(4096, 4096, block) for block in (64, 128)]
    correct = {f"block {shape.block}": check_correct(shape, device) for shape in first}
    print(json.dumps(correct, indent=1), file=sys.stderr)
    present = {
        name for found in correct.values() for name, e in found.items() if isinstance(e, float)
    }
    rows, left_out = [], []
    result = {
        "machine": machine(device),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "correct": correct,
        "left_out": left_out,
        "rows": rows,
    }
    for nth, shape in enumerate(every):
        left = minutes * 60 - (time.perf_counter() - began)
        name = f"{shape.queries} of {shape.tokens}, block {shape.block}"
        if left < 5:
            left_out.append(name)
            continue
        rows += measure(shape, densities, device, present, left / (len(every) - nth))
        save(result)
        print(f"measured {name} ({left:.0f} s left)", file=sys.stderr)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return result


def cases() -> list[tuple[int, int, int]]:
    """Tokens, new ones of them and block size, the most wanted first, should the time run out."""
    lengths = [1 << n for n in (17, 16, 15, 14, 18)]
    return [(n, new, block) for n in lengths for block in (64, 128) for new in (n, 8192)]


def table(rows: list[dict]) -> str:
    """Markdown: the best dense and the best sparse contender of each case."""
    lines = [
        "| view | tokens | new | block | density | dense | TFLOP/s | sparse | TFLOP/s on chosen "
        "| of dense | selection | speed-up | efficiency |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = ("name", "tokens", "queries", "block")
    for case in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        here = [row for row in rows if tuple(row[k] for k in keys) == case]
        dense = max((r for r in here if r["kind"] == "dense"), key=lambda r: r["tflops"])
        sparse = [r for r in here if r["kind"] == "sparse"]
        for density in dict.fromkeys(r["density"] for r in sparse):
            best = max((r for r in sparse if r["density"] == density), key=lambda r: r["tflops"])
            lines.append(
                f"| {' | '.join(map(str, case))} | {density:.1%} "
                f"| {dense['contender']} | {dense['tflops']:.0f} "
                f"| {best['contender']} | {best['tflops']:.0f} "
                f"| {best['tflops'] / dense['tflops']:.2f} | {best['selection_share']:.1%} "
                f"| {best['ratio_to_dense']:.2f}x | {best['efficiency']:.2f} |"
            )
    return "\n".join(lines)


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, Triton's interpreter"


if __name__ == "__main__":
    main()
