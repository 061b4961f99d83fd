"""Hooks on a running model's layers that measure one prefill; nothing in the model is changed.

The prompt must be computed in one step: then every layer's attention is handed all queries and keys
at once, and nothing has to be kept but the numbers.
"""

from __future__ import annotations

from typing import Any

import torch

from .measure import AttentionMass, Prompt, ffn_change, statistics


class ProbeError(RuntimeError):
    """There is nothing to tell; says why."""


class Probe:
    """Measures the next step that computes the whole prompt.

    Args:
        prompt: the prompt that will be computed.
        queries: token indices to look at, by kind.

    Example:
        >>> probe = Probe(prompt, prompt.queries(64, least_cubes=4))
        >>> handles = llm.apply_model(probe.attach)[0]
        >>> llm.generate(...)
        >>> layers = probe.layers()
    """

    def __init__(self, prompt: Prompt, queries: dict[str, torch.Tensor]) -> None:
        self._prompt, self._queries = prompt, queries
        self._layers: dict[int, dict[str, Any]] = {}

    def attach(self, model: torch.nn.Module) -> list[Any]:
        """Hook this worker's layers; returns handles, whose ``remove()`` takes the hooks off."""
        stack = model.language_model.model
        handles = []
        for index in range(stack.start_layer, stack.end_layer):
            layer = stack.layers[index]
            handles.append(layer.self_attn.attn.register_forward_pre_hook(self._attention(index)))
            handles.append(layer.mlp.register_forward_hook(self._ffn(index)))
        return handles

    def layers(self) -> list[dict[str, Any]]:
        """What was measured, layer by layer, JSON-ready.

        Raises:
            ProbeError: the prompt was not computed in one step, or not at all.
        """
        found = [self._layers[index] for index in sorted(self._layers)]
        if not found or any(not {"attention", "ffn"} <= layer.keys() for layer in found):
            raise ProbeError(
                "the prompt was not computed in one step; max_num_batched_tokens and "
                "max_num_scheduled_tokens must hold it, and prefix caching must be off"
            )
        return found

    def _note(self, index: int, key: str, value: dict[str, Any]) -> None:
        self._layers.setdefault(index, {"layer": index})[key] = value

    def _attention(self, index: int):
        def hook(attn: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            query, key = arguments[:2]
            tokens = len(self._prompt.is_video)
            if len(query) < tokens:  # a decode step
                return
            q = query[:tokens].view(tokens, attn.num_heads, attn.head_size)
            k = key[:tokens].view(tokens, attn.num_kv_heads, attn.head_size)
            measured = {
                kind: AttentionMass.of(
                    q[at.to(q.device)], k, at, attn.impl.scale, self._prompt
                ).summary()
                for kind, at in self._queries.items()
                if len(at)
            }
            self._note(index, "attention", measured)

        return hook

    def _ffn(self, index: int):
        def hook(_mlp: Any, arguments: tuple[torch.Tensor, ...], branch: torch.Tensor) -> None:
            _, before = arguments
            tokens = len(self._prompt.is_video)
            if len(branch) < tokens:
                return
            ratio, cosine = (x.cpu() for x in ffn_change(before[:tokens], branch[:tokens]))
            is_video = self._prompt.is_video
            measured = {
                kind: {"norm_ratio": statistics(ratio[who]), "cosine": statistics(cosine[who])}
                for kind, who in {"video": is_video, "text": ~is_video}.items()
            }
            self._note(index, "ffn", measured)

        return hook
