"""AdaSpark as a method: which of its parts runs at which moment (methods/base.py)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...paged.plan import StepPlan
from ...paged.state import StepRows
from ...requests import Prompt
from ...settings import SERVER_KEY, SettingsError
from ..base import SCHEDULER, AttentionCall, FFNCall, Method
from .budget import PromptCost, prompt_cost
from .ffn import active_tokens, sparse_ffn
from .planner import build_plan
from .request import AdaSparkRequest, joins_before
from .score import choose_cubes
from .settings import AdaSparkConfig

logger = logging.getLogger("vllm.adaspark")  # a child of "vllm", so it is shown


class AdaSpark(Method):
    """Cube-selective attention and a token-selective FFN (arXiv 2604.08077)."""

    settings_class = AdaSparkConfig

    def __init__(self, settings: AdaSparkConfig, text_config: Any, device_type: str) -> None:
        super().__init__(settings, text_config, device_type)
        self._layers = text_config.num_hidden_layers

    @classmethod
    def check_server(cls, settings: AdaSparkConfig, vllm_config: Any) -> None:
        """Let our scheduler end chunks at the edges of cubes, unless the user chose another."""
        from ...scheduler import ChunkRulesMixin  # training needs no vLLM
        from ...startup import derives_from

        scheduler = vllm_config.scheduler_config
        if scheduler.scheduler_cls in (None, SCHEDULER):
            scheduler.scheduler_cls = SCHEDULER
        elif not derives_from(scheduler.scheduler_cls, ChunkRulesMixin):
            logger.warning(
                "AdaSpark: --scheduler-cls %s may end chunks inside cubes, which then run dense: a "
                "choice may depend on what shares the step; leave it out, or derive the class "
                "from vllm_adaspark.scheduler.ChunkRulesMixin",
                scheduler.scheduler_cls,
            )

    @classmethod
    def uncut_blocks(cls, settings: AdaSparkConfig, prompt: Prompt) -> np.ndarray | None:
        """Cubes, if anything may be left out: a cut one would run dense.

        Those that choose together stay together, or each would choose for itself.
        """
        request = AdaSparkRequest(settings, prompt.of(cls.media))
        shares = request.settings.attention_share, request.settings.ffn_share
        budget = settings.enabled and settings.flops is not None
        if not budget and min(shares) == 1:
            return None
        joins = settings.sparse_attention & joins_before(request.is_cube, settings)
        first = np.arange(len(joins)) - joins
        return np.where(request.is_cube, first, -1)

    def refuse(self, settings: AdaSparkConfig, named: Any, prompt: Prompt) -> None:
        """Refuse a budget that the request itself names and that its prompt cannot keep."""
        if settings.flops is None or not settings.enabled or not prompt.of(self.media).any():
            return
        if not isinstance(named, Mapping) or named.get("flops") is None:
            return
        least = self._cost(settings, prompt).least
        if settings.flops < least:
            raise SettingsError(
                f"mm_processor_kwargs.{SERVER_KEY}: flops={settings.flops} cannot be met: of this "
                f"request's {prompt.tokens} tokens, what always runs (projections, text, "
                f"min_cubes={settings.min_cubes}) takes more; the smallest budget that can is "
                f"{math.ceil(least * 100) / 100}"
            )

    def describe(self, settings: AdaSparkConfig, prompt: Prompt) -> AdaSparkRequest:
        """A request with video; with a budget, the share that its own prompt leaves."""
        is_video = prompt.of(self.media)
        if settings.flops is None or not settings.enabled:
            return AdaSparkRequest(settings, is_video, layers=self._layers)
        cost = self._cost(settings, prompt)
        share = cost.share(settings.flops)
        return AdaSparkRequest(settings, is_video, share, cost.least, self._layers)

    def _cost(self, settings: AdaSparkConfig, prompt: Prompt) -> PromptCost:
        is_video = prompt.of(self.media)
        return prompt_cost(self.shape, self._layers, is_video, settings, prompt.dropped)

    def told(self, request: AdaSparkRequest) -> dict[str, Any]:
        """Its settings under the names that users know.

        With a budget there is no ``p_attn``, ``p_ffn`` or ``keep``, and ``budget`` says what was
        asked, the smallest budget that the prompt can keep, and whether that is no more.
        """
        config, numbers = request.config, request.settings
        shares: dict[str, Any] = {"selection": config.selection}
        budget = None
        if request.share is not None:
            kept = request.least_budget <= config.flops
            budget = {"flops": config.flops, "smallest": request.least_budget, "kept": kept}
        else:
            attention = "p_attn" if config.selection == "top_p" else "keep"
            shares |= {attention: numbers.attention_share, "p_ffn": numbers.ffn_share}
        return shares | {
            "flops": config.flops if budget else None,
            "min_cubes": config.min_cubes,
            "dense_layers": config.dense_layers,
            "text_queries": config.text_queries,
            "importance": config.importance,
            "compensation": config.compensation,
            "cube": list(config.cube),
            "order": config.order,
            "prune": config.dropped_share,
            "trace": config.trace,
            "budget": budget,
            "off": numbers.attention_share == numbers.ffn_share == 1 and not config.dropped_share,
        }

    def plan(
        self, rows: StepRows, requests: Sequence[AdaSparkRequest | None], device: torch.device
    ) -> StepPlan | None:
        """See planner.build_plan."""
        return build_plan(
            rows,
            requests,
            self.settings.cube_volume,
            dense_below=self.settings.dense_below,
            cube_queries=self.settings.cube_queries,
            tile_cubes=self.settings.tile_cubes,
            device=device,
        )

    def attend(self, plan: StepPlan, call: AttentionCall) -> None:
        """Score the cubes, choose, attend (score.py, choose.py)."""
        assert call.key_summaries is not None, "cubes to choose from, but no keys were written"
        with plan.selection.running(call.query.device):
            by_head = call.query.unflatten(1, (call.kv_heads, -1)).transpose(0, 1)
            chosen = choose_cubes(
                by_head, call.key_summaries, plan.attention, call.scale, call.layer, call.head_ranks
            )
            tables = call.choose(chosen)
        call.run(tables)

    def ffn(self, plan: StepPlan, call: FFNCall) -> torch.Tensor | None:
        """Run the tokens that matter, and one centroid for the others of a cube (ffn.py)."""
        cubes = plan.ffn
        if cubes is None or call.layer < cubes.dense_layers_range[0]:
            return None
        active = call.agree(active_tokens(call.x, call.residual, cubes, call.layer))
        plan.ran(call.layer, active)
        if call.fused is not None:
            return call.fused(call.x, active, cubes)
        return sparse_ffn(call.x, call.dense, active, cubes, call.mapped)
