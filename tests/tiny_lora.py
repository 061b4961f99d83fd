"""A small LoRA adapter for a small checkpoint, and the checkpoint with the adapter merged in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 4, 8
PREFIX = "base_model.model."  # peft's


def build(checkpoint: Path, path: Path, *, seed: int) -> Path:
    """Write an adapter of all linear layers of the checkpoint's language model to ``path``."""
    random = torch.Generator().manual_seed(seed)
    tensors, targets = {}, set()
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        if "visual" in name or "_proj" not in name or weight.ndim != 2:
            continue
        rows, columns = weight.shape
        module = name.removesuffix(".weight")
        targets.add(module.rpartition(".")[2])
        down = torch.randn(RANK, columns, generator=random) / columns**0.5
        up = 0.1 * torch.randn(rows, RANK, generator=random)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = down
        tensors[f"{PREFIX}{module}.lora_B.weight"] = up
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "target_modules": sorted(targets),
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def merge(checkpoint: Path, adapter: Path, path: Path) -> Path:
    """Write the checkpoint with the adapter added to its weights to ``path``."""
    shutil.copytree(checkpoint, path)
    weights = load_file(path / "model.safetensors")
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in tensors:
        module, is_down, _ = name.partition(".lora_A.weight")
        if is_down:
            product = tensors[f"{module}.lora_B.weight"] @ tensors[name]
            weights[f"{module.removeprefix(PREFIX)}.weight"] += ALPHA / RANK * product
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path
