"""Which LoRA adapter each token runs, where a layer sees other tokens than the step has.

vLLM tells its LoRA layers once per step, by position, which adapter each token runs.  A method may
run a layer on some of the tokens only, or drop tokens between layers; then the layer's inputs stand
for other positions, and the mapping has to be gathered like them.  vLLM 0.32.0 has no seam for it:
the state of its ``PunicaWrapper`` is replaced here and put back, for its PyTorch and its Triton
kernels.  With an adapter in the step, the Triton kernels' mapping makes the host wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# What PunicaWrapperBase keeps of compute_meta, in its order, for the PyTorch kernels.
_OF_META = (
    "_seq_start_locs",
    "_seq_lengths",
    "_lora_indices_per_batch",
    "batch_size",
    "max_length",
    "token_nums",
    "no_lora",
)


def has_lora(layer: nn.Module) -> bool:
    """Whether a linear layer may run adapters."""
    from vllm.lora.layers import BaseLayerWithLoRA

    return isinstance(layer, BaseLayerWithLoRA)


class TokenMapping:
    """The mapping of a language model's LoRA layers.

    Args:
        wrapper: vLLM's ``PunicaWrapperBase``, which the layers share.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._whole: dict[str, Any] = {}  # what the wrapper had before narrow()

    @classmethod
    def of_model(cls, language_model: nn.Module) -> TokenMapping | None:
        """The model's; None if no layer of it runs adapters."""
        layers = (layer for layer in language_model.modules() if has_lora(layer))
        first = next(layers, None)
        return None if first is None else cls(first.punica_wrapper)

    @property
    def idle(self) -> bool:
        """Whether no token of the step runs an adapter."""
        meta = getattr(self._wrapper, "token_mapping_meta", None)
        return bool(self._wrapper.no_lora if meta is None else meta.no_lora_flag_cpu)

    @contextmanager
    def gathered(self, tokens: torch.Tensor | slice) -> Iterator[None]:
        """Layers called in this context get inputs ``[n, ...]`` that stand for ``tokens``.

        Args:
            tokens: ``[n]`` int64, of those that the layers see outside of it.
        """
        before = self._replace(tokens)
        try:
            yield
        finally:
            vars(self._wrapper).update(before)

    def narrow(self, tokens: torch.Tensor) -> None:
        """From now on the layers see ``tokens [n]`` of those they saw, until :meth:`reset`."""
        before = self._replace(tokens)
        self._whole = self._whole or before

    def reset(self) -> None:
        """The layers see all tokens of the step again."""
        vars(self._wrapper).update(self._whole)
        self._whole = {}

    def _replace(self, tokens: torch.Tensor | slice) -> dict[str, Any]:
        """Let the wrapper describe ``tokens``; returns what it had."""
        wrapper = self._wrapper
        if self.idle:
            return {}
        mapping = wrapper.token_lora_indices
        if isinstance(tokens, slice):
            gathered = mapping[tokens]
        else:  # rows that pad a CUDA graph lie behind the mapping, and run no adapter
            inside = tokens < len(mapping)
            gathered = torch.where(inside, mapping[tokens.clamp(max=len(mapping) - 1)], -1)
        changed: dict[str, Any] = {
            "_token_lora_indices": gathered,
            "indices_len": [len(gathered), *wrapper.indices_len[1:]],
        }
        if hasattr(wrapper, "token_mapping_meta"):
            changed["token_mapping_meta"] = _triton_meta(wrapper, gathered)
        else:
            from vllm.lora.punica_wrapper.utils import compute_meta

            changed |= zip(_OF_META, compute_meta(gathered), strict=True)
        before = {name: getattr(wrapper, name) for name in changed}
        vars(wrapper).update(changed)
        return before


def _triton_meta(wrapper: Any, mapping: torch.Tensor) -> Any:
    """What the Triton kernels need of a mapping ``[n]``."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta
    from vllm.utils.gpu_sync_debug import gpu_sync_allowed

    counts = wrapper.token_mapping_meta.captured_lora_counts
    meta = LoRAKernelMeta.make(wrapper.max_loras, len(mapping), mapping.device, counts)
    with gpu_sync_allowed():
        meta.prepare_tensors(mapping)
    return meta
