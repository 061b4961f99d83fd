"""AdaS-FFN in the model: an MLP whose tokens in cubes may skip it (token_ffn.py says which).

Only cubes that lie wholly in a step take part; a cube cut by a chunk edge, and all text, run dense.
The choice depends on the data, so it is one opaque custom op: torch.compile and piecewise CUDA
graphs split there.
"""

from __future__ import annotations

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
from ..methods.adaspark.ffn import active_tokens, sparse_ffn
from ..step import Runtime

OP_NAME = "vllm::adaspark_ffn"


class SparseMLP(Qwen2MLP):
    """Qwen2's FFN, weights unchanged, run on the tokens that matter.

    ``adaspark`` (the model's Runtime) and ``adaspark_layer`` are set by the model.
    """

    adaspark: Runtime
    adaspark_layer: int

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
        return torch.ops.vllm.adaspark_ffn(x, residual, _encode_layer_name(self.layer_name))

    def run(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """What the op does: dense, unless this step has cubes to be sparse in."""
        step = self.adaspark.plan
        plan = step.ffn if step is not None else None
        if plan is None or self.adaspark_layer < plan.dense_layers_range[0]:
            return super().forward(x)
        active = active_tokens(x, residual, plan, self.adaspark_layer)
        if get_tensor_model_parallel_world_size() > 1:
            # All ranks must gather the same tokens.  They see the same residual, but a rounding
            # difference in an all-reduce must not be able to hang the next one.
            active = get_tp_group().broadcast(active.to(torch.uint8), src=0).bool()
        step.ffn_active[self.adaspark_layer] = active.sum(1)
        if step.trace is not None:
            step.trace.tokens(self.adaspark_layer, active)
        if self._on_device(x):
            from ..kernels import ffn

            weights = self.gate_up_proj.weight, self.down_proj.weight
            reduce = tensor_model_parallel_all_reduce if self.down_proj.tp_size > 1 else None
            return ffn.sparse_swiglu(x.contiguous(), *weights, active, plan, reduce)
        return sparse_ffn(x, super().forward, active, plan)

    def _on_device(self, x: torch.Tensor) -> bool:
        """Whether the FFN can run without the host knowing how many tokens are active."""
        layers = self.gate_up_proj, self.down_proj
        if not use_triton(x) or not all(
            isinstance(layer.quant_method, UnquantizedLinearMethod) for layer in layers
        ):
            return False
        from ..kernels import ffn

        return ffn.waits_for_nothing(x, *(layer.weight for layer in layers))


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
