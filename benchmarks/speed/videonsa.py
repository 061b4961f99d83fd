"""One attention layer of VideoNSA, time per branch, against vLLM's dense kernel.

The head shape is Qwen2.5-VL-7B's, blocks and window are the published ones, and the prompt is all
video.  What the layer spends is timed where it is spent: the gates (of random weights, which cost
what trained ones do), the compressed branch with the choice of blocks, the selected branch, the
window, and the rest (mixing them).  In bf16 where the CPU has vector instructions for it, else in
fp32, dense and sparse alike.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from harness import PagedLayer, one_request, sizes

from vllm_adaspark.accounts.flops import ModelShape
from vllm_adaspark.methods.videonsa import attend, gates
from vllm_adaspark.methods.videonsa.method import VideoNSA
from vllm_adaspark.methods.videonsa.request import VideoNSARequest
from vllm_adaspark.methods.videonsa.settings import BLOCK, VideoNSASettings

from .record import DENSE, Cell, Record, in_turn, progress

NAME, OURS = "videonsa", "videonsa"
HEADS, KV_HEADS, HEAD_SIZE = 28, 4, 128
HIDDEN = HEADS * HEAD_SIZE
# Where attend.py calls what takes the time, and what a part is called here.
PARTS = {"gates_of": "gates", "compress": "compressed", "select": "selected", "_windowed": "window"}


@dataclass(frozen=True)
class Plan:
    """What to measure at one length: how often, and the stock kernel where it gets fewer."""

    tokens: int
    rounds: int = 5
    dense_rounds: int | None = None


def measure(record: Record, plans: list[Plan]) -> None:
    """All samples of all plans."""
    dtype = torch.bfloat16 if torch.cpu._is_avx512_supported() else torch.float32
    record.note(NAME, {"dtype": str(dtype).removeprefix("torch.")})
    for plan in plans:
        dense, ours = Cell(NAME, DENSE, plan.tokens), Cell(NAME, OURS, plan.tokens)
        rounds = {dense: plan.dense_rounds or plan.rounds, ours: plan.rounds}
        if any(record.count(cell) < number for cell, number in rounds.items()):
            progress(f"{NAME}, {plan.tokens} tokens: set up")
            layer = Layer(plan.tokens, dtype)
            in_turn(record, {dense: layer.sample_dense, ours: layer.sample}, rounds)


class Layer:
    """A prompt that is all video in a layer's cache, its physical blocks in random order."""

    def __init__(self, tokens: int, dtype: torch.dtype, **settings: Any) -> None:
        torch.manual_seed(0)
        shape = dict(heads=HEADS, kv_heads=KV_HEADS, head_size=HEAD_SIZE, dtype=dtype)
        self._query = torch.randn(tokens, HEADS, HEAD_SIZE).to(dtype)
        self._hidden = torch.randn(tokens, HIDDEN).to(dtype)
        keys = torch.randn(2, tokens, KV_HEADS, HEAD_SIZE).to(dtype)
        config = VideoNSASettings(**settings)
        method = VideoNSA(config, sizes(HEADS, KV_HEADS, HEAD_SIZE), "cpu")
        rows = one_request(tokens, BLOCK, shuffle_seed=0)
        shape["num_blocks"] = rows.block_table.size + 1  # and vLLM's null block
        modules = _gate_modules(dtype)
        self._sparse = PagedLayer(config, method=method, modules=modules, **shape)
        self._dense = PagedLayer(config, method=method, sparse=False, **shape)
        for layer in (self._sparse, self._dense):
            layer.begin(rows, [VideoNSARequest(config, np.ones(tokens, bool))])
            layer.write(*keys)
        self._output = torch.empty_like(self._query)
        model = ModelShape(HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, intermediate=1)
        told = self._sparse.runtime.plan.tell(model, range(1)).flops
        spent = sum(told[part].sum() for part in (*gates.BRANCHES, "gates"))
        pairs = tokens * (tokens + 1) // 2
        self._work = float(spent / (pairs * model.attention_flops_per_pair))
        self.sample()  # the first layer of a step makes what all its layers share

    def sample_dense(self) -> dict:
        """One pass of the stock kernel."""
        began = time.perf_counter()
        self._dense.attend(self._query, self._output)
        return {"time_s": time.perf_counter() - began}

    def sample(self) -> dict:
        """One pass of ours, with the seconds of each part."""
        with stopwatch() as seconds:
            began = time.perf_counter()
            self._sparse.attend(self._query, self._output, hidden=self._hidden)
            time_s = time.perf_counter() - began
        parts = {part: seconds[part] for part in PARTS.values()}
        parts["mixing"] = time_s - sum(parts.values())
        return {"time_s": time_s, "work": self._work, "parts": parts}


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Seconds by part of what attend.py spends inside the block."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(run: Callable, part: str) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = run(*args, **kwargs)
            seconds[part] += time.perf_counter() - began
            return result

        return wrapper

    with ExitStack() as stack:
        for name, part in PARTS.items():
            stack.enter_context(patch.object(attend, name, timed(getattr(attend, name), part)))
        yield seconds


class _Projection(torch.nn.Linear):
    """As vLLM's linear layers, which also hand out a bias that was left to the caller."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(x), None


def _gate_modules(dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    first, second = gates.NAMES
    made = {
        first: _Projection(HIDDEN, HIDDEN, dtype=dtype),
        second: _Projection(HIDDEN, len(gates.BRANCHES) * HEADS, dtype=dtype),
    }
    for module in made.values():
        module.requires_grad_(False)
    return made
