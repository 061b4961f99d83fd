"""The FFN in the model: a method may run it on some of the tokens.

Only cubes that lie wholly in a step take part; a cube cut by a chunk edge, and all text, run dense.
The choice depends on the data, so it is one opaque custom op: torch.compile and piecewise CUDA
graphs split there.  Eager engines call what the op does directly.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    get_tp_group,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.models.qwen2 import Qwen2MLP
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

from ..kernels import use_triton
from ..methods.base import FFNCall
from ..step import Runtime
from .token_mapping import has_lora

OP_NAME = "vllm::adaspark_ffn"


class SparseMLP(Qwen2MLP):
    """Qwen2's FFN, weights unchanged, run on the tokens that matter.

    ``adaspark`` (the model's Runtime), ``adaspark_layer``, and ``takes_lora``, whether adapters may
    run in it, are set by the model.
    """

    adaspark: Runtime
    adaspark_layer: int
    takes_lora = False

    def __init__(self, *args, prefix: str = "", **kwargs) -> None:
        super().__init__(*args, prefix=prefix, **kwargs)
        self.layer_name = prefix
        # The op finds this module by name, as vLLM's attention and MoE ops do.
        context = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"Duplicate layer name: {prefix}")
        context[prefix] = self

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """FFN output ``[tokens, hidden]`` of normed ``x``; ``residual`` is the stream before it."""
        if not torch.compiler.is_compiling():
            return self.run(x, residual)
        return torch.ops.vllm.adaspark_ffn(x, residual, _encode_layer_name(self.layer_name))

    def run(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """What the op does: dense, unless the method has something to leave out."""
        plan = self.adaspark.plan
        output = None
        if plan is not None and plan.ffn is not None:
            call = FFNCall(
                layer=self.adaspark_layer,
                x=x,
                residual=residual,
                dense=super().forward,
                agree=_agree,
                fused=self._fused if self._on_device(x) else None,
                mapped=self.adaspark.mapped if self.takes_lora else nullcontext,
            )
            output = self.adaspark.method.ffn(plan, call)
        return super().forward(x) if output is None else output

    def _fused(self, x: torch.Tensor, active: torch.Tensor, plan: Any) -> torch.Tensor:
        from ..kernels import ffn

        weights = [layer.weight for layer in self._stock_layers]
        reduce = tensor_model_parallel_all_reduce if self.down_proj.tp_size > 1 else None
        return ffn.sparse_swiglu(x.contiguous(), *weights, active, plan, reduce)

    def _on_device(self, x: torch.Tensor) -> bool:
        """Whether the FFN can run without the host knowing how many tokens are active."""
        if not use_triton(x) or (self.takes_lora and self.adaspark.runs_lora):
            return False
        layers = self._stock_layers
        if not all(isinstance(layer.quant_method, UnquantizedLinearMethod) for layer in layers):
            return False
        from ..kernels import ffn

        return ffn.waits_for_nothing(x, *(layer.weight for layer in layers))

    @property
    def _stock_layers(self) -> list[torch.nn.Module]:
        """The two projections, without what vLLM put around them for LoRA."""
        layers = self.gate_up_proj, self.down_proj
        return [layer.base_layer if has_lora(layer) else layer for layer in layers]


def _agree(active: torch.Tensor) -> torch.Tensor:
    """Tokens ``[cubes, block_size]`` (bool) that all ranks run.

    All must gather the same ones.  They see the same residual, but a rounding difference in an
    all-reduce must not be able to hang the next one.
    """
    if get_tensor_model_parallel_world_size() == 1:
        return active
    return get_tp_group().broadcast(active.to(torch.uint8), src=0).bool()


def _adaspark_ffn(
    x: torch.Tensor, residual: torch.Tensor, layer_name: LayerNameType
) -> torch.Tensor:
    layer = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    return layer.run(x, residual)


def _adaspark_ffn_fake(
    x: torch.Tensor, residual: torch.Tensor, layer_name: LayerNameType
) -> torch.Tensor:
    return torch.empty_like(x)


direct_register_custom_op(
    op_name=OP_NAME.removeprefix("vllm::"),
    op_func=_adaspark_ffn,
    mutates_args=[],
    fake_impl=_adaspark_ffn_fake,
)
