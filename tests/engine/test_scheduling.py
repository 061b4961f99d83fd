"""What the scheduler does to a request must not change what it says: chunks, preemption, ranks."""

from __future__ import annotations

import os

import checkpoint as demo_checkpoint  # examples/demo
import pytest
from harness import cpu_takes_fp8  # benchmarks

from engine.engines import SPARSE, ask, clip, engine, five_prompts, last_reports, video_prompt

pytestmark = pytest.mark.engine
CLOSE = 1e-3  # of log-probabilities in float32
# Cubes that a chunk edge cuts run dense, so a ragged chunk size computes more.
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
    # Not --long-prefill-token-threshold: vLLM ignores it for a request that is alone.
    options = {"max_num_scheduled_tokens": chunk, "enable_prefix_caching": False}
    cut = 0
    with engine(checkpoint, SPARSE, **options) as llm:
        for prompt, (want, account) in zip(prompts(), whole, strict=True):
            got = ask(llm, [prompt])[0]
            (report,) = last_reports(llm)
            assert report["tokens"] == account["tokens"]
            cut += report["fallback_tokens"]["cut_cube"]
            if chunk % 64 == 0:
                assert got.difference(want) < CLOSE
                assert report["flops"]["executed"]["ffn"] == account["flops"]["executed"]["ffn"]
            else:
                assert largest_difference(got, want) < RAGGED
                assert report["flops_ratio"] >= account["flops_ratio"] - 0.005
    assert (cut > 0) == (chunk % 64 > 0)


def largest_difference(got, want) -> float:
    """Of the first token's log-probabilities: later ones depend on what was said before."""
    mine, theirs = got.logprobs[0], want.logprobs[0]
    return max(abs(mine[token] - theirs[token]) for token in mine.keys() & theirs.keys())


def test_preemption_and_resume(checkpoint) -> None:
    """Too few KV blocks for all: requests are preempted, computed again, and answer alike."""
    batch = [video_prompt(clip(36, seed=20 + i), question="What moves?") for i in range(4)]
    options = {"enable_prefix_caching": False, "disable_log_stats": False}
    with engine(checkpoint, SPARSE, **options) as llm:
        alone = [ask(llm, [prompt], max_tokens=100)[0] for prompt in batch]
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


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_tensor_parallel_equals_one_rank(kv_heads, tmp_path, monkeypatch) -> None:
    """Two ranks that hold a KV head each, or share one, choose what a single rank chooses."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, cores)))
    path = demo_checkpoint.build(tmp_path / "model", dtype="float32", seed=3, kv_heads=kv_heads)
    # Under a budget one p is found for all KV heads, whichever rank holds them.
    asked = [*prompts()[:3], video_prompt(clip(60, seed=1), flops=0.5)]
    with engine(path, SPARSE, enable_prefix_caching=False) as llm:
        whole = [(ask(llm, [prompt])[0], last_reports(llm)[0]) for prompt in asked]
    with engine(path, SPARSE, tensor_parallel_size=2, enable_prefix_caching=False) as llm:
        for prompt, (want, account) in zip(asked, whole, strict=True):
            assert ask(llm, [prompt])[0].difference(want) < CLOSE
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
