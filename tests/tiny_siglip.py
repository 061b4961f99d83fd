"""A tiny SigLIP with random weights: vision tower, text tower, tokenizer and image processor."""

from __future__ import annotations

from pathlib import Path

import checkpoint as demo  # examples/demo
import torch
from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel


def build(path: str | Path, seed: int = 0) -> Path:
    """Write a float32 checkpoint to the folder ``path``; returns it."""
    path = Path(path)
    tokenizer = demo._tokenizer(448)
    common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    common["num_hidden_layers"] = 2
    config = SiglipConfig(
        text_config=common | {"vocab_size": 448, "max_position_embeddings": 16},
        vision_config=common | {"image_size": 56, "patch_size": 14},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SiglipModel(config)
        for weight in model.parameters():  # a new model's text tower says nearly the same of all
            weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    SiglipImageProcessor(size={"height": 56, "width": 56}).save_pretrained(path)
    return path
