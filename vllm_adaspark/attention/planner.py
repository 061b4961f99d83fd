"""Makes the plan of a step, on the host with NumPy: tokens to tiles, candidates, jobs, budgets.

Everything here comes from what the engine knows of its requests (requests.py) and from the step's
rows, all of it on the host: nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..config import COMPENSATIONS
from ..cubes import spread_tokens
from ..requests import Request, RowSettings
from ..selection import BUDGET, UNIFORM, BudgetGroups
from .plan import (
    DENSE,
    FALLBACKS,
    MAX_TEXT_TILES,
    TEXT,
    VIDEO,
    AttentionPlan,
    FFNPlan,
    ScoreJob,
    StepPlan,
    Tiles,
)
from .state import KeyWrites, StepRows


def build_plan(
    rows: StepRows,
    requests: Sequence[Request | None],
    block_size: int,
    *,
    dense_below: int,
    cube_queries: int,
    device: torch.device,
) -> StepPlan | None:
    """The plan of a step, or None when no request with video is in it.

    Args:
        rows: the step's requests, with their block table.
        requests: ``[rows]`` what is known of each; None for one without video, and for padding.
        block_size: tokens in a KV block, which is a cube's volume.
        dense_below: tiles with fewer candidates attend to all of them.
        cube_queries: tokens of a VIDEO tile whose probabilities decide.
        device: where the layers run.
    """
    requests = [
        request if length else None
        for request, length in zip(requests, rows.query_lens, strict=True)
    ]
    if all(request is None for request in requests):
        return None
    size = block_size
    width = max(1, int(-(-rows.seq_lens.max(initial=1) // size)))
    table = rows.block_table[:, :width]
    in_prompt = _cubes_of_prompts(requests, width)
    row_cubes = in_prompt & (np.arange(width) < rows.seq_lens[:, None] // size)
    settings = RowSettings.of_rows(requests)

    tokens = _Tokens.of(rows, _is_video(rows, requests), row_cubes, in_prompt, size)
    may_choose = _may_choose(tokens, settings, dense_below)
    text, too_long = _text_that_chooses(tokens, settings, may_choose, len(row_cubes))
    asking = spread_tokens(size, cube_queries)
    asked = np.where(settings.rule == UNIFORM, 0, len(asking))  # it looks at no score
    tiles = _tiles(tokens, row_cubes, may_choose, text, size, asked)
    number = len(requests)
    return StepPlan(
        attention=_attention_plan(
            rows, tokens, tiles, table, row_cubes, settings, may_choose, asking, size, device
        ),
        ffn=_ffn_plan(tokens, settings, size, device),
        key_writes=_key_writes(tokens, settings, table, size, device),
        video_tokens=np.bincount(tokens.row[tokens.is_video], minlength=number),
        cubes_seen=np.bincount(tokens.row, tokens.cubes_before, minlength=number),
        block_size=size,
        fallback_tokens=_fallbacks(tokens, settings, may_choose, too_long, number),
    )


def _cubes_of_prompts(requests: Sequence[Request | None], width: int) -> np.ndarray:
    """``[rows, blocks]`` bool: the cubes of each prompt, whether computed yet or not."""
    cubes = np.zeros((len(requests), width), bool)
    for row, request in enumerate(requests):
        if request is not None:
            of_row = request.is_cube[:width]
            cubes[row, : len(of_row)] = of_row
    return cubes


def _is_video(rows: StepRows, requests: Sequence[Request | None]) -> np.ndarray:
    """``[tokens]`` bool: which of the step's tokens are video."""
    is_video = np.zeros(int(rows.query_start[-1]), bool)
    for row, request in enumerate(requests):
        if request is not None:
            done = int(rows.computed[row])
            of_row = request.is_video[done : done + int(rows.query_lens[row])]
            first = int(rows.query_start[row])
            is_video[first : first + len(of_row)] = of_row
    return is_video


def _fallbacks(
    tokens: _Tokens,
    settings: RowSettings,
    may_choose: np.ndarray,
    too_long: np.ndarray,
    rows: int,
) -> dict[str, np.ndarray]:
    """How many tokens of each row ran dense though their settings are sparse, by reason."""
    sparse = may_choose | (settings.ffn_share[tokens.row] < 1)
    mixed = sparse & tokens.is_video & ~tokens.of_cube
    by_reason = (sparse & tokens.cut, mixed, too_long)
    return {
        reason: np.bincount(tokens.row[which], minlength=rows)
        for reason, which in zip(FALLBACKS, by_reason, strict=True)
    }


