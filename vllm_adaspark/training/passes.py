"""How a method's forward pass gets into a Qwen2.5-VL model of transformers, and out of it again.

Three places of the model change, on this instance alone, and no class:

* before the whole model runs, its prompts are read (prompt.py);
* the language model's forward packs them into one step, runs its layers on it and unpacks what
  comes out (packing.py), so hidden states, logits and labels stay in the order of ``input_ids``;
* a decoder layer's forward is the method's; its attention comes from transformers'
  AttentionInterface, under the method's name.

The step travels from the second to the third as the keyword argument ``step``, so that gradient
checkpointing computes a layer again with the step it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from ..settings import Settings, SettingsError
from .packing import Step, pack
from .prompt import Prompt, read_prompts


@dataclass(frozen=True)
class SparsePass:
    """What a method puts into a model.

    Attributes:
        attention: the name of its attention in transformers' AttentionInterface.
        settings: of the method: the order of a video's tokens.
        block_size: tokens of a KV block.
        plan: makes what the step's layers share, ``(step, prompts)`` to ``step.plan``.
        layer: the forward of a decoder layer, which gets the step as ``step``.
    """

    attention: str
    settings: Settings
    block_size: int
    plan: Callable[[Step, list[Prompt]], Any]
    layer: Callable[..., Any]


def put_in(model: nn.Module, sparse: SparsePass) -> None:
    """Make a Qwen2.5-VL compute ``sparse`` from now on, instead of what it computed before.

    Raises:
        SettingsError: its own layers use a sliding window.
    """
    if any(kind != "full_attention" for kind in model.config.text_config.layer_types):
        raise SettingsError(
            "use_sliding_window in the model's config is not supported; set it to false"
        )
    take_out(model)
    text = model.model.language_model
    text.sparse_instead_of = text.config._attn_implementation
    model.set_attn_implementation({"text_config": sparse.attention})
    model.model.sparse_reading = model.model.register_forward_pre_hook(
        _read_prompts, with_kwargs=True
    )
    text.sparse_pass, text.sparse_prompts = sparse, None
    text.forward = MethodType(_text_forward, text)
    for layer in text.layers:
        layer.forward = MethodType(sparse.layer, layer)


def take_out(model: nn.Module) -> bool:
    """Make the forward pass the stock model's again; False if it is."""
    text = model.model.language_model
    if not hasattr(text, "sparse_pass"):
        return False
    model.model.sparse_reading.remove()
    model.set_attn_implementation({"text_config": text.sparse_instead_of})
    del model.model.sparse_reading
    del text.sparse_pass, text.sparse_prompts, text.sparse_instead_of
    for module in (text, *text.layers):
        del module.forward
    return True


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
    text.sparse_prompts = read_prompts(
        ids,
        kwargs.get("attention_mask"),
        kwargs.get("position_ids"),
        kwargs.get("image_grid_thw"),
        kwargs.get("video_grid_thw"),
        kwargs.get("second_per_grid_ts"),
        model.config,
        text.sparse_pass.settings,
    )
    # The prompts have positions; with any given, the stock model works out none of its own.
    return args, kwargs | {"position_ids": ids}


def _text_forward(self: nn.Module, inputs_embeds: Any, **kwargs: Any):
    """Qwen2_5_VLTextModel's forward, its layers run on a packed step."""
    prompts, self.sparse_prompts = self.sparse_prompts, None
    if prompts is None:
        raise RuntimeError("call the whole model: the language model alone knows no videos")
    sparse = self.sparse_pass
    tile = sparse.settings.tile_tokens
    step = pack(inputs_embeds, prompts, sparse.block_size, tile)
    step.plan = sparse.plan(step, prompts)
    packed = {
        "inputs_embeds": step.pack(inputs_embeds),
        "position_ids": step.positions,
        "attention_mask": None,
        "use_cache": False,
        "step": step,
    }
    outputs = type(self).forward(self, **kwargs | packed)
    outputs.last_hidden_state = step.unpack(outputs.last_hidden_state)
    if outputs.hidden_states is not None:
        outputs.hidden_states = tuple(map(step.unpack, outputs.hidden_states))
    return outputs
