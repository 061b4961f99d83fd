"""What the scheduler does to a request must not change what it says: chunks, preemption, ranks."""

from __future__ import annotations

from functools import partial

import checkpoint as demo_checkpoint  # examples/demo
import pytest
from fuzz.choices import recorded
from fuzz.metamorphic import Compared, compare
from harness import cpu_takes_fp8  # benchmarks

from engine.engines import SPARSE, ask, clip, engine, five_prompts, last_reports, video_prompt

pytestmark = pytest.mark.engine
CLOSE = 1e-3  # of log-probabilities in float32
# Cubes that a chunk edge cuts run dense, so more is computed.
RAGGED = 0.5


def prompts() -> list[dict]:
    long_video = video_prompt(clip(60, seed=1), question="Which digit is shown?")
    return [long_video, *five_prompts().values()]


@pytest.fixture(scope="module")
def whole(checkpoint):
    """Answers and accounts with every prompt in one chunk, each alone."""
    with engine(checkpoint, SPARSE, enable_prefix_caching=False) as llm:
        return [(ask(llm, [prompt])[0], last_reports(llm)[0]) for prompt in prompts()]


@pytest.mark.parametrize("chunk", [64, 100, 256])
def test_chunk_size(checkpoint, whole, chunk) -> None:
    """Chunks end at the edges of cubes, so neither their size nor what shares a step matters."""
    # Not --long-prefill-token-threshold: vLLM ignores it for a request that is alone.
    options = {"max_num_scheduled_tokens": chunk, "enable_prefix_caching": False}
    with engine(checkpoint, SPARSE, **options) as llm:
        alone = []
        for prompt, (want, account) in zip(prompts(), whole, strict=True):
            (answer,), choices = recorded(llm, partial(ask, llm, [prompt]))
            alone.append(choices.get(0, {}))
            (report,) = last_reports(llm)
            assert answer.difference(want) < CLOSE
            assert report["tokens"] == account["tokens"]
            assert report["flops"]["executed"]["ffn"] == account["flops"]["executed"]["ffn"]
            assert report["fallback_tokens"] == account["fallback_tokens"]
        answers, together = recorded(llm, partial(ask, llm, prompts()))
        for got, (want, _) in zip(answers, whole, strict=True):
            assert got.difference(want) < CLOSE
        assert sum(map(bool, alone)) == 3, "those with a cube"
        result = Compared()
        for nth, theirs in enumerate(alone):
            compare(result, (nth,), theirs, together.get(nth, {}), cached=0)
        assert result.choices and not result.failed, result


def test_steps_shorter_than_a_block_cut_cubes(checkpoint, whole) -> None:
    options = {"max_num_scheduled_tokens": 60, "enable_prefix_caching": False}
    with engine(checkpoint, SPARSE, **options) as llm:
        got = ask(llm, prompts()[:1])[0]
        (report,) = last_reports(llm)
    want, account = whole[0]
    assert report["fallback_tokens"]["cut_cube"] > 0
    assert largest_difference(got, want) < RAGGED
    assert report["flops_ratio"] >= account["flops_ratio"]


def largest_difference(got, want) -> float:
    """Of the first token's log-probabilities: later ones depend on what was said before."""
    mine, theirs = got.logprobs[0], want.logprobs[0]
    return max(abs(mine[token] - theirs[token]) for token in mine.keys() & theirs.keys())


def test_preemption_and_resume(checkpoint) -> None:
    """With too few KV blocks for all, requests are preempted, computed again, and answer alike."""
    batch = [video_prompt(clip(36, seed=20 + i), question="What moves?") for i in range(4)]
    options = {"enable_prefix_caching": False, "disable_log_stats": False}
    with engine(checkpoint, SPARSE, **options) as llm:
        alone = ask(llm, batch, max_tokens=100)
        assert preemptions(llm) == 0
    # Four prompts of 10 blocks each fit, their answers of up to two blocks more do not.
    options |= {"num_gpu_blocks_override": 43, "max_model_len": 2048}
    with engine(checkpoint, SPARSE, **options) as llm:
        together = ask(llm, batch, max_tokens=100)
        assert preemptions(llm) > 0
    for got, want in zip(together, alone, strict=True):
        assert got.ids[:3] == want.ids[:3]
        assert got.difference(want) < CLOSE


