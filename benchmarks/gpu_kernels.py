"""Our Triton kernels on a GPU: each against its twin, then the times of the FFN's and VideoNSA's.

    python benchmarks/gpu_kernels.py --json benchmarks/results/gpu_kernels.json

Stands alone with torch and Triton.  What a kernel gives is compared with what plain PyTorch gives
on the same device and the same fresh random inputs, AdaSpark's through the plans of its own
planner.  Only if all of them are right is anything timed: the FFN of the 7B with half of its
tokens, and VideoNSA's branches for a chunk of 8192 tokens on a cache, beside dense attention (its
window branch is the attention backend's kernel and is not timed here).  Attention over AdaSpark's
chosen blocks is timed by ``gpu_attention.py``.

The JSON file is written after every step.  Without a CUDA device it says so and ends.  ``--check``
runs all of it on tiny inputs, on the CPU in Triton's interpreter where there is no GPU; its times
mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_attention import NOT_MEASURED, ROOT, machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0, help="no timing begins after this")
    parser.add_argument("--json", type=Path, help="write all results to this file, as they come")
    parser.add_argument("--check", action="store_true", help="tiny inputs; times mean nothing")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        if not args.check:
            print(NOT_MEASURED)
            return
        os.environ["TRITON_INTERPRET"] = "1"
    # The package may not be installed; and Triton must see TRITON_INTERPRET when it is imported.
    sys.path.insert(0, str(ROOT))
    import triton

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    result: dict[str, Any] = {
        "machine": machine(device),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "times_mean_something": not args.check,
        "seed": int.from_bytes(os.urandom(4), "little"),
        "correct": {},
        "times": [],
    }

    def save() -> None:
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    check_all(result, device, args.check, save)
    wrong = [name for name, found in result["correct"].items() if not found["right"]]
    if wrong:
        raise SystemExit(f"not right, nothing was timed: {wrong} (seed {result['seed']})")
    for measure in timings(device, args.check):
        if time.perf_counter() - began > args.minutes * 60:
            result["left_out"] = "the time ran out"
            break
        result["times"] += measure()
        save()
    save()
    print(report(result))


def check_all(
    result: dict[str, Any], device: torch.device, small: bool, save: Callable[[], None]
) -> None:
    """Every check's errors into ``result["correct"]``, with what they may be."""
    from gpu_checks import CHECKS

    torch.backends.cuda.matmul.allow_tf32 = False
    for check in CHECKS:
        torch.manual_seed(result["seed"])
        try:
            found = check(device, small)
        except Exception as error:  # whatever a kernel says that does not run here
            name = check.__name__
            result["correct"][name] = {"right": False, "error": f"{type(error).__name__}: {error}"}
            print(f"{name}: {error}", file=sys.stderr)
            save()
            continue
        for name, (error, allowed) in found.items():
            right = error <= allowed  # NaN is not
            result["correct"][name] = {"right": right, "error": error, "allowed": allowed}
            verdict = "right" if right else "WRONG"
            print(f"{verdict}  {name}: {error:.1e}, allowed {allowed:.1e}", file=sys.stderr)
        save()


def timings(device: torch.device, small: bool) -> list[Callable[[], list[dict]]]:
    """What is timed, the most wanted first."""
    lengths = [192] if small else [1 << n for n in (17, 16, 15)]
    new = 64 if small else 8192
    return [
        *(lambda tokens=tokens: videonsa_times(tokens, new, device, small) for tokens in lengths),
        lambda: ffn_times(device, small),
    ]


