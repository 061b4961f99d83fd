"""Write a small Qwen2.5-VL checkpoint with random weights: loadable, made offline in seconds.

It stands in for the real model wherever its answers do not matter: in the demo, in tests and in
benchmarks. Everything a server reads is there: weights, configuration, a tokenizer trained on the
spot, image and video processors, and a chat template for OpenAI-style messages.

    python examples/demo/checkpoint.py .demo/checkpoint --layers 4

Random weights would attend almost evenly, and a selection by probability mass would look the same
in every layer. So later layers get sharper queries (`QUERY_GAIN`), as trained models have them.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CORPUS = [
    "You are a helpful assistant. system user assistant",
    "What happens in the video? Describe the video. Which number is shown on the card?",
    "The answer is 0123456789. A red, green, blue, yellow circle moves to the left and the right.",
]
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('video', 'video_url') -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif part['type'] in ('image', 'image_url') -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

MERGED_PATCH = 28  # side of the square one video token stands for, in pixels: 14 × merge size 2
QUERY_GAIN = 8.0  # of the last layer's queries over the first layer's


def build(
    path: str | Path,
    *,
    seed: int = 0,
    layers: int = 4,
    dtype: str = "bfloat16",
    hidden: int = 256,
    heads: int = 8,
    kv_heads: int = 2,
    intermediate: int = 688,
    vocab: int = 448,
    vision_layers: int = 4,
) -> Path:
    """Write a checkpoint to the folder `path`; the same arguments give the same weights.

    Args:
        path: folder to write, made if need be.
        seed: of the weights.
        layers, hidden, heads, kv_heads, intermediate: the language model's shape. The head size
            `hidden / heads` must be a multiple of 16 (32, 64 and 128 are what kernels have).
        dtype: of the weights, "bfloat16" or "float32".
        vocab: entries of the embedding; at least the tokenizer's.
        vision_layers: depth of the vision tower; its last layer attends to the whole frame.

    Returns:
        `path`.

    Raises:
        ValueError: a shape that does not fit together.
    """
    path = Path(path)
    if hidden % heads or (hidden // heads) % 16 or heads % kv_heads:
        raise ValueError(
            f"hidden={hidden}, heads={heads}, kv_heads={kv_heads}: the head size hidden / heads "
            "must be a multiple of 16, and heads a multiple of kv_heads"
        )
    tokenizer = _tokenizer(vocab)
    config = _config(
        tokenizer,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        intermediate=intermediate,
        vocab=vocab,
        vision_layers=vision_layers,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    _shape_weights(model, tokenizer)
    model.to(getattr(torch, dtype)).save_pretrained(path)
    _processor(tokenizer).save_pretrained(path)
    # Greedy, so that an answer can be repeated; written as a plain file, as hubs ship it.
    generation = {"do_sample": True, "temperature": 1e-6, "eos_token_id": tokenizer.eos_token_id}
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return path


def _tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE like Qwen's, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 10, trainer)
    if tokenizer.get_vocab_size() > vocab:
        raise ValueError(f"vocab={vocab}: must be at least {tokenizer.get_vocab_size()}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def _processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLProcessor:
    """Processors that keep small frames small: at least 2×2 and at most 256 tokens a frame."""
    size = {"shortest_edge": 4 * MERGED_PATCH**2, "longest_edge": 256 * MERGED_PATCH**2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        video_processor=Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def _config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocab: int,
    vision_layers: int,
) -> Qwen2_5_VLConfig:
    # Qwen2.5-VL's split of the rotary half dimension into time, height and width is 16, 24, 24
    # for head size 128; other head sizes keep the proportion.
    sixteenth = hidden // heads // 16
    token_id = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2 * sixteenth, 3 * sixteenth, 3 * sixteenth],
                "rope_theta": 1e6,
            },
            # Keeps the activations' scale, which the usual 0.02 does only for large models.
            "initializer_range": 1 / math.sqrt(hidden),
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": 128,
            "num_heads": 4,
            "intermediate_size": 256,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [vision_layers - 1],
            "tokens_per_second": 2,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
    )


@torch.no_grad()
def _shape_weights(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Sharper queries layer by layer; answers of plain letters that never end by chance."""
    decoder = model.model.language_model.layers
    for index, layer in enumerate(decoder):
        layer.self_attn.q_proj.weight *= QUERY_GAIN ** (index / max(len(decoder) - 1, 1))
    # A row of zeros gives a logit of zero, which is never the largest of hundreds.
    for token in range(model.lm_head.out_features):
        text = tokenizer.decode([token], skip_special_tokens=True) if token < len(tokenizer) else ""
        if not (text.isascii() and text.isprintable() and text):
            model.lm_head.weight[token] = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    for name, default in (("layers", 4), ("hidden", 256), ("heads", 8), ("kv-heads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    print(build(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
