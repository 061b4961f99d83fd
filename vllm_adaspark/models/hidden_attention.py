"""vLLM's attention layer, whose op also carries the layer's normed input.

A method with gates of its own makes them of that input, in the attention op: outside the compiled
graph, where the step's plan is known, so that steps without anything to gate never run them.  Only
models of such methods are built with this layer (``Method.wants_hidden``); all others keep vLLM's.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import (
    get_attention_context,
    unified_kv_cache_update,
)
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

OP_NAME = "vllm::adaspark_attention_with_hidden"


class HiddenAttention(Attention):
    """Stock, but ``forward`` takes the layer's normed input as well."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        """As stock: ``[tokens, heads * head_size]`` each; ``hidden [tokens, hidden]``."""
        output = torch.empty_like(query)
        if self.query_quant is not None:
            query, _ = self.query_quant(query, self._q_scale)
        query, out = (x.view(-1, self.num_heads, self.head_size) for x in (query, output))
        key, value = (x.view(-1, self.num_kv_heads, self.head_size) for x in (key, value))
        # As stock: a direct call where the platform wants one, else ops that torch.compile keeps.
        if self.use_direct_call:
            written = unified_kv_cache_update(key, value, self.layer_name)
            _attend(query, key, value, hidden, out, self.layer_name, written)
        else:
            name = _encode_layer_name(self.layer_name)
            written = torch.ops.vllm.unified_kv_cache_update(key, value, name)
            torch.ops.vllm.adaspark_attention_with_hidden(
                query, key, value, hidden, out, name, written
            )
        return output


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor,
    output: torch.Tensor,
    layer_name: LayerNameType,
    written: torch.Tensor,
) -> None:
    """Write ``output``; ``written`` orders this after the cache update, as in the stock op."""
    metadata, layer, kv_cache, _ = get_attention_context(_resolve_layer_name(layer_name))
    layer.impl.forward(layer, query, key, value, kv_cache, metadata, output=output, hidden=hidden)


direct_register_custom_op(
    op_name=OP_NAME.removeprefix("vllm::"),
    op_func=_attend,
    mutates_args=["output"],
)