@dataclass(frozen=True)
class _Tokens:
    """Facts per token of the step."""

    row: np.ndarray
    position: np.ndarray  # in its request
    block: np.ndarray  # logical block
    is_video: np.ndarray
    of_cube: np.ndarray  # its block is a cube, computed in full once the prompt is
    cubes_before: np.ndarray  # complete cubes before its own block
    whole_cubes: np.ndarray  # [cubes] first token of each cube that is wholly in the step
    in_whole_cube: np.ndarray

    @classmethod
    def of(
        cls,
        rows: StepRows,
        is_video: np.ndarray,
        row_cubes: np.ndarray,
        in_prompt: np.ndarray,
        size: int,
    ) -> _Tokens:
        row, position = rows.token_row, rows.token_position
        block = position // size
        whole = np.flatnonzero((position % size == 0) & row_cubes[row, block])
        in_whole = np.zeros(len(row), bool)
        in_whole[whole[:, None] + np.arange(size)] = True
        before = np.cumsum(row_cubes, axis=1) - row_cubes
        of_cube = in_prompt[row, block]
        return cls(row, position, block, is_video, of_cube, before[row, block], whole, in_whole)

    @property
    def cut(self) -> np.ndarray:
        """Tokens of cubes that a chunk edge cuts."""
        return self.of_cube & ~self.in_whole_cube


def _may_choose(tokens: _Tokens, settings: RowSettings, dense_below: int) -> np.ndarray:
    """Tokens with enough cubes before them, and settings that may leave some out, ``[tokens]``."""
    sparse = settings.attention_share[tokens.row] < 1
    return sparse & (tokens.cubes_before >= max(dense_below, 1))