def videonsa_times(tokens: int, new: int, device: torch.device, small: bool) -> list[dict]:
    """Seconds of dense attention and of VideoNSA's branches, ``new`` tokens the last of a video."""
    from gpu_contenders import DENSE
    from gpu_measure import _short, interleaved
    from gpu_scene import Shape, make_scene

    from vllm_adaspark.kernels import videonsa_compress, videonsa_select

    small_heads = dict(heads=4, kv_heads=2, head_size=32) if small else {}
    shape = Shape(tokens, new, 64, **small_heads)
    scene = make_scene(shape, 0.1, device, seed=0)
    places, group, d = 31, shape.group, shape.head_size
    means = torch.randn(2, shape.kv_heads, shape.width, d, device=device)
    step_tokens = torch.arange(2 if small else new, device=device)  # that are vision tokens
    at = step_tokens + tokens - new
    begin = torch.zeros(len(at), dtype=torch.int32, device=device)
    end = (at // 64).int()
    arguments = dict(
        query=scene.query, tokens=step_tokens, mean_keys=means[0],
        mean_values=means[1].to(scene.query.dtype), begin=begin, end=end,
        longest=shape.width, scale=shape.scale,
    )  # fmt: skip
    slab = max(1, videonsa_compress.SLAB_IMPORTANCES // (shape.kv_heads * shape.width))
    importance = torch.rand(len(at), shape.kv_heads, shape.width, device=device)
    _, chosen = videonsa_compress.compress_and_choose(**arguments, places=places)
    pages = torch.where(chosen < 0, -1, scene.blocks[chosen.clamp(min=0).long()])
    own, offset = scene.blocks[(at // 64)], (at % 64).int()

    def selected(config: tuple[int, int]) -> Callable[[object], object]:
        return lambda: videonsa_select.select(
            scene.query, step_tokens, scene.cache, pages, own, offset, shape.scale, config
        )

    dense = {}
    for name, make in DENSE.items():
        try:
            run, out = make(scene), torch.empty_like(scene.query)
            run(out)
        except Exception as error:
            print(f"  dense {name} left out: {_short(error)}", file=sys.stderr)
            continue
        dense[f"dense: {name}"] = [lambda run=run, out=out: run(out)]
    configs = [videonsa_select.CONFIG] if small else [(1, 3), (2, 2), (2, 3), (4, 2), (4, 3)]
    runs = dense | {
        "cmp and importances, with the choice": [
            lambda: videonsa_compress.compress_and_choose(**arguments, places=places)
        ],
        "of that the choice": [lambda: videonsa_compress.best(importance, end, places)],
        **{f"slc, {w} warps, {s} stages": [selected((w, s))] for w, s in configs},
    }
    times = interleaved(runs, device, 4)
    facts = {"tokens": tokens, "new": new, "heads": shape.heads, "kv_heads": shape.kv_heads,
             "group": group, "slab": slab}  # fmt: skip
    return [facts | {"what": name, "time_s": t} for name, t in times.items()]


def ffn_times(device: torch.device, small: bool) -> list[dict]:
    """Seconds of the 7B's FFN for a chunk, all tokens and half of each cube's."""
    from gpu_checks import ffn_scene
    from gpu_measure import interleaved

    from vllm_adaspark.kernels import ffn

    tokens, hidden, inner = (256, 64, 96) if small else (8192, 3584, 18944)
    x, gate_up, down, plan = ffn_scene(tokens, hidden, inner, torch.bfloat16, device)
    if not ffn.waits_for_nothing(x, gate_up, down) or device.type != "cuda":
        return [{"what": "FFN", "left_out": "the kernels need compute capability 9 or 10"}]
    half = torch.rand(plan.tokens.shape, device=device).argsort(-1) < plan.tokens.shape[1] // 2

    def dense() -> torch.Tensor:
        gate, up = (x @ gate_up.T).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up) @ down.T

    runs = {
        "FFN dense": [dense],
        "FFN at 50 %": [lambda: ffn.sparse_swiglu(x, gate_up, down, half, plan)],
    }
    times = interleaved(runs, device, 4)
    return [{"tokens": tokens, "what": name, "time_s": t} for name, t in times.items()]


def report(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [result["machine"], ""]
    if not result["times_mean_something"]:
        lines = ["A check on tiny inputs: the times mean nothing.", "", *lines]
    lines += ["| tokens | what | milliseconds |", "|---|---|---|"]
    for row in result["times"]:
        if "time_s" in row:
            median = f"{1000 * statistics.median(row['time_s']):.3f}"
        else:
            median = row["left_out"]
        lines.append(f"| {row.get('tokens', '')} | {row['what']} | {median} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
