"""What clients can make a server do who send hour-long videos: by settings, budgets and traces.

Sizes are the 7B model's, and a prompt is as long as such a video becomes under vLLM's sampling.
"""

from __future__ import annotations

import gc
import itertools
import tracemalloc

import numpy as np

from vllm_adaspark.accounts.flops import ModelShape
from vllm_adaspark.methods.adaspark.budget import prompt_cost
from vllm_adaspark.methods.adaspark.settings import COMPENSATIONS, SELECTIONS, AdaSparkConfig
from vllm_adaspark.traces.store import Sizes, TraceStore
from vllm_adaspark.traces.trace import Trace, Video

SHAPE = ModelShape(hidden=3584, heads=28, kv_heads=4, head_size=128, intermediate=18944)
LAYERS, BLOCK = 28, 64
GRID = (384, 13, 23)  # frame pairs, rows, columns: 114,816 tokens
BEFORE, QUESTION = 15, 1000
STEP = 32_768  # tokens


def hour_of_video() -> np.ndarray:
    """Which tokens of the prompt are video; so much text still chooses its cubes."""
    text = [np.zeros(n, bool) for n in (BEFORE, QUESTION)]
    return np.concatenate([text[0], np.ones(int(np.prod(GRID)), bool), text[1]])


def test_no_settings_cost_more_than_dense_and_choosing() -> None:
    """p near 0 and 1, most and least ``min_cubes``: what leaves out little chooses as cheaply."""
    is_video, dearest = hour_of_video(), 0.0
    for share, least, rule, instead in itertools.product(
        (1e-9, 0.5, 1 - 1e-9), (1, 16), SELECTIONS, COMPENSATIONS
    ):
        shares = {"p_attn": share, "p_ffn": share, "keep": share}
        asked = shares | {"min_cubes": least, "selection": rule, "compensation": instead}
        settings = AdaSparkConfig().override(asked, request=True)
        told = settings.forecast(SHAPE, LAYERS, is_video)
        dearest = max(dearest, told.spent / told.dense)
    assert 1 < dearest < 1.03


def test_hundreds_of_budgets_leave_nothing_behind() -> None:
    is_video = hour_of_video()

    def share(budget: float) -> float:
        settings = AdaSparkConfig().override({"flops": budget}, request=True)
        return prompt_cost(SHAPE, LAYERS, is_video, settings).share(budget)

    for n in range(50):  # what Python itself keeps for later is there before
        share(0.5 + n / 3000)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        shares = [share(0.1 + n / 1000) for n in range(400)]
        gc.collect()
        kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert all(one <= other for one, other in itertools.pairwise(shares))
    assert len(set(shares)) > 100, "they are different budgets"
    assert kept < 400 * 150, "the numbers, their list, and not so much as an empty array of each"


def traced(number: int) -> Trace:
    """32 clients at once, again and again."""
    tokens = len(hour_of_video())
    return Trace(
        id=f"{number}", request_id=f"{number}", started=float(number),
        prompt_ids=np.zeros(tokens, np.int32), videos=[Video(BEFORE, GRID, (4, 4, 4), "cube")],
        settings={}, block_size=BLOCK, layers=range(LAYERS),
    )  # fmt: skip


def test_traces_at_32_at_once_share_the_memory_for_traces() -> None:
    """Some are recorded whole; of the others there is what finds room, and why is said."""
    limit = AdaSparkConfig().trace_mb << 20
    sizes, store = Sizes(LAYERS, SHAPE.kv_heads, BLOCK, STEP), TraceStore(limit)
    for storm in range(3):
        traces = [traced(100 * storm + n) for n in range(32)]
        taken = [trace for trace in traces if store.start(trace, sizes.prompt(trace, 0))]
        whole = [trace for trace in taken if trace.truncated is None]
        assert 0 < len(whole) < 32
        for trace in whole:
            room = trace.reserved - trace.counted
            trace.counted += room  # as its steps come in
            assert store.grow(trace, 0) and not store.grow(trace, limit)
        assert sum(max(t.counted, t.reserved) for t in store) <= limit
        assert all("trace_mb" in t.truncated for t in taken if t not in whole)
        for trace in taken:
            store.finish(trace.request_id)
        assert sum(trace.counted for trace in store) <= limit
