"""VideoNSA in transformers: a Qwen2.5-VL with gates, whose forward pass is the one that is served.

The model is a class of its own, because its gates are weights: transformers fills a model from a
checkpoint once it is built, and drops what the model has no place for with no more than a report.
So the gates are there before, and a checkpoint that has none of them (a stock Qwen2.5-VL) gives
them a start; one that has some of them is refused.

How gates start matters.  The paper's are all 1/2, so that a model which knew dense attention has to
find its way back from a sum of three halves.  :func:`start_gates` leaves them near one branch each,
by default near the selected one, which is closest to dense attention.

Saved, it is a checkpoint of architecture ``VideoNSAForConditionalGeneration`` whose text config has
``block_counts`` and ``window_size``, as the released one (arXiv 2510.02295, ``Enxin/VideoNSA``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from ..methods.videonsa.gates import BRANCHES, TEMPERATURE, from_logits
from ..methods.videonsa.settings import BLOCK, OF_TEXT_CONFIG, VideoNSASettings
from ..settings import SettingsError
from .branches import NAME, NSAPlan, videonsa_attention
from .packing import Step
from .passes import SparsePass, put_in
from .prompt import Prompt

START = (0.05, 0.95, 0.05)  # of the gates, see start_gates
INITIAL = 0.02  # standard deviation of the gates' weights, as the released code has it

AttentionInterface.register(NAME, videonsa_attention)


class VideoNSAForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """A Qwen2.5-VL whose every forward pass is VideoNSA's, in paper mode, and can be trained.

    It takes what the processor gives; see :func:`~.enable.enable_sparse_training`, of which all
    that is said of positions, padding and shared beginnings holds here.  Videos stay in the stock
    order.  There is no KV cache: ``generate`` is refused.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text = config.text_config
        for name in OF_TEXT_CONFIG:  # the paper's where the config says nothing
            setattr(text, name, getattr(text, name, getattr(VideoNSASettings(), name)))
        for layer in self.model.language_model.layers:
            attention = layer.self_attn
            attention.g_proj_1 = nn.Linear(text.hidden_size, text.hidden_size)
            attention.g_proj_2 = nn.Linear(text.hidden_size, 3 * text.num_attention_heads)
        start_gates(self)
        put_in(self, SparsePass(NAME, VideoNSASettings(), BLOCK, self._plan, _layer_forward))

    @classmethod
    def from_pretrained(
        cls,
        pretrained: Any,
        *args: Any,
        block_counts: int | None = None,
        window_size: int | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ):
        """The model of a checkpoint, VideoNSA's or a stock Qwen2.5-VL's, whose gates then start.

        Args:
            pretrained: folder or hub name; all other arguments are transformers' own.
            block_counts: blocks of 64 tokens that a vision token selects, its own included; None
                for that of the checkpoint.
            window_size: tokens of the window branch; None for that of the checkpoint.

        Raises:
            SettingsError: gates of some layers only, or a number out of range.
        """
        model, told = super().from_pretrained(pretrained, *args, output_loading_info=True, **kwargs)
        missing = sorted(key for key in told["missing_keys"] if ".g_proj_" in key)
        gates = [name for name, _ in model.named_parameters() if ".g_proj_" in name]
        if missing and len(missing) < len(gates):
            raise SettingsError(
                f"{pretrained}: gate weights are missing: {', '.join(missing)}; a checkpoint has "
                "those of every layer, or none"
            )
        if missing:
            start_gates(model)
        for name, value in zip(OF_TEXT_CONFIG, (block_counts, window_size), strict=True):
            if value is not None:
                setattr(model.config.text_config, name, value)
        _settings(model)
        return (model, told) if output_loading_info else model

    def _plan(self, step: Step, prompts: list[Prompt]) -> NSAPlan:
        settings, starts = _settings(self), step.rows.computed
        own = [prompt.is_vision[start:] for prompt, start in zip(prompts, starts, strict=True)]
        is_vision = torch.from_numpy(np.concatenate(own)).to(step.take.device)
        return NSAPlan(is_vision, settings.block_counts, settings.window_size)


def start_gates(model: nn.Module, at: Sequence[float] = START) -> None:
    """Set the gates of every layer and head to about ``at``, whatever their input.

    Args:
        model: a :class:`VideoNSAForConditionalGeneration`.
        at: what the gates of the compressed, the selected and the window branch start at, between
            0 and 1; the paper starts at 1/2 each.
    """
    bias = torch.tensor([TEMPERATURE * math.log(gate / (1 - gate)) for gate in at])
    with torch.no_grad():
        for first, second in _gates(model):
            for linear in (first, second):
                nn.init.normal_(linear.weight, std=INITIAL)
            nn.init.zeros_(first.bias)
            second.bias.copy_(bias.repeat(len(second.bias) // len(bias)))


def force_gates(model: nn.Module, branches: Iterable[str]) -> None:
    """Set the gates of ``branches`` to 1 and the others to 0, whatever their input: an ablation.

    Args:
        model: a :class:`VideoNSAForConditionalGeneration`; a server of the saved model computes the
            same, since the gates' weights say it.
        branches: of BRANCHES.
    """
    branches = set(branches)
    if not branches <= set(BRANCHES):
        raise ValueError(f"branches={sorted(branches)}: each must be one of {', '.join(BRANCHES)}")
    far = 64 * TEMPERATURE  # its sigmoid is 1, or next to nothing
    bias = torch.tensor([far if branch in branches else -far for branch in BRANCHES])
    with torch.no_grad():
        for _, second in _gates(model):
            second.weight.zero_()
            second.bias.copy_(bias.repeat(len(second.bias) // len(bias)))


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights of all gates, for a learning rate of their own: they need a higher one."""
    return [weight for pair in _gates(model) for linear in pair for weight in linear.parameters()]


def gate_values(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``[tokens, heads, 3]`` of a layer's normed input ``x [tokens, hidden]``."""
    logits = attention.g_proj_2(F.gelu(attention.g_proj_1(x)))
    return from_logits(logits.unflatten(-1, (-1, len(BRANCHES))))


def _gates(model: nn.Module) -> Iterable[tuple[nn.Linear, nn.Linear]]:
    for layer in model.model.language_model.layers:
        yield layer.self_attn.g_proj_1, layer.self_attn.g_proj_2


def _settings(model: nn.Module) -> VideoNSASettings:
    """What the model's config says, checked."""
    return VideoNSASettings(**{k: getattr(model.config.text_config, k) for k in OF_TEXT_CONFIG})


def _layer_forward(self: nn.Module, hidden_states: Any, step: Any = None, **kwargs: Any):
    """Qwen2_5_VLDecoderLayer's forward; its gates see what its queries are made of."""
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    gates = gate_values(self.self_attn, hidden_states[0])
    hidden_states, _ = self.self_attn(hidden_states=hidden_states, step=step, gates=gates, **kwargs)
    hidden_states = residual + hidden_states
    residual = hidden_states
    return residual + self.mlp(self.post_attention_layernorm(hidden_states))


# transformers finds a checkpoint's names by the name of the class: ours are the stock model's.
register_checkpoint_conversion_mapping(
    VideoNSAForConditionalGeneration.__name__,
    get_checkpoint_conversion_mapping(Qwen2_5_VLForConditionalGeneration.__name__),
    overwrite=True,
)
