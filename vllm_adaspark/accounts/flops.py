"""FLOPs of a layer by the model's sizes, and what a prompt is forecast to spend.

A multiply-add is two FLOPs.  Counted are the matrix products of the language model's layers: QKV
and output projections, attention (QK and PV), cube scores ("selection") and FFN, each as often as
it is computed.  Not counted, in sparse and dense alike: vision tower, norms, RoPE, LM head, sums
and sorts, what a kernel computes of a tile only to mask it, and the K and V projections that
tensor-parallel ranks repeat where they share a KV head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..kernels import score_products
from ..paged.state import KEY_SUMMARIES


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one layer of the language model, over all tensor-parallel ranks.

    ``score_products`` belongs to the method and the machine, not to the model: how many products
    the score of a (query token, cube) pair takes there, see ``kernels.score_products``.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    score_products: int = 1

    @classmethod
    def of(cls, text_config: Any, device_type: str = "cpu", summary: str = "sums") -> ModelShape:
        """Sizes of a layer, from a checkpoint's text config; ``device_type`` as PyTorch's,
        ``summary`` as ``Settings.key_summary``."""
        heads = text_config.num_attention_heads
        head_size = text_config.hidden_size // heads
        return cls(
            hidden=text_config.hidden_size,
            heads=heads,
            kv_heads=text_config.num_key_value_heads,
            head_size=head_size,
            intermediate=text_config.intermediate_size,
        ).scored(device_type, summary)

    def scored(self, device_type: str, summary: str) -> ModelShape:
        """The same where scores are computed on such a device, of such a ``summary``."""
        vectors = KEY_SUMMARIES[summary].number
        products = score_products(device_type, self.head_size, vectors)
        return replace(self, score_products=products)

    @property
    def qkvo_flops_per_token(self) -> int:
        """QKV and output projections of one layer."""
        qkv = self.hidden * (self.heads + 2 * self.kv_heads) * self.head_size
        return 2 * (qkv + self.heads * self.head_size * self.hidden)

    @property
    def attention_flops_per_pair(self) -> int:
        """QK and PV of one (query token, key token) pair in one layer, all heads."""
        return 4 * self.heads * self.head_size

    @property
    def score_flops_per_pair(self) -> int:
        """The score of one (query token, cube) pair in one layer, all heads."""
        return 2 * self.heads * self.head_size * self.score_products

    @property
    def ffn_flops_per_token(self) -> int:
        """Gate, up and down projections of one layer."""
        return 6 * self.hidden * self.intermediate

    def layer_flops(self, tokens: Any, *, causal: bool = True) -> Any:
        """FLOPs of one layer's matrix products for a prompt that runs densely.

        Args:
            tokens: of the prompt; a number or an array of them.
            causal: count each query with the keys up to its own; else with all keys, as papers do.
        """
        pairs = tokens * (tokens + 1) / 2 if causal else tokens * tokens
        per_token = self.qkvo_flops_per_token + self.ffn_flops_per_token
        return tokens * per_token + pairs * self.attention_flops_per_pair


@dataclass(frozen=True)
class Forecast:
    """FLOPs of a prompt in all layers, told before it runs: see ``Settings.forecast``.

    Attributes:
        dense: of the whole prompt, with the tokens that are dropped before the language model.
        spent: under the settings; None where nobody can tell.
        least: the smallest FLOPs budget that can be met, as a share of ``dense``; None where the
            settings take no budget.
        by_part: ``spent``, by the names that accounts have; None where it is not told apart.
        note: what to know of ``spent``, to be read after it; empty for one that is exact.
    """

    dense: float
    spent: float | None = None
    least: float | None = None
    by_part: dict[str, float] | None = None
    note: str = ""

    def of_budget(self, flops: float) -> str:
        """The note of a budget."""
        if flops < self.least:
            return f"; flops={flops} cannot be met, the least is {self.least:.2f}"
        return ", by its budget"
