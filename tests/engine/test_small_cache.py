"""A KV cache that holds one request and no block more: nothing waits for ever, nothing differs."""

from __future__ import annotations

import pytest

from engine.engines import SPARSE, ask, clip, engine, video_prompt

pytestmark = pytest.mark.engine
BLOCK = 64
LENGTH = 13 * BLOCK  # of a request with its answer
NEEDED = LENGTH // BLOCK + 1  # one block is vLLM's own


def question(seed: int) -> dict:
    return video_prompt(clip(44, seed=seed), question="Which digit? " * 4)


@pytest.mark.parametrize("method", ["adaspark", "adatp"])
def test_the_longest_requests_are_answered_one_by_one(checkpoint, method: str) -> None:
    settings = SPARSE if method == "adaspark" else {}
    options = {"max_model_len": LENGTH, "max_num_batched_tokens": LENGTH, "max_num_seqs": 4}
    prompts = [question(seed) for seed in range(3)]
    with engine(checkpoint, settings, method, num_gpu_blocks_override=NEEDED, **options) as llm:
        used = len(llm.generate(prompts[:1], use_tqdm=False)[0].prompt_token_ids)
        left = LENGTH - used
        assert BLOCK < left < 3 * BLOCK
        alone = [ask(llm, [prompt], max_tokens=left)[0] for prompt in prompts]
        together = ask(llm, prompts, max_tokens=left)
    for one, other in zip(alone, together, strict=True):
        assert len(one.ids) == left and one.ids == other.ids


def test_a_cache_too_small_for_one_video_is_refused_at_start(checkpoint) -> None:
    with (
        pytest.raises(ValueError, match="To serve at least one request"),
        engine(checkpoint, SPARSE, max_model_len=LENGTH, num_gpu_blocks_override=NEEDED - 1),
    ):
        pass
