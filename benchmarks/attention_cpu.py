"""Attention alone on the CPU: our path, selection included, against the same kernel dense.

    python benchmarks/attention_cpu.py --tokens 16384 --share 0.2

Both run in one process in turn, several times; the medians' ratio is what counts.  The head shape
is Qwen2.5-VL-7B's.  Density is set by ``top_k`` so that it is exact, and checked from the accounts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from harness import PagedLayer, one_request

from vllm_adaspark.accounting import count_step
from vllm_adaspark.attention import score
from vllm_adaspark.attention.tables import build_tables
from vllm_adaspark.config import AdaSparkConfig
from vllm_adaspark.tags import tag_word


def measure(tokens: int, share: float, rule: str, repeats: int, threads: int) -> dict:
    """Times of both paths for one video of ``tokens`` tokens."""
    torch.set_num_threads(threads)
    shape = dict(heads=28, kv_heads=4, head_size=128, dtype=torch.bfloat16)
    config = AdaSparkConfig(selection=rule, keep=share, p_attn=share)
    torch.manual_seed(0)
    query = torch.randn(tokens, 28, 128, dtype=torch.bfloat16)
    output = torch.empty_like(query)
    key, value = torch.randn(2, tokens, 4, 128, dtype=torch.bfloat16)
    rows = one_request(tokens, config.cube_volume, shuffle_seed=0)
    words = torch.full((tokens,), tag_word(config))
    num_blocks = rows.block_table.size + 1
    layers = {
        "dense": PagedLayer(config, num_blocks=num_blocks, sparse=False, **shape),
        "sparse": PagedLayer(config, num_blocks=num_blocks, **shape),
    }
    times: dict[str, list[float]] = {name: [] for name in layers} | {"plan": [], "selection": []}
    for name, layer in layers.items():
        start = time.perf_counter()
        layer.begin(rows, words)
        if name == "sparse":
            times["plan"].append(time.perf_counter() - start)
        layer.write(key, value)
        layer.attend(query, output)  # warm up
    sparse = layers["sparse"]
    plan = sparse.runtime.plan
    by_head = query.unflatten(1, (4, -1)).transpose(0, 1)
    for _ in range(repeats):
        for name, layer in layers.items():
            start = time.perf_counter()
            layer.attend(query, output)
            times[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        chosen = score.choose_cubes(by_head, sparse.impl._key_sums, plan.attention, 128**-0.5, 0)
        build_tables(chosen, plan.attention, config.cube_volume)
        times["selection"].append(time.perf_counter() - start)
    counts = count_step(rows, plan, range(1))
    median = {name: statistics.median(samples) for name, samples in times.items()}
    density = float(counts.cubes_attended[0, 0] / counts.cubes_seen[0])
    pair_density = float(counts.pairs[0, 0] / counts.dense_pairs[0])
    return {
        "tokens": tokens,
        "cube_density": density,
        "pair_density": pair_density,
        "speedup": median["dense"] / median["sparse"],
        "efficiency": median["dense"] * pair_density / median["sparse"],
        "selection_share": median["selection"] / median["sparse"],
        "median_s": median,
        "time_s": times,
    }


def machine(threads: int) -> dict:
    """What the samples were taken on."""
    cpu = "unknown"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    versions = {name: version(name) for name in ("torch", "vllm")}
    return {"cpu": cpu, "threads": threads, **versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384])
    parser.add_argument("--share", type=float, nargs="+", default=[0.2])
    parser.add_argument("--rule", default="top_k", choices=["top_p", "top_k", "uniform"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="also write all samples to this file")
    args = parser.parse_args()
    results = []
    print("| tokens | cubes kept | dense s | sparse s | speed-up | efficiency | selection |")
    print("|---|---|---|---|---|---|---|")
    for tokens in args.tokens:
        for share in args.share:
            r = measure(tokens, share, args.rule, args.repeats, args.threads)
            results.append(r)
            m = r["median_s"]
            print(
                f"| {tokens} | {r['cube_density']:.1%} | {m['dense']:.3f} | {m['sparse']:.3f} "
                f"| {r['speedup']:.2f}x | {r['efficiency']:.2f} | {r['selection_share']:.1%} |",
                flush=True,
            )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine(args.threads), "rows": results}, file, indent=1)


if __name__ == "__main__":
    main()
