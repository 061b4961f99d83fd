"""What every multimodal model of ours adds to the stock one it is made from.

A model of ours is the stock model with our language model in it (models/qwen2.py), a
:class:`~vllm_adaspark.step.Runtime`, by which the worker knows it as one of ours, and a layout
(models/layout.py).  :class:`SparseModel`, mixed in before the stock class, keeps these and does
what does not depend on the model: it plans each step at the top of ``forward``, and puts a video's
embeddings into cube order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from ..methods import base as methods
from ..paged.depth_metadata import give_depths, is_ours
from ..requests import FIELD, unpack_settings
from ..step import Runtime
from .layout import Layout, layout_of, token_order


class SparseModel:
    """Mixed in before a stock multimodal model whose ``language_model`` is one of ours."""

    runtime: Runtime
    layout: Layout
    _has_weights = False

    def _share_runtime(self, hf_config: Any) -> None:
        """Make the model's runtime and hand it to the layers; called at the end of __init__."""
        self.layout = layout_of(hf_config)
        self.runtime = Runtime(methods.of_model(hf_config, current_platform.device_type))
        self._settings_class = self.runtime.method.settings_class
        self.language_model.share(self.runtime)

    # -- from video to embeddings ---------------------------------------------------------------

    def _parse_and_validate_video_input(self, **kwargs: object):
        parsed = super()._parse_and_validate_video_input(**kwargs)
        # Rides along with the parsed input: the schema takes no field of ours.
        self._video_settings = kwargs.get(FIELD)
        return parsed

    def _in_order(
        self,
        videos: Sequence[torch.Tensor],
        grids: Sequence[tuple[int, int, int]],
        positions_per_frame: Sequence[float] = (),
    ) -> tuple[torch.Tensor, ...]:
        """Each video's embeddings ``[tokens, hidden]`` in the order that its request asks for.

        Args:
            videos: in raster order; what is no video, at the end, stays there.
            grids: (T, H, W) video tokens of each.
            positions_per_frame: of each, for a model that takes ``prune`` (models/pruned.py).
        """
        ordered = []
        for nth, (video, grid, packed) in enumerate(
            zip(videos, grids, self._video_settings, strict=True)
        ):
            settings = unpack_settings(packed, self._settings_class)
            if settings.dropped_share:
                ordered.append(self._survivors(video, grid, settings, positions_per_frame[nth]))
                continue
            order = token_order(grid, settings)
            if order is not None:
                places = torch.arange(len(video))
                places[: len(order)] = torch.from_numpy(order)
                video = video[places.to(video.device)]
            ordered.append(video)
        return tuple(ordered)

    # -- weights ----------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As stock, but a method's own weights must be in the checkpoint.

        Later calls bring some of the weights anew, from a trainer.
        """
        loaded = super().load_weights(weights)
        if self._has_weights:
            return loaded
        missing = [
            f"{attention}.{name}"
            for attention, module in self.language_model.method_modules()
            for name, _ in module.named_parameters()
            if f"language_model.{attention}.{name}" not in loaded
        ]
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} weights of the method, among them "
                f"{', '.join(missing[:4])}: it was not trained for it; serve one that was"
            )
        self._has_weights = True
        return loaded

    # -- the step's plan --------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        """As stock, once the step is planned."""
        self._begin_step(positions)
        hidden = super().forward(
            input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
        )
        return self.runtime.restore(hidden, positions.shape[-1])

    def _begin_step(self, positions: torch.Tensor) -> None:
        context = get_forward_context()
        metadata = context.attn_metadata
        # There is none in profiling runs; and the layers of a draft model have stock ones.
        ours = (of_layer for of_layer in (metadata or {}).values() if is_ours(of_layer))
        rows = next((of_layer.adaspark_rows for of_layer in ours), None)
        self.runtime.begin_step(rows, positions.device)
        self.runtime.place(positions)
        plan = self.runtime.plan
        if plan is not None and plan.depths is not None:
            plan.depths.begin(positions)
            give_depths(context, plan.depths)

    @classmethod
    def get_model_state_cls(cls) -> type:
        """Model runner V2 asks for this; runner V1 does not."""
        from .model_state import AdaSparkModelState

        return AdaSparkModelState
