"""AdaTP as a method: which of its parts runs at which moment (methods/base.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...paged.heads import HeadRanks
from ...paged.state import StepRows
from ...requests import Prompt, Video
from ...settings import SERVER_KEY, SettingsError
from ..base import Method
from .encoder import SiglipEncoder
from .flops import PromptCost, event_layers
from .plan import AdaTPPlan, make_depths
from .request import AdaTPRequest, Look
from .score import SLAB
from .segments import adjacent_similarity, frame_means, text_similarity
from .settings import AdaTPSettings
from .state import PromptState


class AdaTP(Method):
    """Video tokens are dropped between the layers (arXiv 2505.20100)."""

    settings_class = AdaTPSettings
    _encoder: SiglipEncoder | None = None  # in workers of a server that has one

    def __init__(self, settings: AdaTPSettings, text_config: Any, device_type: str) -> None:
        super().__init__(settings, text_config, device_type)
        self._layers = text_config.num_hidden_layers

    # -- when the server starts, and before a request runs ---------------------------------------

    @classmethod
    def check_server(cls, settings: AdaTPSettings, vllm_config: Any) -> None:
        """See startup.py of this method."""
        from .startup import check_server

        check_server(settings, vllm_config)

    def step_bytes(self, tokens: int, heads: int, kv_heads: int, head_size: int, item: int) -> int:
        """Scoring a prompt: its keys in fp32, and a slab of logits and probabilities."""
        return tokens * kv_heads * head_size * 4 + 3 * 4 * max(SLAB, heads * tokens)

    def refuse(self, settings: AdaTPSettings, named: Any, prompt: Prompt) -> None:
        """Refuse layers that are not there, a prompt no step can hold, and a hopeless budget."""
        source = f"mm_processor_kwargs.{SERVER_KEY}"
        if not settings.enabled:
            return
        try:
            event_layers(settings, self._layers)
        except ValueError as error:
            raise SettingsError(f"{source}: {error}") from None
        is_video = prompt.of(self.media)
        if not is_video.any():
            return
        if self.step_tokens is not None and prompt.tokens > self.step_tokens:
            raise ValueError(
                f"this prompt has {prompt.tokens} tokens, of which {int(is_video.sum())} are "
                f"video, and this server runs {self.step_tokens} tokens in a step, while AdaTP "
                "must see a prompt with video at once: start the server with a larger "
                "--max-num-batched-tokens (and --max-num-scheduled-tokens, if it is set), send "
                "fewer or smaller frames, or turn AdaTP off for "
                f'this request ({source}="off")'
            )
        if not isinstance(named, Mapping) or named.get("flops") is None:
            return
        least = self._cost(settings, prompt).least
        if settings.flops < least:
            raise SettingsError(
                f"{source}: flops={settings.flops} cannot be met: of this request's "
                f"{prompt.tokens} tokens, text and the layers up to the last of layers="
                f"{[layer + 1 for layer in event_layers(settings, self._layers)]} take more; the "
                f"smallest budget that can is {math.ceil(least * 100) / 100}"
            )

    def describe(self, settings: AdaTPSettings, prompt: Prompt) -> AdaTPRequest:
        return AdaTPRequest(
            config=settings,
            is_video=prompt.of(self.media),
            videos=tuple(prompt.videos),
            text_from=_text_from(prompt),
            # What is named beside "off" was not checked, and does not count.
            cost=self._cost(settings, prompt) if settings.enabled else None,
            wants_all=prompt.wants_all,
            question=prompt.question() if self._encodes(prompt.videos) else "",
        )

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """The SigLIP checkpoint, if the server has one."""
        if self.settings.encoder is not None:
            self._encoder = SiglipEncoder(self.settings.encoder, device, dtype)

    def _encodes(self, videos: Sequence[Video]) -> bool:
        """Whether the encoder sees these videos: it cannot if one came as embeddings."""
        return self._encoder is not None and all(video.pictures is not None for video in videos)

    def _cost(self, settings: AdaTPSettings, prompt: Prompt) -> PromptCost:
        video = int(prompt.of(self.media).sum())
        behind = prompt.tokens - _text_from(prompt)
        return PromptCost.of(settings, self.shape, self._layers, prompt.tokens, video, behind)

    def told(self, request: AdaTPRequest) -> dict[str, Any]:
        """Its settings under the names that users know, with the schedule spelt out.

        ``keep`` is the share that each event keeps, also where a budget chose it.
        """
        config, cost = request.config, request.cost
        layers, keep, budget = [], [], None  # of a request that is off
        nothing_goes = True
        if cost is not None:
            shares = cost.shares(config)
            layers = [layer + 1 for layer in cost.events]
            keep = (shares / np.array([1.0, *shares[:-1]])).round(4).tolist()
            nothing_goes = float(shares[-1]) == 1 and config.dedup == "off"
            if config.flops is not None:
                smallest = 1.0 if request.runs_dense else cost.least
                kept = smallest <= config.flops
                budget = {"flops": config.flops, "smallest": smallest, "kept": kept}
        return {
            "layers": layers,
            "keep": keep,
            "flops": config.flops if budget else None,
            "tau_s": config.tau_s,
            "tau_t": config.tau_t,
            "alpha_boost": config.alpha_boost,
            "gamma_cap": config.gamma_cap,
            "dedup": config.dedup,
            "refill": config.refill,
            "keep_budget": config.keep_budget,
            "queries": config.queries,
            "frames_by": "encoder" if self._encodes(request.videos) else "mean of tokens",
            "relevance": bool(request.question),
            "order": config.order,
            "trace": config.trace,
            "budget": budget,
            "off": nothing_goes,
        }

    # -- a step ------------------------------------------------------------------------------------

    def plan(
        self, rows: StepRows, requests: Sequence[AdaTPRequest | None], device: torch.device
    ) -> AdaTPPlan | None:
        """Settle what prompts that start in this step lose, and what every layer then sees."""
        on = [r if r is not None and r.config.enabled else None for r in requests]
        starting = np.array([r is not None for r in on])
        starting &= (rows.computed == 0) & (rows.query_lens > 0)
        for row in np.flatnonzero(starting):
            on[row].start(int(rows.seq_lens[row]), self._look)
        size = self.settings.cube_volume
        depths = make_depths(rows, on, starting, size)
        prompts = [
            PromptState(int(row), on[row], on[row].progress.pruning, device)
            for row in np.flatnonzero(starting)
            if depths is not None and on[row].progress.pruning is not None
        ]
        plan = AdaTPPlan.of(rows, requests, starting, size, depths, prompts)
        return plan if depths is not None or plan.video_tokens.any() else None

    def _look(self, request: AdaTPRequest) -> Look:
        """Compare a request's frames with each other, and with its question.

        The one thing that a plan reads from the device: once for each prompt that starts, after
        the vision tower and before the layers.
        """
        if self._encodes(request.videos):
            frames = [self._encoder.frames(v.identifier, v.pictures) for v in request.videos]
        else:
            frames = [frame_means(video.encoded(), video.grid[0]) for video in request.videos]
        similar = [self.agree(adjacent_similarity(video)).cpu().numpy() for video in frames]
        if not request.question:
            return Look(similar)
        relevance = text_similarity(torch.cat(frames), self._encoder.question(request.question))
        return Look(similar, self.agree(relevance).cpu().numpy())

    def observe(
        self,
        plan: AdaTPPlan,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        scale: float,
        head_ranks: HeadRanks | None,
    ) -> None:
        """Score the video tokens of the prompts that lose some after this layer."""

        def agree(score: torch.Tensor) -> torch.Tensor:
            # All ranks compute the same mean of the same numbers, so they choose the same tokens.
            return score if head_ranks is None else head_ranks.gather(score[None]).mean(0)

        start = plan.depths.rows[plan.depths.of(layer)].query_start
        with plan.selection.running(query.device):
            for prompt in plan.prompts:
                mine = slice(int(start[prompt.row]), int(start[prompt.row + 1]))
                prompt.observe(layer, query[mine], key[mine], scale, agree)

    def survivors(self, plan: AdaTPPlan, layer: int) -> torch.Tensor:
        """Which tokens go on to the next layer, ``[tokens at this depth]`` bool."""
        start = plan.depths.rows[plan.depths.of(layer)].query_start
        device = plan.depths.positions.device
        keep = torch.ones(int(start[-1]), dtype=torch.bool, device=device)
        with plan.selection.running(device):
            for prompt in plan.prompts:
                before, after = prompt.survivors(layer)
                keep[int(start[prompt.row]) + before] = False
                keep[int(start[prompt.row]) + after] = True
                if plan.trace is not None:
                    plan.trace.survivors(layer, prompt.row, prompt.alive)
        return keep


def _text_from(prompt: Prompt) -> int:
    """The first token behind all videos of a prompt and what belongs to them, such as newlines."""
    return max(place.offset + place.length for place in prompt.places["video"])