def preemptions(llm) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


@pytest.mark.parametrize(
    "kv_heads, tower, tile_cubes", [(2, "weights", 1), (1, "data", 1), (2, "data", 2)]
)
def test_tensor_parallel_equals_one_rank(kv_heads, tower, tile_cubes, tmp_path) -> None:
    """Two ranks that hold a KV head each, or share one, choose what a single rank chooses.

    Whether they share the vision tower's weights or its frames (``--mm-encoder-tp-mode``).
    """
    path = demo_checkpoint.build(tmp_path / "model", dtype="float32", seed=3, kv_heads=kv_heads)
    # Under a budget one p is found for all KV heads, whichever rank holds them.
    asked = [*prompts()[:3], video_prompt(clip(60, seed=1), flops=0.5)]
    compared, ranks = Compared(), {"tensor_parallel_size": 2, "mm_encoder_tp_mode": tower}
    settings = SPARSE | {"tile_cubes": tile_cubes}
    with engine(path, settings, enable_prefix_caching=False) as llm:
        asking = [partial(ask, llm, [prompt]) for prompt in asked]
        whole = [(*recorded(llm, ask_it), last_reports(llm)[0]) for ask_it in asking]
    with engine(path, settings, enable_prefix_caching=False, **ranks) as llm:
        for prompt, ((want,), chosen, account) in zip(asked, whole, strict=True):
            (got,), again = recorded(llm, partial(ask, llm, [prompt]))
            assert got.difference(want) < CLOSE
            if kv_heads == 2:  # else both ranks have the choices of the one head
                compare(compared, (), chosen.get(0, {}), again.get(0, {}), 0)
            (report,) = last_reports(llm)
            # Each rank counted its own KV heads; together they did what one rank does.
            for mine, theirs in zip(report["layers"], account["layers"], strict=True):
                assert mine["ffn_active"] == theirs["ffn_active"]
                assert mine["cubes_attended"] == pytest.approx(theirs["cubes_attended"], rel=2e-3)
            assert report["flops_ratio"] == pytest.approx(account["flops_ratio"], rel=1e-3)
            assert report["fallback_tokens"] == account["fallback_tokens"]
        first, second = (
            [entry["counts"]["cubes_attended"] for entry in rank["requests"]]
            for rank in llm.collective_rpc("adaspark_report")
        )
        assert (first == second) == (kv_heads == 1), "ranks with the same KV head choose the same"
    assert not compared.failed and (compared.choices > 200) == (kv_heads == 2), compared


def test_torch_compile_equals_eager(checkpoint, whole) -> None:
    with engine(checkpoint, SPARSE, enforce_eager=False, enable_prefix_caching=False) as llm:
        for prompt, (want, account) in zip(prompts()[:3], whole, strict=False):
            assert ask(llm, [prompt])[0].difference(want) < CLOSE
            assert last_reports(llm)[0]["ffn_density"] == pytest.approx(
                account["ffn_density"], abs=2e-3
            )


@pytest.mark.skipif(not cpu_takes_fp8(), reason="vLLM's CPU kernel takes fp8 with AVX-512 or AMX")
def test_fp8_kv_cache(checkpoint, whole) -> None:
    """fp8 moves log-probabilities, but not what is computed."""
    with engine(checkpoint, SPARSE, kv_cache_dtype="fp8", dtype="bfloat16") as llm:
        got = ask(llm, [prompts()[0]])[0]
        (report,) = last_reports(llm)
    want, account = whole[0]
    assert largest_difference(got, want) < 1.0
    assert report["attention_density"] == pytest.approx(account["attention_density"], abs=0.05)