def _text_that_chooses(
    tokens: _Tokens, settings: RowSettings, may_choose: np.ndarray, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Text tokens that choose for themselves, and those that are too many to, ``[tokens]``."""
    row = tokens.row
    text = may_choose & ~tokens.is_video & settings.sparse_text[row]
    few = (np.bincount(row[text], minlength=num_rows) <= MAX_TEXT_TILES)[row]
    return text & few, text & ~few


def _tiles(
    tokens: _Tokens,
    row_cubes: np.ndarray,
    may_choose: np.ndarray,
    text: np.ndarray,
    size: int,
    asked: np.ndarray,
) -> Tiles:
    """Cut the step into tiles.

    ``may_choose`` and ``text`` that chooses are ``[tokens]``; ``asked [rows]``: tokens of a VIDEO
    tile whose probabilities decide, 0 in rows that score no cubes.
    """
    row = tokens.row
    kind = np.where(may_choose & tokens.in_whole_cube, VIDEO, np.where(text, TEXT, DENSE))

    opens = np.diff(row, prepend=-1) != 0
    opens |= np.diff(kind, prepend=-1) != 0
    opens |= kind == TEXT
    opens |= (kind == VIDEO) & (tokens.position % size == 0)
    start = np.flatnonzero(opens)
    length = np.diff(start, append=len(row))
    last = start + length - 1
    block = tokens.block[last]
    kind, row = kind[start], row[start]
    candidates = row_cubes[row] & (np.arange(row_cubes.shape[1]) < block[:, None])
    candidates &= (kind != DENSE)[:, None]
    tail_gap = (block + 1) * size - tokens.position[last] - 1
    asked = np.select([kind == VIDEO, kind == TEXT], [asked[row], np.minimum(asked[row], 1)], 0)
    return Tiles(row, start, length, block, kind, asked, tail_gap, candidates)


def _attention_plan(
    rows: StepRows,
    tokens: _Tokens,
    tiles: Tiles,
    table: np.ndarray,
    row_cubes: np.ndarray,
    settings: RowSettings,
    may_choose: np.ndarray,
    asking: np.ndarray,
    size: int,
    device: torch.device,
) -> AttentionPlan | None:
    sparse = np.flatnonzero(tiles.kind != DENSE)
    if not len(sparse):
        return None
    sparse_row = tiles.row[sparse]
    up_to_own = np.arange(table.shape[1]) <= tiles.block[:, None]
    dense_layers = settings.dense_layers[sparse_row]
    sparse_of = np.full(len(tiles), -1)
    sparse_of[sparse] = np.arange(len(sparse))

    def to(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(array).to(device=device, dtype=dtype)

    return AttentionPlan(
        tiles=tiles,
        jobs=_score_jobs(tiles, sparse, row_cubes, asking, device),
        sparse_tiles=to(sparse, torch.int64),
        sparse_of=to(sparse_of, torch.int32),
        candidates=to(tiles.candidates[sparse], torch.bool),
        always=to(up_to_own & ~tiles.candidates, torch.bool),
        blocks=to(table[tiles.row], torch.int32),
        row_blocks=to(table, torch.int64),
        row_cubes=to(row_cubes, torch.bool),
        tail_gap=to(tiles.tail_gap, torch.int32),
        query_start=to(np.append(tiles.start, rows.query_start[-1]), torch.int32),
        share=to(settings.attention_share[sparse_row], torch.float32),
        min_cubes=to(settings.min_cubes[sparse_row], torch.int64),
        rule=to(settings.rule[sparse_row], torch.int64),
        dense_layers=to(dense_layers, torch.int64),
        rules=tuple(np.unique(settings.rule[sparse_row]).tolist()),
        budget=_attention_budget(tokens, tiles, sparse, settings, may_choose, size, device),
        dense_layers_range=(int(dense_layers.min()), int(dense_layers.max())),
        max_query_len=int(tiles.length.max()),
        max_seq_len=int(rows.seq_lens.max()),
        num_tokens=int(rows.query_start[-1]),
    )


def _attention_budget(
    tokens: _Tokens,
    tiles: Tiles,
    sparse: np.ndarray,
    settings: RowSettings,
    may_choose: np.ndarray,
    size: int,
    device: torch.device,
) -> tuple[BudgetGroups, ...]:
    """A request's video tiles of a step share one p; each text token has its own.

    Where a chunk edge cuts a cube, its tokens attend to everything; what that costs above their
    share, the request's whole cubes of the step have to save.
    """
    row, kind = tiles.row[sparse], tiles.kind[sparse]
    budgeted = settings.rule[row] == BUDGET
    if not budgeted.any():
        return ()
    candidates = tiles.candidates[sparse].sum(axis=1)
    least = np.minimum(candidates, settings.min_cubes[row])
    keep = np.maximum(candidates * settings.attention_share[row], least)
    cut = np.flatnonzero(tokens.cut & may_choose)
    too_many = tokens.cubes_before[cut] * (1 - settings.attention_share[tokens.row[cut]]) / size
    groups = []
    for r in np.unique(row[budgeted]):
        video = np.flatnonzero((row == r) & (kind == VIDEO))
        if len(video):
            left = keep[video].sum() - too_many[tokens.row[cut] == r].sum()
            left = np.maximum(left, least[video].sum(keepdims=True))
            groups.append(BudgetGroups.of(video[None], left, device))
    text = np.flatnonzero(budgeted & (kind == TEXT))
    if len(text):
        groups.append(BudgetGroups.of(text[:, None], keep[text], device))
    return tuple(groups)


def _score_jobs(
    tiles: Tiles,
    sparse: np.ndarray,
    row_cubes: np.ndarray,
    asking: np.ndarray,
    device: torch.device,
) -> list[ScoreJob]:
    """Group the tokens of sparse tiles so that each job is a few dense matrix products.

    Tiles that ask no token have none.  One job per row and kind; rows with a single text token
    (decode) share one job.  ``asking`` are the tokens of a VIDEO tile that are asked, as offsets in
    its block.
    """
    jobs: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
    row = tiles.row[sparse]
    kind = np.where(tiles.asked[sparse] > 0, tiles.kind[sparse], DENSE)
    singles = []
    for r in np.unique(row):
        video = np.flatnonzero((row == r) & (kind == VIDEO))
        text = np.flatnonzero((row == r) & (kind == TEXT))
        if len(video):
            tokens = tiles.start[sparse[video], None] + asking
            jobs.append((VIDEO, np.array([r]), tokens.reshape(1, -1), video[None]))
        tokens = tiles.start[sparse[text]]
        if len(text) == 1:
            singles.append((r, tokens[0], text[0]))
        elif len(text):
            jobs.append((TEXT, np.array([r]), tokens[None], text[None]))
    if singles:
        single_rows, tokens, tile = (np.array(column) for column in zip(*singles, strict=True))
        jobs.append((TEXT, single_rows, tokens[:, None], tile[:, None]))
    made = []
    for job_kind, job_rows, tokens, tile_of in jobs:
        gaps = np.flatnonzero(~row_cubes[job_rows[0]]) if job_kind == VIDEO else np.empty(0, int)
        made.append(
            ScoreJob(
                kind=job_kind,
                row=torch.as_tensor(job_rows).to(device),
                tokens=torch.as_tensor(tokens).to(device),
                asked=tokens.shape[1] // tile_of.shape[1],
                tile_of=torch.as_tensor(tile_of).to(device),
                own_block=tiles.block[sparse[tile_of]],
                limit=torch.as_tensor(tiles.block[sparse[tile_of]]).to(device, torch.int32),
                gap_blocks=gaps.tolist(),
                gaps=torch.as_tensor(gaps).to(device),
            )
        )
    return made


def _ffn_plan(
    tokens: _Tokens, settings: RowSettings, size: int, device: torch.device
) -> FFNPlan | None:
    first = tokens.whole_cubes
    first = first[settings.ffn_share[tokens.row[first]] < 1]
    if not len(first):
        return None
    row = tokens.row[first]
    dense_layers = settings.dense_layers[row]
    compensation = settings.compensation[row]
    by_budget = settings.rule[row] == BUDGET
    return FFNPlan(
        tokens=torch.as_tensor(first[:, None] + np.arange(size)).to(device),
        share=torch.as_tensor(settings.ffn_share[row]).to(device, torch.float32),
        importance=torch.as_tensor(settings.importance[row]).to(device),
        importances=tuple(np.unique(settings.importance[row]).tolist()),
        compensation=torch.as_tensor(compensation).to(device),
        compensations=tuple(np.unique(compensation).tolist()),
        by_budget=torch.as_tensor(by_budget).to(device),
        budget=_ffn_budget(tokens, settings, row, by_budget, size, device),
        dense_layers=torch.as_tensor(dense_layers).to(device),
        row=row,
        extra=(compensation == COMPENSATIONS.index("centroid")).astype(int),
        dense_layers_range=(int(dense_layers.min()), int(dense_layers.max())),
    )


def _ffn_budget(
    tokens: _Tokens,
    settings: RowSettings,
    row: np.ndarray,
    by_budget: np.ndarray,
    size: int,
    device: torch.device,
) -> tuple[BudgetGroups, ...]:
    """A request's cubes of a step share one p; they save what tokens of cut cubes run too much."""
    cut_tokens = np.bincount(tokens.row[tokens.cut], minlength=len(settings.ffn_share))
    groups = []
    for r in np.unique(row[by_budget]):
        cubes = np.flatnonzero(row == r)
        share = settings.ffn_share[r]
        left = len(cubes) * max(share * size, 1) - cut_tokens[r] * (1 - share)
        groups.append(BudgetGroups.of(cubes[None], np.array([max(left, len(cubes))]), device))
    return tuple(groups)


def _key_writes(
    tokens: _Tokens, settings: RowSettings, table: np.ndarray, size: int, device: torch.device
) -> KeyWrites:
    """Only keys that a query may have to choose by are summed."""

    def to(array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.ascontiguousarray(array)).to(device, torch.int64)

    whole_tokens = whole_blocks = part_tokens = part_blocks = fresh = None
    chosen_from = settings.attention_share[tokens.row] < 1
    first = tokens.whole_cubes
    first = first[chosen_from[first]]
    if len(first):
        whole_tokens = slice(int(first[0]), int(first[-1]) + size)
        if (np.diff(first) != size).any():
            whole_tokens = to((first[:, None] + np.arange(size)).reshape(-1))
        whole_blocks = to(table[tokens.row[first], tokens.block[first]])
    part = np.flatnonzero(tokens.cut & chosen_from)
    if len(part):
        block = table[tokens.row[part], tokens.block[part]]
        part_tokens, part_blocks = to(part), to(block)
        fresh = to(block[tokens.position[part] % size == 0])
    return KeyWrites(whole_tokens, whole_blocks, part_tokens, part_blocks, fresh)
