"""The needle model: a 3.6 M parameter Qwen2.5-VL with its tokenizer, processor and chat template.

The shape differs from the demo's random checkpoint where training asks for it: the vision tower
attends to the whole frame in every layer, and half of the rotary dimensions are the time's, down to
slow ones, so that "the last one before me" can be told over thousands of positions.
"""

import json
from pathlib import Path

import torch
from cards import COLOUR_NAMES
from scenes import every_question_text
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
MERGED_PATCH = 28  # side of the square one video token stands for, in pixels
VOCABULARY = 384


def build(
    seed: int = 0,
    layers: int = 4,
    texts: list[str] | None = None,
    window: int = 448,
    whole_frame: tuple[int, ...] = (2,),
    interleaved: bool = False,
) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained model, float32.

    Args:
        texts: what the tokenizer must know; None for the questions of `scenes.py`.
        window: side of the vision tower's windows in pixels; by default wider than the frames.
        whole_frame: layers of the tower that attend to the whole frame.
        interleaved: deal the rotary frequencies out to time, height and width in turn. vLLM does
            what the config says; Hugging Face's Qwen2.5-VL does not know the key. By default the
            width has the slowest frequencies, at which eight columns are one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = _config(tokenizer(texts), layers)
        config.vision_config.window_size = window
        config.vision_config.fullatt_block_indexes = list(whole_frame)
        if interleaved:
            config.text_config.rope_parameters["mrope_interleaved"] = True
        model = Qwen2_5_VLForConditionalGeneration(config)
        for name, weight in model.model.language_model.named_parameters():
            # Larger than the usual 0.02, which keeps the activations' scale only in large models.
            if "proj.weight" in name:
                torch.nn.init.normal_(weight, std=0.7 * weight.shape[1] ** -0.5)
            elif "embed_tokens" in name:
                torch.nn.init.normal_(weight, std=0.5)
    return model


def grow(model: Qwen2_5_VLForConditionalGeneration, layers: int):
    """The model with more layers, which at first add nothing to what the others say."""
    grown = build(layers=layers)
    first = model.config.text_config.num_hidden_layers
    missing, unknown = grown.load_state_dict(model.state_dict(), strict=False)
    assert not unknown and all(f"layers.{first - 1}." not in name for name in missing)
    for layer in grown.model.language_model.layers[first:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return grown


def layers_of(weights: dict[str, torch.Tensor]) -> int:
    """How many layers the language model of a state dict has."""
    numbers = [name.split("layers.")[1].split(".")[0] for name in weights if "layers." in name]
    return 1 + max(int(number) for number in numbers)


def tokenizer(texts: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE to which every word of a question and every answer is one token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["system", "user", "assistant"]
    texts = every_question_text() if texts is None else texts
    made.train_from_iterator((texts + list(COLOUR_NAMES) + roles) * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def save(
    model: Qwen2_5_VLForConditionalGeneration, path: str | Path, texts: list[str] | None = None
) -> Path:
    """Write the model in bf16 with all that a server reads, in the usual layout."""
    path, words = Path(path), tokenizer(texts)
    model.to(torch.bfloat16).save_pretrained(path)
    (path / "model.safetensors").chmod(0o644)  # as the other files; it is written private
    # A frame has at least 2×2 and at most 256 tokens; small frames stay as they are.
    size = {"shortest_edge": 4 * MERGED_PATCH**2, "longest_edge": 256 * MERGED_PATCH**2}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        video_processor=Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False),
        tokenizer=words,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)
    generation = {"do_sample": False, "eos_token_id": words.eos_token_id}
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return path


def _config(words: PreTrainedTokenizerFast, layers: int) -> Qwen2_5_VLConfig:
    token_id = words.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [8, 4, 4],  # time, height, width
                "rope_theta": 1e6,
            },
            "bos_token_id": None,
            "eos_token_id": words.eos_token_id,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "num_heads": 4,
            "intermediate_size": 256,
            "out_hidden_size": 256,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
    )
