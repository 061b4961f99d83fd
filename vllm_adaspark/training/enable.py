"""Puts the served semantics into a Qwen2.5-VL model of transformers, and takes them out again.

Three places of the model change, on this instance alone, and no class:

* before the whole model runs, its prompts are read (prompt.py);
* the language model's forward packs them into one step, runs its layers on it and unpacks what
  comes out (packing.py), so hidden states, logits and labels stay in the order of ``input_ids``;
* a decoder layer's forward runs its FFN through ffn.py; its attention comes from transformers'
  AttentionInterface, under the name ``"adaspark"``.

The step travels from the second to the third as a keyword argument, so that gradient checkpointing
computes a layer again with the step it belongs to.
"""

from __future__ import annotations

import dataclasses
from types import MethodType
from typing import Any

from torch import nn
from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration

from ..methods.adaspark.settings import AdaSparkConfig
from ..settings import CHECKPOINT_KEY, SettingsError, check_cube_volume
from .attention import NAME, adaspark_attention
from .ffn import sparse_mlp
from .packing import pack
from .prompt import read_prompts

AttentionInterface.register(NAME, adaspark_attention)


def enable_sparse_training(
    model: Qwen2_5_VLForConditionalGeneration, config: AdaSparkConfig | None = None
) -> Qwen2_5_VLForConditionalGeneration:
    """Make ``model`` compute what the plugin serves under ``config``, differentiably.

    From then on every forward pass does, in training and evaluation mode; call it again for other
    settings.  The settings go into ``model.config``, so a saved checkpoint is served with them.

    A forward pass takes what the processor gives, and the stock arguments.  Positions are vLLM's
    unless ``position_ids [3, batch, n]`` are given.  Videos are cut into cubes as if every sequence
    were prefilled in one chunk.  Sequences that begin alike are computed once as far as they do:
    put several questions about one video next to each other.  Under a budget (``flops``), the
    answer's tokens count as prompt.

    Args:
        model: any Qwen2.5-VL; weights and names do not change.
        config: None for that in the model's own ``config.json``.

    Returns:
        ``model``.

    Raises:
        TypeError: another kind of model or of config.
        SettingsError: settings that cannot be trained with.
    """
    if not isinstance(model, Qwen2_5_VLForConditionalGeneration):
        raise TypeError(
            f"model is a {type(model).__name__}: expected Qwen2_5_VLForConditionalGeneration; if "
            "it is wrapped (PEFT, DDP), pass the model inside"
        )
    if config is None:
        settings = getattr(model.config, CHECKPOINT_KEY, None)
        if settings is None:
            raise SettingsError(
                f"config=None, and the model's config.json has no {CHECKPOINT_KEY}: pass an "
                "AdaSparkConfig"
            )
        config = AdaSparkConfig.settled(settings, None)
    _check(model, config)

    disable_sparse_training(model)
    text = model.model.language_model
    text.adaspark_instead_of = text.config._attn_implementation
    model.set_attn_implementation({"text_config": NAME})
    model.model.adaspark_reading = model.model.register_forward_pre_hook(
        _read_prompts, with_kwargs=True
    )
    text.adaspark_config, text.adaspark_prompts = config, None
    text.forward = MethodType(_text_forward, text)
    for layer in text.layers:
        layer.forward = MethodType(_layer_forward, layer)
    setattr(model.config, CHECKPOINT_KEY, checkpoint_settings(config))
    return model


def disable_sparse_training(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Make ``model`` the stock model again, if it is not; its weights stay as they are."""
    text = model.model.language_model
    if not hasattr(text, "adaspark_config"):
        return
    model.model.adaspark_reading.remove()
    model.set_attn_implementation({"text_config": text.adaspark_instead_of})
    del model.model.adaspark_reading
    del text.adaspark_config, text.adaspark_prompts, text.adaspark_instead_of
    for module in (text, *text.layers):
        del module.forward
    delattr(model.config, CHECKPOINT_KEY)


def checkpoint_settings(config: AdaSparkConfig) -> dict[str, Any]:
    """What a checkpoint says of ``config``: how it was trained, nothing of a server's business."""
    may = {spec.name for spec in dataclasses.fields(config) if spec.metadata["checkpoint"]}
    kept = may - {"enabled"}  # training is never dense
    return {key: value for key, value in config.to_dict().items() if key in kept}


def _check(model: Qwen2_5_VLForConditionalGeneration, config: AdaSparkConfig) -> None:
    if not isinstance(config, AdaSparkConfig):
        raise TypeError(
            f"config={config!r}: expected an AdaSparkConfig, e.g. AdaSparkConfig(p_attn=0.5)"
        )
    if not config.enabled:
        raise SettingsError(
            "enabled=False: there is nothing sparse to train; leave it out, or call "
            "disable_sparse_training"
        )
    if config.prune:
        raise SettingsError(
            f"prune={config.prune}: training keeps all tokens of a video; leave it out"
        )
    check_cube_volume(config)
    if any(kind != "full_attention" for kind in model.config.text_config.layer_types):
        raise SettingsError(
            "use_sliding_window in the model's config is not supported; set it to false"
        )


def _read_prompts(model: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """Before Qwen2_5_VLModel's forward: only there are token ids and grids known."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        raise ValueError("input_ids=None: sparse training finds videos by their placeholder tokens")
    if kwargs.get("past_key_values") is not None:
        raise ValueError(
            "past_key_values: a sparse training pass has no KV cache; to generate, serve the "
            "checkpoint, or call disable_sparse_training"
        )
    text = model.language_model
    text.adaspark_prompts = read_prompts(
        ids,
        kwargs.get("attention_mask"),
        kwargs.get("position_ids"),
        kwargs.get("image_grid_thw"),
        kwargs.get("video_grid_thw"),
        kwargs.get("second_per_grid_ts"),
        model.config,
        text.adaspark_config,
    )
    # The prompts have positions; with any given, the stock model works out none of its own.
    return args, kwargs | {"position_ids": ids}


def _text_forward(self: nn.Module, inputs_embeds: Any, **kwargs: Any):
    """Qwen2_5_VLTextModel's forward, its layers run on a packed step."""
    prompts, self.adaspark_prompts = self.adaspark_prompts, None
    if prompts is None:
        raise RuntimeError("call the whole model: the language model alone knows no videos")
    step = pack(inputs_embeds, prompts, self.config, self.adaspark_config)
    packed = {
        "inputs_embeds": step.pack(inputs_embeds),
        "position_ids": step.positions,
        "attention_mask": None,
        "use_cache": False,
        "adaspark": step,
    }
    outputs = type(self).forward(self, **kwargs | packed)
    outputs.last_hidden_state = step.unpack(outputs.last_hidden_state)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(map(step.unpack, outputs.hidden_states))
    return outputs


def _layer_forward(self: nn.Module, hidden_states: Any, adaspark: Any = None, **kwargs: Any):
    """Qwen2_5_VLDecoderLayer's forward, its FFN run on the tokens that matter."""
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    hidden_states, _ = self.self_attn(hidden_states=hidden_states, adaspark=adaspark, **kwargs)
    hidden_states = residual + hidden_states

    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)
    layer = self.self_attn.layer_idx
    branch = sparse_mlp(hidden_states[0], residual[0], self.mlp, adaspark, layer)
    return residual + branch[None]
