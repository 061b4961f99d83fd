"""Quantized copies of a small checkpoint, in the formats that users download.

Every linear layer of the language model but VideoNSA's gates is rounded to int4, int8 or fp8 and
written as the format has it.  Beside it :func:`build` writes the same rounded weights in float32
under the usual names, from which a twin can be made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP = 32  # weights that share a scale in the int4 formats
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, torch.Tensor]


def build(checkpoint: Path, path: Path, kind: str) -> tuple[Path, Path]:
    """Quantize ``checkpoint``; its ``intermediate_size`` must be a multiple of 32.

    Args:
        checkpoint: of examples/demo/checkpoint.py, float32.
        path: folder to write two checkpoints into.
        kind: one of ``KINDS``.

    Returns:
        The quantized checkpoint, and the rounded weights as a float32 one.
    """
    quantize, config = KINDS[kind]
    rounded, written = path / "rounded", path / kind
    weights = load_file(checkpoint / "model.safetensors")
    plain, packed = dict(weights), dict(weights)
    for name, weight in weights.items():
        if name.endswith("_proj.weight") and "visual" not in name:
            del packed[name]
            parts, plain[name] = quantize(weight)
            prefix = name.removesuffix("weight")
            packed |= {prefix + part: value.contiguous() for part, value in parts.items()}
    for folder, tensors in ((rounded, plain), (written, packed)):
        shutil.copytree(checkpoint, folder)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    described = json.loads((written / "config.json").read_text())
    described["quantization_config"] = config | (
        {"ignored_layers": _linear_layers(packed)} if kind == "fp8" else {}
    )
    (written / "config.json").write_text(json.dumps(described))
    return written, rounded


def _linear_layers(packed: Tensors) -> list[str]:
    """Those whose weights are what they were: fp8 wants each by its name."""
    return [
        name.removesuffix(".weight")
        for name, weight in packed.items()
        if weight.dim() == 2 and weight.dtype == torch.float32
    ]


def _int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(0..15 ``[out, in]``, scales ``[out, in / GROUP]``, rounded weights); 8 stands for zero."""
    grouped = weight.unflatten(1, (-1, GROUP))
    # Scales that bfloat16 holds exactly: some formats run in nothing else.
    scale = (grouped.abs().amax(-1) / 7).clamp(min=1e-6).bfloat16().float()
    number = (grouped / scale[..., None]).round().clamp(-8, 7)
    return (number + 8).int().flatten(1), scale, (number * scale[..., None]).flatten(1)


def _pack(number: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight numbers of four bits along ``dim`` as one int32, the first of ``order`` lowest."""
    eights = number.long().unflatten(dim, (-1, 8)).movedim(dim + 1, -1)
    word = sum(eights[..., place] << (4 * nth) for nth, place in enumerate(order))
    return torch.where(word >= 1 << 31, word - (1 << 32), word).int()


def _compressed_int4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    number, scale, rounded = _int4(weight)
    shape = torch.tensor(weight.shape)
    packed = {"weight_packed": _pack(number, 1), "weight_scale": scale, "weight_shape": shape}
    return packed, rounded


def _awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    number, scale, rounded = _int4(weight)
    zeros = torch.full_like(scale.T, 8)
    packed = {
        "qweight": _pack(number.T, 1, AWQ_ORDER),
        "qzeros": _pack(zeros, 1, AWQ_ORDER),
        "scales": scale.T.half(),
    }
    return packed, rounded


def _gptq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    number, scale, rounded = _int4(weight)
    packed = {
        "qweight": _pack(number.T, 0),
        "qzeros": _pack(torch.full_like(scale.T, 7), 1),  # one less, as the format has it
        "scales": scale.T.half(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return packed, rounded


def _compressed_int8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    number = (weight / scale).round()
    return {"weight": number.to(torch.int8), "weight_scale": scale}, number * scale


def _fp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    # The same for all: vLLM gives the parts of a fused layer one scale, and rounds anew for it.
    scale = torch.tensor(2.0**-6)
    assert weight.abs().amax() < scale * torch.finfo(torch.float8_e4m3fn).max
    number = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": number, "weight_scale": scale}, number.float() * scale


def _compressed(packing: str, weights: dict, inputs: dict | None) -> dict:
    number = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": number | weights, "input_activations": None}
    if inputs is not None:
        group["input_activations"] = number | inputs
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "quantization_status": "compressed",
        "ignore": ["re:.*visual.*", "re:.*g_proj.*", "lm_head"],
        "config_groups": {"group_0": group},
    }


KINDS: dict[str, tuple[Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]], dict]] = {
    "compressed-tensors int4": (
        _compressed_int4,
        _compressed("pack-quantized", {"strategy": "group", "group_size": GROUP}, None),
    ),
    "compressed-tensors int8": (
        _compressed_int8,
        _compressed(
            "int-quantized",
            {"num_bits": 8, "strategy": "channel"},
            {"num_bits": 8, "strategy": "token", "dynamic": True},
        ),
    ),
    "AWQ": (
        _awq,
        {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "modules_to_not_convert": ["visual", "g_proj"],
        },
    ),
    "GPTQ": (
        _gptq,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "sym": True,
            "desc_act": False,
            "dynamic": {"-:.*visual.*": {}, "-:.*g_proj.*": {}},
        },
    ),
    "fp8": (
        _fp8,
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
        },
    ),
}
