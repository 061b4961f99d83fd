"""Long contexts: a layer's chunks of 8K tokens on the way to 128K, and steps of many requests.

The head shape is Qwen2.5-VL-7B's, and a fifth of the cubes is kept.  For some chunks of one prefill
this measures what AdaSpark does beside the kernel: the step's plan, once for all layers, and in a
layer the choice with its tables.  The kernel itself runs for a part of each chunk, PART of its
tokens at the chunk's end, and its time is told times what that part leaves out.  Measured is
processor time, of one thread.

What the keys are does not matter for the time, so all of a video's are the same 8K ones.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from harness import PagedLayer, adaspark

from vllm_adaspark.accounts.flops import ModelShape
from vllm_adaspark.accounts.ledger import Ledger, keep_counts
from vllm_adaspark.methods.adaspark.request import AdaSparkRequest
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.paged.scratch import Scratch
from vllm_adaspark.paged.state import StepRows
from vllm_adaspark.paged.tiles import TilePlan

from .attention import SHAPE
from .decoding import dtype_here
from .record import Cell, Record, in_turn, progress

NAME, TOGETHER = "long", "long, together"
CHUNK = 8192
PART = 32  # of a chunk, the kernel runs one in so many tokens
SETTINGS = {"selection": "top_k", "keep": 0.2, "p_ffn": 0.5}
LAYERS = 28
ONE_BY_ONE = "decoding"  # contenders of steps with many requests
DENSE_ROWS = "decoding, p=1"


@dataclass(frozen=True)
class Chunks:
    """Some chunks of a prefill, by where they end."""

    ends: tuple[int, ...] = (8192, 32768, 65536, 98304, 131072)
    rounds: int = 3


@dataclass(frozen=True)
class Many:
    """A step in which so many requests decode, each behind a video of so many tokens."""

    requests: int = 200
    tokens: int = 16384
    rounds: int = 9


Plan = Chunks | Many


def measure(record: Record, plans: list[Plan]) -> None:
    """All samples of all plans."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for plan in plans:
        if isinstance(plan, Chunks):
            cells = [Cell(NAME, "adaspark", end) for end in plan.ends]
            if all(record.count(cell) >= plan.rounds for cell in cells):
                continue
            progress(f"{NAME}: set up")
            layer = Layer(max(plan.ends))
            record.note(NAME, layer.about)
            samplers = {cell: partial(layer.sample, cell.tokens) for cell in cells}
        else:
            cells = [Cell(TOGETHER, name, plan.requests) for name in (ONE_BY_ONE, DENSE_ROWS)]
            record.note(TOGETHER, {"tokens": plan.tokens})
            samplers = {cell: partial(plan_many, plan, p) for cell, p in zip(cells, (0.9, 1.0))}
        in_turn(record, samplers, dict.fromkeys(cells, plan.rounds))
    torch.set_num_threads(threads)


class _Measured(Scratch):
    """Scratch memory that knows how much of it is used."""

    def __init__(self) -> None:
        super().__init__()
        self._most: dict[str, int] = {}

    def take(self, name: str, *arguments: Any) -> torch.Tensor:
        """As Scratch.take."""
        taken = super().take(name, *arguments)
        self._most[name] = max(self._most.get(name, 0), taken.nbytes)
        return taken

    @property
    def bytes(self) -> int:
        """Of all buffers, at the most."""
        return sum(self._most.values())


