"""The per-step plan, as the layers read it: query tiles, their candidate cubes, FFN cubes.

Made once per step by planner.py, then used by every layer.  The step's tokens are cut
into *query tiles*, of three kinds:

* ``VIDEO``: a complete cube, all of it in this step.  Its tokens choose cubes together: some of
  them, spread over it, are asked (config.cube_queries), all of them attend to what these choose.
* ``TEXT``: one token that is not video: question, answer, decode.  It chooses for itself, so its
  choice does not depend on which text shares its step (chunked prefill, preemption, prefix hits),
  save that a request's text runs dense in a chunk with more than MAX_TEXT_TILES of them.
* ``DENSE``: a run of tokens that attend to everything: those before or without cubes, of requests
  with p >= 1, and video tokens whose cube is not whole in this step.  A chunk edge inside a cube
  may thus only make more be computed.

A tile's *candidates* are the cubes before its own block.  All other blocks up to and including its
own are always attended: anchor blocks (any token that is not video) and the own block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..selection import BudgetGroups
from ..timing import Stopwatch
from .scratch import Scratch
from .state import KeyWrites

DENSE, VIDEO, TEXT = range(3)

# A text token costs a kernel as much as a decode token.  Past so many of them in one request's
# chunk, attending densely in one tile is cheaper than choosing for each.
MAX_TEXT_TILES = 1024

# Why tokens ran dense though their settings are sparse: a chunk edge cuts their cube; their KV
# block also holds text, so it is no cube; their text is longer than MAX_TEXT_TILES.
FALLBACKS = ("cut_cube", "mixed_block", "long_text")


@dataclass(frozen=True)
class Tiles:
    """Host facts of the step's tiles, in token order; together they cover every token once."""

    row: np.ndarray  # [tiles]
    start: np.ndarray  # [tiles] first token in the step
    length: np.ndarray  # [tiles] tokens
    block: np.ndarray  # [tiles] logical index of the last block it touches
    kind: np.ndarray  # [tiles] DENSE, VIDEO or TEXT
    asked: np.ndarray  # [tiles] tokens whose probabilities decide; 0 for DENSE and for uniform
    tail_gap: np.ndarray  # [tiles] slots of the last block after the tile's last token
    candidates: np.ndarray  # [tiles, blocks] bool, all false for DENSE

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class ScoreJob:
    """Queries scored together: the same number of tokens from each of some rows.

    ``tile_of[i, j]`` indexes the sparse tiles (not all tiles): per token in a TEXT job; per tile,
    ``[rows, tokens / asked]``, in a VIDEO job, where a tile's tokens stand together.
    """

    kind: int
    row: torch.Tensor  # [rows] int64
    tokens: torch.Tensor  # [rows, tokens] int64, index into the step
    tile_of: torch.Tensor  # [rows, tokens] or [rows, tiles] int64
    own_block: np.ndarray  # [rows, tokens] or [rows, tiles], host: candidates lie below it
    limit: torch.Tensor  # the same on the device, int32
    asked: int  # tokens of a tile
    gap_blocks: list[int]  # of a VIDEO job's row: blocks that are no cubes, rising; else empty
    gaps: torch.Tensor  # [gaps] int64, the same on the device


@dataclass
class AttentionPlan:
    """What every layer needs to choose cubes and build tables; tensors on the device.

    *Sparse* tiles are those that are not DENSE.
    """

    tiles: Tiles
    jobs: list[ScoreJob]
    sparse_tiles: torch.Tensor  # [sparse] int64, index of each sparse tile
    sparse_of: torch.Tensor  # [tiles] int32, the reverse; -1 for DENSE ones
    candidates: torch.Tensor  # [sparse, blocks] bool
    always: torch.Tensor  # [tiles, blocks] bool: attended without being chosen
    blocks: torch.Tensor  # [tiles, blocks] int32 physical blocks
    row_blocks: torch.Tensor  # [rows, blocks] int64 physical blocks
    row_cubes: torch.Tensor  # [rows, blocks] bool: which of them are cubes
    tail_gap: torch.Tensor  # [tiles] int32
    query_start: torch.Tensor  # [tiles + 1] int32
    share: torch.Tensor  # [sparse] fp32
    min_cubes: torch.Tensor  # [sparse] int64
    rule: torch.Tensor  # [sparse] int64
    dense_layers: torch.Tensor  # [sparse] int64
    rules: tuple[int, ...]  # the selection rules that occur
    budget: tuple[BudgetGroups, ...]  # over the sparse tiles of requests with a budget
    dense_layers_range: tuple[int, int]  # lowest and highest over the sparse tiles
    max_query_len: int
    max_seq_len: int
    num_tokens: int
    shared: Any = None  # what the adapter's first layer made for all of them
    scratch: Scratch = field(default_factory=Scratch)  # for choosing


@dataclass(frozen=True)
class FFNPlan:
    """Cubes that lie wholly in this step and may skip tokens; tensors on the device."""

    tokens: torch.Tensor  # [cubes, block_size] int64, index into the step
    share: torch.Tensor  # [cubes] fp32
    importance: torch.Tensor  # [cubes] int64, index into config.IMPORTANCES
    importances: tuple[int, ...]  # those that occur
    compensation: torch.Tensor  # [cubes] int64, index into config.COMPENSATIONS
    compensations: tuple[int, ...]  # those that occur
    by_budget: torch.Tensor  # [cubes] bool: of a request with a budget
    budget: tuple[BudgetGroups, ...]  # over these
    dense_layers: torch.Tensor  # [cubes] int64
    row: np.ndarray  # [cubes], host
    extra: np.ndarray  # [cubes], host: FFN evaluations, 0 or 1, for what skips, if anything does
    dense_layers_range: tuple[int, int]


@dataclass
class StepPlan:
    """Everything the layers share in one step, and the counts they leave behind."""

    attention: AttentionPlan | None
    ffn: FFNPlan | None
    key_writes: KeyWrites
    video_tokens: np.ndarray  # [rows] video tokens in this step
    cubes_seen: np.ndarray  # [rows] (query token, preceding cube) pairs
    block_size: int
    fallback_tokens: dict[str, np.ndarray]  # by reason of FALLBACKS: [rows]
    planning_seconds: float = 0.0
    selection: Stopwatch = field(default_factory=Stopwatch)  # scores, choice, tables of all layers
    kept_blocks: dict[int, torch.Tensor] = field(default_factory=dict)  # layer: [kv_heads, tiles]
    ffn_active: dict[int, torch.Tensor] = field(default_factory=dict)  # layer: [cubes]
    trace: Any = None  # tracing.step.StepTrace, in steps with a traced request
