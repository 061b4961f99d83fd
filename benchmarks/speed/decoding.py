"""One attention layer of a decode step: stock kernel dense, and ours, choosing and tables included.

The head shape is Qwen2.5-VL-7B's.  Keys and queries are skewed as the needle model's are, where
p = 0.9 attends to 80 % of the cubes and p = 0.5 to a third of them: mean keys differ so much that a
cube's logits have the standard deviation SKEW.  What was really kept is in the rows.

Measured is processor time, of one thread: a sample is the fastest of some calls, which other
processes of the machine disturbed least.  Between two calls the kernel's keys and values have gone
through the caches, so choosing finds them as cold as it does in a model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from harness import PagedLayer

from vllm_adaspark.methods.adaspark.request import AdaSparkRequest
from vllm_adaspark.methods.adaspark.score import choose_cubes
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.paged.plan import StepPlan
from vllm_adaspark.paged.state import StepRows
from vllm_adaspark.paged.tables import build_tables

from .attention import SHAPE
from .record import DENSE, Cell, Record, in_turn, progress

NAME = "decoding"
CONTENDERS = {
    "p=0.9": {"p_attn": 0.9},
    "p=0.5": {"p_attn": 0.5},
    "top_k 0.2": {"selection": "top_k", "keep": 0.2},
}
QUESTION = 40  # text tokens behind the video; the last is the step's
CALLS = 8  # of a sample
SKEW = 0.47
MEAN_KEY = 0.5  # standard deviation of a number of a cube's mean key; a token's own is 1


@dataclass(frozen=True)
class Plan:
    """What to measure behind a video of so many tokens, and samples of each contender."""

    tokens: int
    rounds: int = 9


def measure(record: Record, plans: list[Plan]) -> None:
    """All samples of all plans."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for plan in plans:
        cells = [Cell(NAME, contender, plan.tokens) for contender in (DENSE, *CONTENDERS)]
        if any(record.count(cell) < plan.rounds for cell in cells):
            progress(f"{NAME}, {plan.tokens} tokens: set up")
            layer = Layer(plan.tokens, dtype_here())
            record.note(NAME, {"dtype": str(layer.dtype).removeprefix("torch.")})
            samplers = {cell: layer.sampler(cell.contender) for cell in cells}
            in_turn(record, samplers, dict.fromkeys(cells, plan.rounds))
    torch.set_num_threads(threads)


def dtype_here() -> torch.dtype:
    """bf16 where the CPU has vector instructions for it, else fp32."""
    return torch.bfloat16 if torch.cpu._is_avx512_supported() else torch.float32


class Layer:
    """A layer whose cache holds a video and a question, but for the last token."""

    def __init__(self, tokens: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        shape = SHAPE | {"dtype": dtype}
        self._config = AdaSparkConfig(p_ffn=1.0)
        size, length = self._config.cube_volume, tokens + QUESTION
        self._is_video = np.arange(length) < tokens
        generator = torch.Generator().manual_seed(0)

        def normal(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator)

        kv_heads, head_size = shape["kv_heads"], shape["head_size"]
        blocks = -(-length // size)
        key = normal(length, kv_heads, head_size)
        key += MEAN_KEY * normal(blocks, kv_heads, head_size).repeat_interleave(size, 0)[:length]
        value = normal(length, kv_heads, head_size).to(dtype)
        # A cube's logit is a sum of head_size products, over the root of head_size.
        spread = SKEW / (MEAN_KEY**2 + 1 / size) ** 0.5
        of_group = normal(kv_heads, 1, head_size)  # a group's heads look for much the same
        group = shape["heads"] // kv_heads
        query = 0.9 * of_group + 0.19**0.5 * normal(kv_heads, group, head_size)
        self._query = (spread * query).flatten(0, 1)[None].to(dtype)
        self._output = torch.zeros_like(self._query)

        table = np.random.default_rng(0).permutation(blocks).astype(np.int32)[None] + 1
        self._ours = PagedLayer(self._config, num_blocks=blocks + 1, **shape)
        self._stock = PagedLayer(self._config, num_blocks=1, sparse=False, **shape)
        self._stock.kv_cache = self._ours.kv_cache
        for start, stop in ((0, length - 1), (length - 1, length)):
            rows = StepRows(np.array([0, stop - start]), np.array([stop]), table)
            self._ours.begin(rows, [self._request({"p_attn": 0.9})])
            self._ours.write(key[start:stop].to(dtype), value[start:stop])
        self._rows = rows  # of the decode step

    def _request(self, settings: dict) -> AdaSparkRequest:
        return AdaSparkRequest(self._config.override(settings), self._is_video)

    def _choosing(self, plan: StepPlan) -> float:
        """Seconds of scores, choice and tables, the kernel having run before."""
        impl = self._ours.impl
        by_head = self._query.unflatten(1, (SHAPE["kv_heads"], -1)).transpose(0, 1)
        began = time.process_time()
        chosen = choose_cubes(by_head, impl._key_summaries, plan.attention, impl.scale, 0)
        build_tables(chosen, plan.attention, plan.block_size)
        return time.process_time() - began

    def sampler(self, contender: str) -> Callable[[], dict]:
        """How to take a sample of a contender."""
        layer = self._stock if contender == DENSE else self._ours
        settings = CONTENDERS.get(contender, {"p_attn": 1.0})

        def sample() -> dict:
            layer.begin(self._rows, [self._request(settings)])
            layer.attend(self._query, self._output)  # the first layer makes what all share
            plan = self._ours.runtime.plan if layer is self._ours else None
            fastest, choosing = float("inf"), float("inf")
            for _ in range(CALLS):
                began = time.process_time()
                layer.attend(self._query, self._output)
                fastest = min(fastest, time.process_time() - began)
                if plan is not None:
                    choosing = min(choosing, self._choosing(plan))
            if contender == DENSE:
                return {"time_s": fastest}
            parts = {"choosing": choosing, "planning": plan.planning_seconds}
            kept = float(plan.kept_blocks[0].float().mean()) / self._rows.block_table.shape[1]
            return {"time_s": fastest, "work": kept, "parts": parts}

        return sample
