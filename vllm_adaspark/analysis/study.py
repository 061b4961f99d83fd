"""The runs of an analysis: sparse at several p, one dense and measured, one traced.

All ask the same question about the same video, one after the other.  The KV cache shares nothing
between them (prefix caching must be off), so each computes its whole prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..reports import merge_reports
from .measure import MASSES, Prompt
from .probe import Probe

LEAST_CUBES = 4  # before a query: of fewer there is little to choose
PER_LAYER = ("attention_density", "ffn_density")
PER_RUN = (*PER_LAYER, "flops_ratio")


class StudyError(ValueError):
    """This video or question cannot be analysed; says why and what to change."""


def study(
    llm: Any,
    prompt: dict[str, Any],
    shares: Sequence[float],
    queries: int,
    step: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Run and measure.

    Args:
        llm: vLLM's ``LLM`` in this process, that computes the prompt in one step, eagerly and
            without prefix caching.
        prompt: vLLM's prompt with one video.
        shares: values of p (p_attn and p_ffn alike) to run at.
        queries: how many query tokens of each kind to measure.
        step: told what is being done.

    Returns:
        JSON-ready: ``tokens``, ``cubes``, ``queries``, ``layers`` (of the dense run),
        ``selection`` (of each sparse run).

    Raises:
        StudyError: the video fills too few KV blocks.
    """
    config = llm.llm_engine.vllm_config
    selection = []
    for share in shares:
        step(f"sparse, p = {share:g}")
        output = run(llm, prompt, {"enabled": True, "p_attn": share, "p_ffn": share})
        selection.append(_selection(llm, output.request_id, share))
        if len(selection) == 1:
            ids = torch.tensor(output.prompt_token_ids)
            is_video = ids == config.model_config.hf_config.video_token_id
            tokens = Prompt(is_video, config.cache_config.block_size)
            chosen = _queries(tokens, queries)

    step("dense, measured")
    probe = Probe(tokens, chosen)
    (handles,) = llm.apply_model(probe.attach)
    try:
        run(llm, prompt, {"enabled": False})
    finally:
        for handle in handles:
            handle.remove()
    return {
        "tokens": {"all": len(tokens.is_video), "video": int(tokens.is_video.sum())},
        "cubes": int(tokens.cubes.sum()),
        "block_size": tokens.block,
        "queries": {kind: len(at) for kind, at in chosen.items()},
        "masses": list(MASSES),
        "layers": probe.layers(),
        "selection": selection,
    }


def run(llm: Any, prompt: dict[str, Any], settings: dict[str, Any], max_tokens: int = 1) -> Any:
    """vLLM's output of the prompt under these AdaSpark settings."""
    from vllm import SamplingParams

    keywords = {**prompt.get("mm_processor_kwargs", {}), "adaspark": settings}
    (output,) = llm.generate(
        [{**prompt, "mm_processor_kwargs": keywords}],
        SamplingParams(max_tokens=max_tokens, temperature=0),
        use_tqdm=False,
    )
    return output


def _queries(tokens: Prompt, number: int) -> dict[str, torch.Tensor]:
    chosen = tokens.queries(number, LEAST_CUBES)
    if not len(chosen["question"]):
        raise StudyError(
            f"the video fills {int(tokens.cubes.sum())} KV blocks of {tokens.block} tokens; "
            f"{LEAST_CUBES} are needed for something to choose from: take more frames (--fps) or "
            "a longer video"
        )
    return chosen


def _selection(llm: Any, request_id: str, share: float) -> dict[str, Any]:
    """What one run kept, per layer and in all, from its account."""
    requests = merge_reports(llm.collective_rpc("adaspark_report"))["requests"]
    # The engine's id is the output's and a random suffix.
    account = next(r for r in requests if r["request_id"].rpartition("-")[0] == request_id)
    layers = {key: [layer[key] for layer in account["layers"]] for key in PER_LAYER}
    return {"p": share, **{key: account[key] for key in PER_RUN}, "layers": layers}
