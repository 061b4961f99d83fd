"""A small VideoNSA checkpoint: the demo's Qwen2.5-VL with random gates, as the released one is."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoint as demo_checkpoint  # examples/demo
import torch
from safetensors.torch import load_file, save_file

from vllm_adaspark import VIDEONSA_ARCHITECTURE

BLOCK_COUNTS, WINDOW_SIZE = 3, 100  # small enough to leave something out of a short video


def build(path: str | Path, *, seed: int = 3, new_names: bool = False, **shape) -> Path:
    """Write a checkpoint to the folder ``path``.

    Args:
        path: the folder.
        seed: of all weights.
        new_names: weights called as in memory (``model.language_model.layers``, ``model.visual``),
            not as transformers writes them (``model.layers``, ``visual``).
        shape: of the language model, as examples/demo/checkpoint.py takes it.
    """
    path = demo_checkpoint.build(path, seed=seed, dtype="float32", **shape)
    file = path / "model.safetensors"
    weights = load_file(file)
    queries = {name for name in weights if name.endswith("self_attn.q_proj.weight")}
    random = torch.Generator().manual_seed(seed)
    config = json.loads((path / "config.json").read_text())
    text = config["text_config"]
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    for name in sorted(queries):
        attention = name.removesuffix("q_proj.weight")
        for gate, rows, spread in (("g_proj_1", hidden, 0.1), ("g_proj_2", 3 * heads, 0.05)):
            weights[f"{attention}{gate}.weight"] = spread * torch.randn(
                rows, hidden, generator=random
            )
            weights[f"{attention}{gate}.bias"] = 0.2 * torch.randn(rows, generator=random)
    if new_names:
        places = {"model": "model.language_model", "visual": "model.visual"}
        for name in list(weights):
            first, _, rest = name.partition(".")
            weights[f"{places.get(first, first)}.{rest}"] = weights.pop(name)
    save_file(weights, file, {"format": "pt"})
    config["architectures"] = [VIDEONSA_ARCHITECTURE]
    text |= {"block_counts": BLOCK_COUNTS, "window_size": WINDOW_SIZE}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return path
