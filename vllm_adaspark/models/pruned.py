"""Videos of which tokens were dropped, inside a multimodal model with M-RoPE (video/prune.py).

:class:`PrunedVideos` does three things at three moments:

* once a video is encoded, it chooses the survivors, and sends their places along with them;
* for a new request it gives the positions of the *whole* prompt to what is left of it, and to every
  token of a pruned video the position of its first one;
* in each step it takes the places off the embeddings again, and adds them to the step's positions.

vLLM's own recompute_mrope_positions, which its EVS does the same with, is not used: it needs a flag
of the whole server, and gives wrong positions where a chunk ends inside one of several videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.multimodal.inputs import MultiModalFeatureSpec

from ..settings import Settings
from ..video.order import cube_order
from ..video.prune import WholePrompt, split_places, survivors, with_places


class PrunedVideos:
    """Mixed in before base.SparseModel, for a model whose positions are M-RoPE's."""

    _places: torch.Tensor | None = None  # [3, tokens] of the step that is about to run

    def _survivors(
        self,
        video: torch.Tensor,
        grid: tuple[int, int, int],
        settings: Settings,
        positions_per_frame: float,
    ) -> torch.Tensor:
        """The entry ``[kept, hidden + COLUMNS]`` of a video for the encoder cache.

        Args:
            video: ``[T * H * W, hidden]`` in raster order.
            grid: (T, H, W) merged tokens.
            settings: of its request.
            positions_per_frame: M-RoPE time positions from one frame to the next.
        """
        token_order = cube_order(grid, settings.cube, settings.order)
        tokens = survivors(video, grid, settings.dropped_share, token_order)
        if get_tensor_model_parallel_world_size() > 1:
            # Ranks may round a near-tie differently, and must not see different videos.
            tokens = get_tp_group().broadcast(tokens, src=0)
        return with_places(video, tokens, grid, positions_per_frame)

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor] | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As stock; keeps the places of the step's survivors for its forward.

        Both model runners call this once before every step that may hold media.
        """
        self._places = None
        if multimodal_embeddings:
            hidden = self.config.get_text_config().hidden_size
            parts = [split_places(item, hidden) for item in multimodal_embeddings]
            multimodal_embeddings = [embeddings for embeddings, _ in parts]
            if any(places is not None for _, places in parts):
                none = torch.zeros(3, len(input_ids), dtype=torch.long, device=input_ids.device)
                places = [
                    none[:, : len(embeddings)] if places is None else places[:3]
                    for embeddings, places in parts
                ]
                mask = is_multimodal.to(input_ids.device, non_blocking=True).expand(3, -1)
                self._places = none.masked_scatter(mask, torch.cat(places, dim=1))
        return super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def _begin_step(self, positions: torch.Tensor) -> None:
        """Move the step's survivors to their places, before the step is planned.

        ``positions [3, tokens]`` is the runner's own buffer, which it fills anew for every step.
        It is changed in place, because CUDA graphs read it there.
        """
        places, self._places = self._places, None
        if places is not None:
            positions[:, : places.shape[1]] += places
        super()._begin_step(positions)


def in_whole_prompt(
    features: Sequence[MultiModalFeatureSpec], whole: WholePrompt
) -> list[MultiModalFeatureSpec]:
    """A request's media where the whole prompt has them, for the stock model's positions."""
    return [
        replace(
            feature,
            mm_position=replace(
                feature.mm_position, offset=int(whole.up_to(feature.mm_position.offset))
            ),
        )
        for feature in features
    ]
