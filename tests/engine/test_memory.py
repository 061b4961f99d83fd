"""Key sums are made at the first video, but their memory is set aside when the cache is sized."""

from __future__ import annotations

import os
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from harness import adaspark

from engine.engines import SPARSE, ask, clip, engine, video_prompt
from vllm_adaspark import worker
from vllm_adaspark.methods.adaspark.settings import SCORES, AdaSparkConfig
from vllm_adaspark.methods.adatp.method import AdaTP
from vllm_adaspark.methods.adatp.settings import AdaTPSettings
from vllm_adaspark.methods.videonsa.method import VideoNSA
from vllm_adaspark.methods.videonsa.settings import VideoNSASettings
from vllm_adaspark.paged.state import KEY_SUMMARIES
from vllm_adaspark.worker import cache_beside_summaries, step_bytes

pytestmark = pytest.mark.engine
METHOD = adaspark(AdaSparkConfig(), 28, 4, 128)


def memory(worker) -> tuple[int, int, int]:
    """(KV blocks, bytes of all caches, bytes of all key sums)."""
    layers = [layer.self_attn.attn for layer in worker.get_model().language_model.model.layers]
    caches = [layer.kv_cache for layer in layers]
    sums = [
        layer.impl._key_summaries for layer in layers if getattr(layer.impl, "_key_summaries", None)
    ]
    return (
        len(caches[0]),
        sum(cache.nbytes for cache in caches),
        sum(each.vectors.nbytes for each in sums),
    )


def test_cache_and_key_sums_fit_what_was_given(checkpoint) -> None:
    given = int(os.environ["VLLM_CPU_KVCACHE_SPACE"]) << 30
    all_of_it = {"num_gpu_blocks_override": None}
    with engine(checkpoint, None, **all_of_it) as llm:
        [(stock_blocks, stock_cache, _)] = llm.collective_rpc(memory)
    assert given - stock_cache // stock_blocks < stock_cache <= given
    with engine(checkpoint, SPARSE, **all_of_it) as llm:
        [(blocks, cache, sums)] = llm.collective_rpc(memory)
        assert sums == 0, "a server without videos does without"
        ask(llm, [video_prompt(clip(24))])
        [(same_blocks, same_cache, sums)] = llm.collective_rpc(memory)
    assert (same_blocks, same_cache) == (blocks, cache) and sums > 0
    assert cache + sums <= given, "nothing is taken that was not set aside"
    assert cache + sums > given - 2 * (cache + sums) // blocks, "and no more than is needed"
    assert blocks < stock_blocks


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype, share", [(torch.bfloat16, 1 / 65), (torch.float8_e4m3fn, 1 / 33)])
def test_cache_beside_summaries(dtype, share, score) -> None:
    """Of keys in bf16, both bounds take what their fp32 sum does."""
    heads, size, block = 4, 128, 64
    page = block * heads * 2 * size * dtype.itemsize
    layer = SimpleNamespace(page_size_bytes=page, num_kv_heads=heads, head_size=size)
    settings, model = AdaSparkConfig(score=score), torch.bfloat16
    cache = cache_beside_summaries(1 << 30, dict.fromkeys(("a", "b"), layer), settings, model)
    without = cache_beside_summaries(1 << 30, {"a": layer}, AdaTPSettings(), model)
    assert without == 1 << 30, "AdaTP keeps nothing of a block"
    assert cache / 2**30 == pytest.approx(1 - share, abs=1e-6)
    blocks = cache // (2 * page)
    made = KEY_SUMMARIES[settings.key_summary](
        blocks, heads, size, block, torch.device("meta"), model
    )
    assert cache + 2 * made.vectors.nbytes <= 1 << 30


def test_what_a_step_takes_is_set_aside_on_a_gpu() -> None:
    """A 7B's layer in steps of 8192 tokens with a context of 128K: some hundredths of a cache."""
    with patch.object(worker.current_platform, "is_cpu", lambda: False):
        config = SimpleNamespace(
            model_config=SimpleNamespace(
                get_num_attention_heads=lambda parallel: 28,
                get_num_kv_heads=lambda parallel: 4,
                get_head_size=lambda: 128,
                dtype=torch.bfloat16,
                max_model_len=131072,
            ),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            scheduler_config=SimpleNamespace(
                max_num_scheduled_tokens=8192, max_num_batched_tokens=131072, max_num_seqs=64
            ),
            cache_config=SimpleNamespace(block_size=64),
            num_speculative_tokens=0,
        )
        turned = 2 * 8192 * 28 * 128 * 2
        tiles = 128 + 1024 + 64
        assert step_bytes(config, METHOD) == turned + tiles * 4 * 2049 * (4 + 4 + 4 + 1)
        assert (
            VideoNSA(VideoNSASettings(), SimpleNamespace(hidden_size=3584), "cuda").step_bytes(
                8192, 28, 4, 128, 2
            )
            == 8192 * (3584 * (12 + 6) + 2 * 3584 * 2 + 4 * 32 * 16) + (2 << 21) * 8
        )
        config.num_speculative_tokens = 3  # each may choose
        more = tiles + 3 * 64
        assert step_bytes(config, METHOD) == turned + more * 4 * 2049 * (4 + 4 + 4 + 1)
        config.num_speculative_tokens = 0
        text = SimpleNamespace(
            num_attention_heads=28, num_key_value_heads=4, hidden_size=3584,
            intermediate_size=18944, num_hidden_layers=28,
        )  # fmt: skip
        dropping = AdaTP(AdaTPSettings(), text, "cuda")
        assert step_bytes(config, dropping) == 8192 * 4 * 128 * 4 + 12 * (1 << 24)
        config.parallel_config.tensor_parallel_size = 2
        assert step_bytes(config, METHOD) == turned + tiles * 4 * 2049 * (4 + 4 + 4 + 1 + 2 * 2 * 4)
        config.parallel_config.tensor_parallel_size = 1
        layer = SimpleNamespace(page_size_bytes=64 * 4 * 256 * 2, num_kv_heads=4, head_size=128)

        class Stock:
            vllm_config = config

            def determine_available_memory(self) -> int:
                return 40 << 30

            def get_model(self):
                return SimpleNamespace(runtime=SimpleNamespace(method=METHOD))

            def get_kv_cache_spec(self):
                return dict.fromkeys(map(str, range(28)), layer)

        class Ours(worker.AccountingWorker, Stock):
            pass

        cache = Ours().determine_available_memory()
    left = (40 << 30) - step_bytes(config, METHOD)
    assert cache == cache_beside_summaries(left, {"": layer}, METHOD.settings, torch.bfloat16)
    assert 1 - cache / (40 << 30) < 0.022
