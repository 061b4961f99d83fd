"""A tiny LLaVA-OneVision with random weights, made offline in a second.

Its frames are 126 pixels wide: 9 x 9 patches, pooled to 5 x 5 tokens, an odd number as the real
model's 27 x 27, pooled to 14 x 14, is.  ``image_size=384`` makes those.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import checkpoint as demo  # examples/demo
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

VIDEO, IMAGE = "<video>", "<image>"
TEMPLATE = demo.CHAT_TEMPLATE.replace("<|vision_start|><|video_pad|><|vision_end|>", VIDEO).replace(
    "<|vision_start|><|image_pad|><|vision_end|>", IMAGE
)
PATCH = 14
TOWER = "vision_tower."


def build(path: str | Path, *, image_size: int = 126, layers: int = 4, seed: int = 3) -> Path:
    """Write a float32 checkpoint to the folder ``path``; returns it."""
    path = Path(path)
    hidden, vocab = 256, 448
    tokenizer = demo._tokenizer(vocab - 2)
    tokenizer.add_special_tokens({"additional_special_tokens": [VIDEO, IMAGE]})
    tokenizer.chat_template = TEMPLATE
    video, image = tokenizer.convert_tokens_to_ids([VIDEO, IMAGE])
    sizes = [[image_size, image_size], [image_size, 2 * image_size], [2 * image_size, image_size]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=PATCH,
            vision_use_head=False,
        ).to_dict(),
        text_config=Qwen2Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=688,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=32768,
            rope_theta=1e6,
            initializer_range=1 / math.sqrt(hidden),
            use_sliding_window=False,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            tie_word_embeddings=False,
        ).to_dict(),
        image_token_index=image,
        video_token_index=video,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=sizes,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(config).float()
        _shape_weights(model, tokenizer)
    model.save_pretrained(path)
    _name_the_tower(path / "model.safetensors")
    size = {"height": image_size, "width": image_size}
    LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=sizes),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        tokenizer=tokenizer,
        num_image_tokens=(image_size // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    ).save_pretrained(path)
    generation = {"eos_token_id": tokenizer.eos_token_id}
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


@torch.no_grad()
def _shape_weights(model, tokenizer) -> None:
    """As the demo's checkpoint: sharper queries layer by layer, answers of plain letters."""
    layers = model.model.language_model.layers
    for index, layer in enumerate(layers):
        layer.self_attn.q_proj.weight *= demo.QUERY_GAIN ** (index / max(len(layers) - 1, 1))
    torch.nn.init.normal_(model.model.image_newline)
    for token in range(model.lm_head.out_features):
        text = tokenizer.decode([token], skip_special_tokens=True) if token < len(tokenizer) else ""
        if not (text.isascii() and text.isprintable() and text):
            model.lm_head.weight[token] = 0


def _name_the_tower(file: Path) -> None:
    """transformers 5 saves the tower without ``vision_model.``, which vLLM and all hubs have."""
    weights = {}
    for name, weight in load_file(file).items():
        if TOWER in name and "vision_model." not in name:
            name = name.replace(TOWER, TOWER + "vision_model.")
        weights[name] = weight
    save_file(weights, file, metadata={"format": "pt"})
