"""A toy method, to show what adding one takes: cubes attend to the last few cubes, and text to all.

Nothing outside this file knows of it.  A server is started with
``--additional-config '{"method": "engine.sliding_window:SlidingWindow"}'``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_adaspark.methods.base import Method
from vllm_adaspark.paged.plan import StepPlan
from vllm_adaspark.paged.tiles import VIDEO, TilePlan, Tokens, cubes_of, cut_tiles, tile_fields
from vllm_adaspark.requests import Request
from vllm_adaspark.settings import Settings, setting


@dataclass(frozen=True)
class WindowSettings(Settings):
    """Its one setting."""

    window: int = setting(2, "cubes that a cube attends to before its own", low=1, high=1000)


@dataclass(kw_only=True)
class WindowPlan(TilePlan):
    """The choice is the same in every layer, so the plan has it."""

    chosen: torch.Tensor  # [sparse, blocks] bool


class SlidingWindow(Method):
    """Follows methods/base.py."""

    settings_class = WindowSettings

    def told(self, request: Request) -> dict:
        config = request.config
        return {"window": config.window, "off": not config.enabled, "trace": config.trace}

    def plan(self, rows, requests, device) -> StepPlan | None:
        on = [r if r is not None and r.config.enabled else None for r in requests]
        if all(request is None for request in on):
            return None
        size = self.settings.cube_volume
        row_cubes, in_prompt = cubes_of(rows, on, size)
        tokens = Tokens.of(rows, on, row_cubes, in_prompt, size)
        windows = np.array([r.config.window if r else 1 for r in on])
        video = tokens.cubes_before > windows[tokens.row]
        tiles = cut_tiles(
            tokens, row_cubes, video, np.zeros_like(video), size, np.zeros(len(on), int)
        )
        attention = None
        if (tiles.kind == VIDEO).any():
            table = rows.block_table[:, : row_cubes.shape[1]]
            shared = tile_fields(rows, tiles, table, device)
            sparse = tiles.kind == VIDEO
            row, candidates = tiles.row[sparse], tiles.candidates[sparse]
            nth_last = candidates[:, ::-1].cumsum(1)[:, ::-1]  # 1 for the cube just before
            chosen = candidates & (nth_last <= windows[row, None])
            attention = WindowPlan(**shared, chosen=torch.as_tensor(chosen).to(device))
        return StepPlan(
            attention=attention,
            ffn=None,
            summary_writes=None,
            video_tokens=np.bincount(tokens.row[tokens.is_video], minlength=len(on)),
            cubes_seen=np.bincount(tokens.row, tokens.cubes_before, minlength=len(on)),
            block_size=size,
        )

    def attend(self, plan: StepPlan, call) -> None:
        chosen = plan.attention.chosen[:, None]
        call.run(call.choose(chosen.expand(-1, call.kv_heads, -1)))