class Layer:
    """A layer whose cache holds a whole video; chunks of it are attended again."""

    def __init__(self, tokens: int) -> None:
        dtype = dtype_here()
        shape = SHAPE | {"dtype": dtype}
        self._config = AdaSparkConfig().override(SETTINGS)
        size = self._config.cube_volume
        self._request = AdaSparkRequest(self._config, np.ones(tokens, bool))
        self._table = np.random.default_rng(0).permutation(tokens // size).astype(np.int32)[None]
        self._layer = PagedLayer(self._config, num_blocks=tokens // size, **shape)
        generator = torch.Generator().manual_seed(0)

        def normal(heads: int) -> torch.Tensor:
            made = torch.empty(min(CHUNK, tokens), heads, shape["head_size"], dtype=dtype)
            return made.normal_(generator=generator)

        self._query, key, value = (normal(shape[n]) for n in ("heads", "kv_heads", "kv_heads"))
        self._output = torch.zeros_like(self._query)
        for start in range(0, tokens, CHUNK):
            self._begin(start, min(start + CHUNK, tokens))
            self._layer.write(key, value)
        sums = self._layer.impl._key_summaries.vectors
        self.about = {
            "dtype": str(dtype).removeprefix("torch."),
            "cache_bytes": self._layer.kv_cache.nbytes,
            "sums_bytes": sums.nbytes,
        }

    def _begin(self, start: int, stop: int) -> None:
        rows = StepRows(np.array([0, stop - start]), np.array([stop]), self._table)
        self._layer.begin(rows, [self._request])

    def sample(self, end: int) -> dict:
        """What the chunk that ends there takes, and the memory that the step's layers share."""
        layer, part = self._layer, CHUNK // PART
        self._begin(end - part, end)
        layer.attend(self._query[:part], self._output[:part])
        began = time.process_time()
        layer.attend(self._query[:part], self._output[:part])
        kernel = PART * (time.process_time() - began)
        kernel -= PART * layer.runtime.plan.selection.seconds() / 2  # of two calls

        began = time.process_time()
        self._begin(end - CHUNK, end)
        planning = time.process_time() - began
        plan = layer.runtime.plan
        plan.attention.scratch = scratch = _Measured()
        ran = layer.impl._attend
        layer.impl._attend = lambda *_: None  # all but the kernel
        try:
            layer.attend(self._query, self._output)  # the first layer takes the memory for all
            began = time.process_time()
            layer.attend(self._query, self._output)
            choosing = time.process_time() - began
        finally:
            layer.impl._attend = ran
        kept = float(plan.kept_blocks[0].float().sum() / (plan.attention.tiles.block + 1).sum())
        return {
            "time_s": kernel + choosing + planning / LAYERS,
            "work": kept / SHAPE["kv_heads"],
            "parts": {"planning": planning, "choosing": choosing, "kernel": kernel},
            "step_bytes": scratch.bytes + tensor_bytes(plan.attention),
        }


def tensor_bytes(plan: TilePlan) -> int:
    """Of the tensors that the plan itself is made of."""
    held = (getattr(plan, field.name) for field in fields(plan))
    return sum(each.nbytes for each in held if isinstance(each, torch.Tensor))


def plan_many(plan: Many, p: float) -> dict:
    """Planning a step of many requests, and accounting for it."""
    config = AdaSparkConfig(p_attn=p, p_ffn=p)
    size = config.cube_volume
    request = AdaSparkRequest(config, np.ones(plan.tokens, bool))
    number, length = plan.requests, plan.tokens + 10
    blocks = -(-length // size)
    method = adaspark(config, SHAPE["heads"], SHAPE["kv_heads"], SHAPE["head_size"])
    tables = np.arange(number * blocks, dtype=np.int32).reshape(number, blocks)
    shape = ModelShape(3584, 28, 4, 128, 18944)
    ledger = Ledger(shape, range(LAYERS), LAYERS)
    names = [str(n) for n in range(number)]

    def once() -> tuple[float, float]:
        rows = StepRows(np.arange(number + 1), np.full(number, length), tables)
        began = time.process_time()
        made = method.plan(rows, [request] * number, torch.device("cpu"))
        planned = time.process_time()
        ledger.add_step(names, rows, keep_counts(made))
        return planned - began, time.process_time() - planned

    planning, accounting = (min(times) for times in zip(*(once() for _ in range(3)), strict=True))
    parts = {"planning": planning, "accounting": accounting}
    return {"time_s": planning + accounting, "parts": parts}
