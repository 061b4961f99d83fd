"""Tensor-parallel ranks choose what a single rank would, however the heads are divided.

Ranks are run one after the other here, each with its part of the heads; what they gather is put
together by hand.  The engine's own ranks are in tests/engine/test_scheduling.py.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch

from kernels.scenes import gather, known_of, random_request, rows_of
from vllm_adaspark.methods.adaspark.planner import build_plan
from vllm_adaspark.methods.adaspark.score import choose_cubes
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.paged.heads import HeadRanks
from vllm_adaspark.paged.state import BlockSums

SIZE, HEAD_SIZE, BLOCKS = 32, 16, 60
RULES = {
    "top_p": {"p_attn": 0.6},
    "top_k": {"selection": "top_k", "keep": 0.3},
    "uniform": {"selection": "uniform", "keep": 0.3},
    "budget": {"flops": 0.4},
}
# (KV heads, query heads, ranks): the 3B's and the 72B's heads, some with fewer ranks than KV heads.
DIVIDED = [(2, 16, 2), (2, 16, 4), (2, 16, 8), (1, 5, 5), (8, 64, 16), (8, 64, 4)]


class Gathered(Exception):
    """Raised in place of gathering, so that a rank's part can be had on its own."""


def scene(kv_heads: int, heads: int, *settings: dict):
    """(plan, queries, keys) of a step with one request for each of ``settings``."""
    shape = dict(heads=heads, kv_heads=kv_heads, head_size=HEAD_SIZE, dtype=torch.float32)
    rng, pool = np.random.default_rng(heads), list(range(1, BLOCKS))
    layout = [("text", 9), ("video", SIZE * 8 + 3), ("text", 5)]
    common = {"min_cubes": 1, "cube": (2, 4, 4), "dense_below": 1}
    requests = [
        random_request(
            rng, AdaSparkConfig(**common, **each), layout, **shape, pool=pool, sharpness=2.0
        )
        for each in settings
    ]
    step = [(request, len(request.is_video)) for request in requests]
    plan = build_plan(
        rows_of(step), known_of(step), SIZE,
        dense_below=1, cube_queries=8, device=torch.device("cpu"),
    )  # fmt: skip
    return plan, gather(step, "q"), gather(step, "k")


def choices(plan, q: torch.Tensor, k: torch.Tensor, ranks: HeadRanks | None = None):
    sums = BlockSums(BLOCKS, k.shape[1], HEAD_SIZE, SIZE, k.device)
    sums.write(k, plan.summary_writes)
    by_head = q.unflatten(1, (k.shape[1], -1)).transpose(0, 1)
    return choose_cubes(by_head, sums, plan.attention, HEAD_SIZE**-0.5, 0, ranks)


def choices_of_ranks(plan, q: torch.Tensor, k: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    """What each rank chooses; heads are divided as vLLM divides them (QKVParallelLinear)."""
    kv_heads = k.shape[1]
    sharing = max(1, ranks // kv_heads)
    parts = [
        (q.chunk(ranks, 1)[rank], k.chunk(ranks // sharing, 1)[rank // sharing])
        for rank in range(ranks)
    ]
    given: list[torch.Tensor] = []

    def give(probs: torch.Tensor) -> torch.Tensor:
        given.append(probs)
        raise Gathered

    for rank, part in enumerate(parts):
        with suppress(Gathered):
            choices(plan, *part, HeadRanks(rank, ranks, kv_heads, give))
    assert len(given) in (0, ranks), "all ranks gather, or none does"
    together = torch.cat(given) if given else None
    return [
        choices(plan, *part, HeadRanks(rank, ranks, kv_heads, lambda _: together))
        for rank, part in enumerate(parts)
    ]


@pytest.mark.parametrize("kv_heads, heads, ranks", DIVIDED)
@pytest.mark.parametrize("rules", [*([rule] for rule in RULES), list(RULES)], ids="-".join)
def test_choices_do_not_depend_on_the_ranks(kv_heads, heads, ranks, rules) -> None:
    plan, q, k = scene(kv_heads, heads, *(RULES[rule] for rule in rules))
    want = choices(plan, q, k)
    candidates = plan.attention.candidates[:, None].expand_as(want)
    assert want.any() and (want != candidates).any(), "some cubes kept, some left out"
    sharing = max(1, ranks // kv_heads)
    own = kv_heads * sharing // ranks
    for rank, got in enumerate(choices_of_ranks(plan, q, k, ranks)):
        first = rank // sharing * own
        assert torch.equal(got, want[:, first : first + own]), f"rank {rank}"


def test_ranks_alone_would_choose_otherwise() -> None:
    """What is gathered matters: without it both kinds of layout choose other cubes."""
    plan, q, k = scene(2, 16, RULES["top_p"])
    part = choices(plan, q.chunk(4, 1)[0], k[:, :1])
    assert not torch.equal(part, choices(plan, q, k)[:, :1])
    plan, q, k = scene(2, 16, RULES["budget"])
    part = choices(plan, q.chunk(2, 1)[0], k[:, :1])
    assert not torch.equal(part, choices(plan, q, k)[:, :1])


def test_nothing_is_gathered_where_a_rank_knows_enough() -> None:
    plan, q, k = scene(2, 16, RULES["top_p"])
    ranks = HeadRanks(1, 2, 2, gather=None)
    assert torch.equal(choices(plan, q[:, 8:], k[:, 1:], ranks), choices(plan, q, k)[:, 1:])
