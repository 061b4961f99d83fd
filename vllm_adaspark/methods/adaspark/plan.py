"""What AdaSpark's layers read of a step: how tiles choose cubes, and which cubes' tokens may skip.

Made once per step by planner.py, then used by every layer.  The tiles are those of paged/tiles.py:

* ``VIDEO``: a cube, or two neighbouring ones (settings.tile_cubes).  Its tokens choose cubes
  together: some of them, spread over each cube, are scored (settings.cube_queries), all of them
  attend to what these choose.
* ``TEXT``: a text token chooses for itself, so its choice does not depend on which text shares its
  step (chunked prefill, preemption, prefix hits).
* ``DENSE``: tokens before or without cubes, of requests with p >= 1, the text of a prompt in which
  more than MAX_TEXT_TILES text tokens could choose, and video tokens whose cube is not whole in
  this step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...paged.tiles import TilePlan
from .choose import BudgetGroups


@dataclass(frozen=True)
class ScoreJob:
    """Queries scored together: the same number of tokens from each of some rows.

    ``tile_of[i, j]`` indexes the sparse tiles (not all tiles): per token in a TEXT job; per tile,
    ``[rows, tokens / scored]``, in a VIDEO job, where a tile's tokens stand together.  Of a tile of
    two cubes ``own_block`` is the first.
    """

    kind: int
    row: torch.Tensor  # [rows] int64
    tokens: torch.Tensor  # [rows, tokens] int64, index into the step
    tile_of: torch.Tensor  # [rows, tokens] or [rows, tiles] int64
    own_block: np.ndarray  # [rows, tokens] or [rows, tiles], host: candidates lie below it
    limit: torch.Tensor  # the same on the device, int32
    scored: int  # tokens of a tile
    gap_blocks: list[int]  # of a VIDEO job's row: blocks that are no cubes, rising; else empty
    gaps: torch.Tensor  # [gaps] int64, the same on the device


@dataclass(kw_only=True)
class AttentionPlan(TilePlan):
    """What every layer needs to choose cubes; tensors on the device."""

    jobs: list[ScoreJob]
    row_blocks: torch.Tensor  # [rows, blocks] int64 physical blocks
    row_cubes: torch.Tensor  # [rows, blocks] bool: which of them are cubes
    share: torch.Tensor  # [sparse] fp32
    min_cubes: torch.Tensor  # [sparse] int64
    rule: torch.Tensor  # [sparse] int64
    dense_layers: torch.Tensor  # [sparse] int64
    most_dense_layers: int  # the highest of them
    rules: tuple[int, ...]  # the selection rules that occur
    budget: tuple[BudgetGroups, ...]  # over the sparse tiles of requests with a budget


@dataclass(frozen=True)
class FFNPlan:
    """Cubes that lie wholly in this step and may skip tokens; tensors on the device."""

    tokens: torch.Tensor  # [cubes, block_size] int64, index into the step
    share: torch.Tensor  # [cubes] fp32
    importance: torch.Tensor  # [cubes] int64, index into settings.IMPORTANCES
    importances: tuple[int, ...]  # those that occur
    compensation: torch.Tensor  # [cubes] int64, index into settings.COMPENSATIONS
    compensations: tuple[int, ...]  # those that occur
    by_budget: torch.Tensor  # [cubes] bool: of a request with a budget
    budget: tuple[BudgetGroups, ...]  # over these
    dense_layers: torch.Tensor  # [cubes] int64
    row: np.ndarray  # [cubes], host
    extra: np.ndarray  # [cubes], host: FFN evaluations, 0 or 1, for what skips, if anything does
    dense_layers_range: tuple[int, int]
