"""The runs of an analysis: sparse at several p, and one dense that hooks on the layers measure.

All ask the same question about the same video, one after the other.  The KV cache shares nothing
between them (prefix caching must be off), and each prompt is computed in one step: then every
layer's attention is handed all queries and keys at once, and only the numbers have to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..models.layout import layout_of
from .measure import MASSES, AttentionMass, Prompt, ffn_change, statistics

LEAST_CUBES = 4  # before a query: of fewer there is little to choose
PER_LAYER = ("attention_density", "ffn_density")


class StudyError(ValueError):
    """This video or question cannot be analysed; says why and what to change."""


def study(
    llm: Any,
    ask: Callable[[dict[str, Any]], Any],
    shares: Sequence[float],
    queries: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run and measure.

    Args:
        llm: vLLM's ``LLM`` in this process, that computes the prompt in one step, eagerly and
            without prefix caching.
        ask: asks it under a request's settings (:class:`vllm_adaspark.cli.offline.Answer`).
        shares: values of p (p_attn and p_ffn alike) to run at.
        queries: how many query tokens of each kind to measure.
        say: told what is being done.

    Returns:
        JSON-ready: ``tokens``, ``cubes``, ``queries``, ``layers`` (of the dense run),
        ``selection`` (of each sparse run).

    Raises:
        StudyError: the video fills too few KV blocks.
    """
    config = llm.llm_engine.vllm_config
    selection = []
    for share in shares:
        say(f"sparse, p = {share:g}")
        answer = ask({"enabled": True, "p_attn": share, "p_ffn": share})
        account = answer.account
        layers = {key: [layer[key] for layer in account["layers"]] for key in PER_LAYER}
        told = {key: account[key] for key in (*PER_LAYER, "flops_ratio")}
        selection.append({"p": share, **told, "layers": layers})
        if len(selection) == 1:
            ids = torch.tensor(answer.prompt_token_ids)
            hf_config = config.model_config.hf_config
            is_video = ids == hf_config.video_token_id
            place = is_video.nonzero()
            is_video[place[len(place) - layout_of(hf_config).after_video :]] = False
            prompt = Prompt(is_video, config.cache_config.block_size)
            chosen = _queries(prompt, queries)

    say("dense, measured")
    measured: dict[int, dict[str, Any]] = {}
    (handles,) = llm.apply_model(lambda model: _attach(model, prompt, chosen, measured))
    try:
        ask({"enabled": False})
    finally:
        for handle in handles:
            handle.remove()
    return {
        "tokens": {"all": len(prompt.is_video), "video": int(prompt.is_video.sum())},
        "cubes": int(prompt.cubes.sum()),
        "block_size": prompt.block,
        "queries": {kind: len(at) for kind, at in chosen.items()},
        "masses": list(MASSES),
        "layers": [measured[index] for index in sorted(measured)],
        "selection": selection,
    }


def _queries(prompt: Prompt, number: int) -> dict[str, torch.Tensor]:
    chosen = prompt.queries(number, LEAST_CUBES)
    if not len(chosen["question"]):
        raise StudyError(
            f"the video fills {int(prompt.cubes.sum())} KV blocks of {prompt.block} tokens; "
            f"{LEAST_CUBES} are needed for something to choose from: take more frames (--fps) or "
            "a longer video"
        )
    return chosen


def _attach(
    model: torch.nn.Module, prompt: Prompt, queries: dict[str, torch.Tensor], measured: dict
) -> list[Any]:
    """Hooks on the layers, that put what they measure of the prompt's step into ``measured``.

    Returns:
        Handles, whose ``remove()`` takes the hooks off.
    """
    tokens, is_video = len(prompt.is_video), prompt.is_video

    def attention(index: int, attn: Any, query: torch.Tensor, key: torch.Tensor) -> None:
        q = query[:tokens].view(tokens, attn.num_heads, attn.head_size)
        k = key[:tokens].view(tokens, attn.num_kv_heads, attn.head_size)
        measured.setdefault(index, {"layer": index})["attention"] = {
            kind: AttentionMass.of(q[at.to(q.device)], k, at, attn.impl.scale, prompt).summary()
            for kind, at in queries.items()
            if len(at)
        }

    def ffn(index: int, before: torch.Tensor, branch: torch.Tensor) -> None:
        ratio, cosine = (x.cpu() for x in ffn_change(before[:tokens], branch[:tokens]))
        measured[index]["ffn"] = {
            kind: {"norm_ratio": statistics(ratio[who]), "cosine": statistics(cosine[who])}
            for kind, who in {"video": is_video, "text": ~is_video}.items()
        }

    def hooks(index: int, layer: Any) -> tuple[Any, Any]:
        def before_attention(attn: Any, given: tuple[torch.Tensor, ...]) -> None:
            if len(given[0]) >= tokens:  # not a decode step
                attention(index, attn, *given[:2])

        def after_ffn(_mlp: Any, given: tuple[torch.Tensor, ...], branch: torch.Tensor) -> None:
            if len(branch) >= tokens:
                ffn(index, given[1], branch)

        return (
            layer.self_attn.attn.register_forward_pre_hook(before_attention),
            layer.mlp.register_forward_hook(after_ffn),
        )

    stack = model.language_model.model
    within = range(stack.start_layer, stack.end_layer)
    return [handle for index in within for handle in hooks(index, stack.layers[index])]
