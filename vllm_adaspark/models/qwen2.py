"""Qwen2, the language model of Qwen2.5-VL, whose layers follow a method's plan.

Weights, names and parallelism are stock; only the attention backend and the FFN's forward differ,
and a method may add weights of its own to the attention (``Method.attention_modules``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2MLP,
    Qwen2Model,
)
from vllm.model_executor.models.utils import PPMissingLayer, extract_layer_index, maybe_prefix

from ..methods.base import method_class
from ..paged.adapters import adapter_for
from ..paged.backend import first_ranks, head_ranks
from ..step import Runtime
from .hidden_attention import HiddenAttention
from .sparse_mlp import SparseMLP
from .token_mapping import TokenMapping, has_lora


class SparseDecoderLayer(Qwen2DecoderLayer):
    """A Qwen2 layer whose attention and FFN follow the step's plan."""

    def __init__(
        self,
        config,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config, cache_config, quant_config, prefix)
        self.layer_index = extract_layer_index(prefix)
        method = method_class(get_current_vllm_config().model_config.hf_config)
        self.wants_hidden = method.wants_hidden
        attention = HiddenAttention if method.wants_hidden else Attention
        _use_adapter(self.self_attn, attention, cache_config, quant_config)
        modules = method.attention_modules(config, quant_config, f"{prefix}.self_attn")
        for name, module in modules.items():
            self.self_attn.add_module(name, module)
        self.self_attn.attn.adaspark_modules = modules
        self.mlp: Qwen2MLP = SparseMLP(
            hidden_size=self.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            quant_config=quant_config,
            prefix=f"{prefix}.mlp",
        )

    def share(self, runtime: Runtime) -> None:
        """Let attention and FFN see the model's runtime."""
        self.adaspark = runtime
        for module in (self.self_attn.attn, self.mlp):
            module.adaspark = runtime
            module.adaspark_layer = self.layer_index

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # As stock, but the FFN also sees the residual stream before its norm, and tokens may be
        # dropped on the way out.
        positions = self.adaspark.positions(positions)
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self._attend(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        hidden_states = self.mlp(hidden_states, residual)
        return self.adaspark.after_layer(self.layer_index, hidden_states, residual)

    def _attend(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        attention = self.self_attn
        if not self.wants_hidden:
            return attention(positions=positions, hidden_states=hidden_states)
        # As Qwen2Attention.forward, which has no way to hand on what it gets.
        qkv, _ = attention.qkv_proj(hidden_states)
        q, k, v = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        q, k = attention.rotary_emb(positions, q, k)
        output, _ = attention.o_proj(attention.attn(q, k, v, hidden_states))
        return output


def _use_adapter(
    attention: Qwen2Attention,
    layer_type: type[Attention],
    cache_config: CacheConfig | None,
    quant_config: QuantizationConfig | None,
) -> None:
    """Give the layer our adapter over the backend that vLLM itself chose for it.

    Qwen2Attention takes no backend, so its Attention is made again, under the same name.
    """
    stock: Attention = attention.attn
    del get_current_vllm_config().compilation_config.static_forward_context[stock.layer_name]
    attention.attn = layer_type(
        stock.num_heads,
        stock.head_size,
        attention.scaling,
        num_kv_heads=stock.num_kv_heads,
        cache_config=cache_config,
        quant_config=quant_config,
        prefix=stock.layer_name,
        attn_backend=adapter_for(stock.attn_backend),
    )


class AdaSparkQwen2ForCausalLM(Qwen2ForCausalLM):
    """Stock Qwen2ForCausalLM, built with :class:`SparseDecoderLayer`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        # As the stock constructor, which has no parameter for the layer type.
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config.get_text_config()
        self.config = config
        self.quant_config = vllm_config.quant_config
        self.model = Qwen2Model(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "model"),
            decoder_layer_type=SparseDecoderLayer,
        )
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=self.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def share(self, runtime: Runtime) -> None:
        """Hand the runtime to this rank's layers, and the other ranks to the runtime."""
        runtime.head_ranks = head_ranks(self.config.num_key_value_heads)
        runtime.method.agree = first_ranks
        weight = next(self.model.parameters())
        runtime.method.load(weight.device, weight.dtype)
        for layer in self._my_layers():
            layer.share(runtime)

    def method_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The method's own modules in this rank's layers, by their name in this model."""
        for layer in self._my_layers():
            for name, module in layer.self_attn.attn.adaspark_modules.items():
                yield f"model.layers.{layer.layer_index}.self_attn.{name}", module

    def take_lora(self) -> TokenMapping | None:
        """Once vLLM has put its LoRA layers into the model: call them, and say who maps them."""
        for layer in self._my_layers():
            attention = layer.self_attn
            names = attention.attn.adaspark_modules
            attention.attn.adaspark_modules = {name: getattr(attention, name) for name in names}
            layer.mlp.takes_lora = any(map(has_lora, layer.mlp.children()))
        return TokenMapping.of_model(self)

    def _my_layers(self) -> Iterable[SparseDecoderLayer]:
        return self.model.layers[self.model.start_layer : self.model.end_layer]
