"""What vLLM's CPU attention kernel makes of short sequences: the bound of sparse attention there.

    python benchmarks/cpu_kernel.py

A query tile is a sequence of 64 queries (a cube) over the keys it kept.  The stock kernel, dense,
goes over a tile of keys with some 700 queries before it fetches the next.  Here the kernel gets
sequences of more and fewer queries over random blocks: how many TFLOP/s it does says how much of
the saved work can become saved time, selection, tables and copies left aside.  "Heads in a row" are
sequences with the same block table one after the other (paged/heads_apart.py).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from vllm import _custom_ops, envs
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

HEAD_SIZE, BLOCK, DTYPE = 128, 64, torch.bfloat16
CACHE_BLOCKS = 2048  # 64 MB: more than a core's own cache holds
QUERIES = (32, 64, 128, 256, 736)
CASES = 448 * 64  # queries in all, times heads


def rate(queries: int, keys: int, heads_in_a_row: int, isa: str, rounds: int) -> float:
    """TFLOP/s on ``CASES`` queries, so many a sequence, each over ``keys`` keys."""
    tables = max(1, CASES // (queries * heads_in_a_row))
    generator = torch.Generator().manual_seed(0)
    table = torch.stack(
        [torch.randperm(CACHE_BLOCKS, generator=generator)[: keys // BLOCK] for _ in range(tables)]
    )
    table = table.to(torch.int32).repeat_interleave(heads_in_a_row, 0)
    number = len(table)
    cache = torch.randn(CACHE_BLOCKS, 1, 2 * BLOCK, HEAD_SIZE).to(DTYPE)
    key, value = cache.chunk(2, dim=2)
    query = torch.randn(number * queries, 1, HEAD_SIZE).to(DTYPE)
    output = torch.empty_like(query)
    start = torch.arange(number + 1, dtype=torch.int32) * queries
    lengths = torch.full((number,), keys, dtype=torch.int32)
    schedule = _custom_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=number, num_heads=1, num_kv_heads=1, head_dim=HEAD_SIZE, seq_lens=lengths,
        dtype=DTYPE, query_start_loc=start, causal=True, sliding_window_size=-1, isa=isa,
        enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV, dynamic_causal=None, kv_cache_dtype="auto",
    )  # fmt: skip
    if isa == "amx":
        torch.cpu._init_amx()  # see harness.py
    times = []
    for _ in range(rounds + 1):  # the first warms up
        began = time.perf_counter()
        _custom_ops.cpu_attention_with_kv_cache(
            query=query, key_cache=key, value_cache=value, output=output, query_start_loc=start,
            seq_lens=lengths, scale=HEAD_SIZE**-0.5, causal=True, alibi_slopes=None,
            sliding_window=-1, block_table=table, softcap=0.0, scheduler_metadata=schedule,
            s_aux=None,
        )  # fmt: skip
        times.append(time.perf_counter() - began)
    pairs = number * queries * (keys - (queries - 1) / 2)
    return 4 * HEAD_SIZE * pairs / statistics.median(times[1:]) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, nargs="+", default=[1088, 2112, 4160])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    isa = _get_attn_isa(DTYPE, BLOCK, HEAD_SIZE)
    kinds = [isa, "vec"] if isa == "amx" else [isa]
    head = " | ".join(f"{queries} queries" for queries in QUERIES)
    print(f"| kernel | keys | heads in a row | {head} |")
    print("|" + "---|" * (3 + len(QUERIES)))
    for kind in kinds:
        for keys in options.keys:
            for in_a_row in (1, 7):
                rates = [rate(n, keys, in_a_row, kind, options.rounds) for n in QUERIES]
                cells = " | ".join(f"{one:.2f}" for one in rates)
                print(f"| {kind} | {keys} | {in_a_row} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
