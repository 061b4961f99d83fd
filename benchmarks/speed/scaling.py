"""What the rows say about length: exponents, the price of choosing, and memory per token."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch

from vllm_adaspark.paged.state import BlockSums

from .attention import SHAPE, USUAL, selection_share

SCALED = (USUAL, "ttft, language model")  # rows with several lengths


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Exponents, selection's part and memory; JSON-ready."""
    return {"exponents": exponents(rows), "selection": selection(rows), "memory": memory()}


def exponent(points: list[tuple[float, float]]) -> float:
    """b of the least-squares fit of ``log time = a + b log tokens``.

    Raises:
        ValueError: fewer than two lengths.
    """
    if len({tokens for tokens, _ in points}) < 2:
        raise ValueError(f"an exponent needs two lengths or more, got {points}")
    x = [math.log(tokens) for tokens, _ in points]
    y = [math.log(seconds) for _, seconds in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def exponents(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How time grows with length, for each contender and share with two lengths or more."""
    series: dict[tuple, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        if row["name"] in SCALED:
            key = (row["name"], row["contender"], row["asked"])
            series[key].append((row["tokens"], row["median_s"]))
    return [
        {
            "name": name,
            "contender": contender,
            "asked": asked,
            "tokens": sorted(tokens for tokens, _ in points),
            "exponent": exponent(points),
        }
        for (name, contender, asked), points in series.items()
        if len(points) > 1
    ]


def selection(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Planning and selection as a share of our attention's time."""
    return [
        {"tokens": row["tokens"], "asked": row["asked"], "share": selection_share(row)}
        for row in rows
        if row["name"] == USUAL and "parts" in row
    ]


def memory(block_size: int = 64) -> dict[str, float]:
    """Bytes per token and layer: key sums beside the KV cache."""
    blocks = 16
    heads, size = SHAPE["kv_heads"], SHAPE["head_size"]
    sums = BlockSums(blocks, heads, size, block_size, torch.device("cpu"))
    tokens = blocks * block_size
    kv_cache = 2 * heads * size * SHAPE["dtype"].itemsize
    return {
        "kv_cache": kv_cache,
        "key_sums": sums.vectors.nbytes / tokens,
        "key_sums_share": sums.vectors.nbytes / tokens / kv_cache,
    }
