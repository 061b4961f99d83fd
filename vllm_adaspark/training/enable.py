"""AdaSpark's semantics in a Qwen2.5-VL model of transformers, on and off."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from torch import nn
from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration

from ..accounts.flops import ModelShape
from ..methods.adaspark.budget import prompt_cost
from ..methods.adaspark.planner import build_plan
from ..methods.adaspark.request import AdaSparkRequest
from ..methods.adaspark.settings import AdaSparkConfig
from ..paged.plan import StepPlan
from ..settings import CHECKPOINT_KEY, SettingsError, check_cube_volume
from .attention import NAME, adaspark_attention
from .ffn import sparse_mlp
from .packing import Step
from .passes import SparsePass, put_in, take_out
from .prompt import Prompt
from .videonsa import VideoNSAForConditionalGeneration

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
    _check_method(model)
    if config is None:
        settings = getattr(model.config, CHECKPOINT_KEY, None)
        if settings is None:
            raise SettingsError(
                f"config=None, and the model's config.json has no {CHECKPOINT_KEY}: pass an "
                "AdaSparkConfig"
            )
        config = AdaSparkConfig.settled(settings, None)
    _check(config)
    disable_sparse_training(model)
    plan = partial(plan_step, text_config=model.config.text_config, config=config)
    put_in(model, SparsePass(NAME, config, config.cube_volume, plan, _layer_forward))
    setattr(model.config, CHECKPOINT_KEY, checkpoint_settings(config))
    return model


def disable_sparse_training(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Make ``model`` the stock model again, if it is not; its weights stay as they are.

    Raises:
        TypeError: a VideoNSA model, which is no stock model in any way.
    """
    _check_method(model)
    if take_out(model):
        delattr(model.config, CHECKPOINT_KEY)


def checkpoint_settings(config: AdaSparkConfig) -> dict[str, Any]:
    """What a checkpoint says of ``config``: how it was trained, nothing of a server's business."""
    may = {spec.name for spec in dataclasses.fields(config) if spec.metadata["checkpoint"]}
    kept = may - {"enabled"}  # training is never dense
    return {key: value for key, value in config.to_dict().items() if key in kept}


def _check_method(model: nn.Module) -> None:
    if isinstance(model, VideoNSAForConditionalGeneration):
        raise TypeError(
            "model is a VideoNSAForConditionalGeneration: its forward pass is sparse by itself; "
            "load a Qwen2_5_VLForConditionalGeneration for AdaSpark or for the stock model"
        )


def _check(config: AdaSparkConfig) -> None:
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


def plan_step(
    step: Step, prompts: list[Prompt], *, text_config: Any, config: AdaSparkConfig
) -> StepPlan | None:
    """The served plan of a step: tiles, candidates and FFN cubes; None if there is no video."""
    step.key_summary = config.key_summary
    return build_plan(
        step.rows,
        [_request(prompt, text_config, config) for prompt in prompts],
        config.cube_volume,
        dense_below=config.dense_below,
        cube_queries=config.cube_queries,
        tile_cubes=config.tile_cubes,
        device=step.take.device,
    )


def _request(prompt: Prompt, text_config: Any, config: AdaSparkConfig) -> AdaSparkRequest | None:
    """What a server would know of a sequence; with a budget, a share that its tokens allow."""
    if not prompt.videos:
        return None
    if config.flops is None:
        return AdaSparkRequest(config, prompt.is_video)
    shape = ModelShape.of(text_config, summary=config.key_summary)
    cost = prompt_cost(shape, text_config.num_hidden_layers, prompt.is_video, config)
    return AdaSparkRequest(config, prompt.is_video, cost.share(config.flops), cost.least)


def _layer_forward(self: nn.Module, hidden_states: Any, step: Any = None, **kwargs: Any):
    """Qwen2_5_VLDecoderLayer's forward, its FFN run on the tokens that matter."""
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    hidden_states, _ = self.self_attn(hidden_states=hidden_states, step=step, **kwargs)
    hidden_states = residual + hidden_states

    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)
    layer = self.self_attn.layer_idx
    branch = sparse_mlp(hidden_states[0], residual[0], self.mlp, step, layer)
    return residual + branch[None]
