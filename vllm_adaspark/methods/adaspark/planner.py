"""Makes the plan of a step, on the host with NumPy: tokens to tiles, candidates, jobs, budgets.

Everything here comes from what the engine knows of its requests (requests.py) and from the step's
rows, all of it on the host: nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...paged.plan import FALLBACKS, MAX_TEXT_TILES, StepPlan
from ...paged.state import StepRows
from ...paged.tiles import (
    DENSE,
    TEXT,
    VIDEO,
    Tiles,
    Tokens,
    cubes_of,
    cut_tiles,
    summary_writes,
    tile_fields,
)
from ...video.order import spread_tokens
from .choose import BUDGET, UNIFORM, BudgetGroups
from .plan import AttentionPlan, FFNPlan, ScoreJob
from .request import AdaSparkRequest, RowSettings
from .settings import COMPENSATIONS


def build_plan(
    rows: StepRows,
    requests: Sequence[AdaSparkRequest | None],
    block_size: int,
    *,
    dense_below: int,
    cube_queries: int,
    tile_cubes: int = 1,
    device: torch.device,
) -> StepPlan | None:
    """The plan of a step, or None when no request with video is in it.

    Requests that leave nothing out are counted, and otherwise no concern of the plan: a step of
    such requests runs as in stock vLLM.

    Args:
        rows: the step's requests, with their block table.
        requests: ``[rows]`` what is known of each; None for one without video, and for padding.
        block_size: tokens in a KV block, which is a cube's volume.
        dense_below: tiles with fewer candidates attend to all of them.
        cube_queries: tokens of a cube whose probabilities decide.
        tile_cubes: neighbouring cubes that are one VIDEO tile.
        device: where the layers run.
    """
    spans = list(zip(requests, rows.computed.tolist(), rows.seq_lens.tolist(), strict=True))
    if not any(request is not None and stop > start for request, start, stop in spans):
        return None
    size = block_size
    counted = dict(
        video_tokens=np.array([0 if r is None else r.video_among(a, b) for r, a, b in spans]),
        cubes_seen=np.array([0 if r is None else r.cubes_seen(a, b) for r, a, b in spans]),
        block_size=size,
    )
    requests = [r if r is not None and b > a and r.leaves_out else None for r, a, b in spans]
    if all(request is None for request in requests):
        return StepPlan(attention=None, ffn=None, summary_writes=None, **counted)
    row_cubes, in_prompt = cubes_of(rows, requests, size)
    table = rows.block_table[:, : row_cubes.shape[1]]
    settings = RowSettings.of_rows(requests)

    tokens = Tokens.of(rows, requests, row_cubes, in_prompt, size)
    may_choose = _may_choose(tokens, settings, dense_below)
    text, too_long = _text_that_chooses(tokens, requests, settings, may_choose)
    offsets = spread_tokens(size, cube_queries)  # of the tokens of a cube that are scored
    scored = np.where(settings.rule == UNIFORM, 0, len(offsets))  # it looks at no score
    tiles = cut_tiles(tokens, row_cubes, may_choose, text, size, scored, tile_cubes)
    number = len(requests)
    return StepPlan(
        attention=_attention_plan(
            rows, tokens, tiles, table, row_cubes, settings, may_choose, offsets, size, device
        ),
        ffn=_ffn_plan(tokens, settings, size, device),
        summary_writes=summary_writes(tokens, settings.attention_share < 1, table, size, device),
        **counted,
        fallback_tokens=_fallbacks(tokens, settings, may_choose, too_long, number),
    )


def _fallbacks(
    tokens: Tokens,
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


def _may_choose(tokens: Tokens, settings: RowSettings, dense_below: int) -> np.ndarray:
    """Tokens with enough cubes before them, and settings that may leave some out, ``[tokens]``."""
    sparse = settings.attention_share[tokens.row] < 1
    return sparse & (tokens.cubes_before >= max(dense_below, 1))


def _text_that_chooses(
    tokens: Tokens,
    requests: Sequence[AdaSparkRequest | None],
    settings: RowSettings,
    may_choose: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Text tokens that choose for themselves, and those that are too many to, ``[tokens]``.

    A prompt's text chooses or not whatever part of it is in the step.  Of an answer there are many
    tokens in a step only when it is computed again, after a preemption.
    """
    row = tokens.row
    prompt = np.array([0 if r is None else len(r.is_video) for r in requests])
    is_long = np.array([r is not None and r.is_long_text for r in requests])
    text = may_choose & ~tokens.is_video & settings.sparse_text[row]
    of_answer = text & (tokens.position >= prompt[row])
    answers = np.bincount(row[of_answer], minlength=len(requests))
    too_many = np.where(of_answer, (answers > MAX_TEXT_TILES)[row], is_long[row])
    return text & ~too_many, text & too_many


def _attention_plan(
    rows: StepRows,
    tokens: Tokens,
    tiles: Tiles,
    table: np.ndarray,
    row_cubes: np.ndarray,
    settings: RowSettings,
    may_choose: np.ndarray,
    offsets: np.ndarray,
    size: int,
    device: torch.device,
) -> AttentionPlan | None:
    sparse = np.flatnonzero(tiles.kind != DENSE)
    if not len(sparse):
        return None
    sparse_row = tiles.row[sparse]
    dense_layers = settings.dense_layers[sparse_row]

    def to(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(array).to(device=device, dtype=dtype)

    return AttentionPlan(
        **tile_fields(rows, tiles, table, device),
        first_layer=int(dense_layers.min()),
        jobs=_score_jobs(tiles, sparse, row_cubes, offsets, size, device),
        row_blocks=to(table, torch.int64),
        row_cubes=to(row_cubes, torch.bool),
        share=to(settings.attention_share[sparse_row], torch.float32),
        min_cubes=to(settings.min_cubes[sparse_row], torch.int64),
        rule=to(settings.rule[sparse_row], torch.int64),
        dense_layers=to(dense_layers, torch.int64),
        most_dense_layers=int(dense_layers.max()),
        rules=tuple(np.unique(settings.rule[sparse_row]).tolist()),
        budget=_attention_budget(tokens, tiles, sparse, settings, may_choose, size, device),
    )


def _attention_budget(
    tokens: Tokens,
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
    for r in np.unique(row[budgeted & (kind == VIDEO)]):
        video = np.flatnonzero((row == r) & (kind == VIDEO))
        # What a tile of two cubes keeps costs twice as much, so it counts twice.
        video = np.repeat(video, tiles.length[sparse[video]] // size)
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
    offsets: np.ndarray,
    size: int,
    device: torch.device,
) -> list[ScoreJob]:
    """Group the tokens of sparse tiles so that each job is a few dense matrix products.

    Tiles that score no token have none.  One job per row, kind and length; rows with a single text
    token (decode) share one job.  ``offsets``, in its block, are those of a cube's scored tokens.
    """
    jobs: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
    row = tiles.row[sparse]
    kind = np.where(tiles.scored[sparse] > 0, tiles.kind[sparse], DENSE)
    start = tiles.start[sparse]
    cubes = tiles.length[sparse] // size  # of a VIDEO tile
    own_block = tiles.block[sparse] - np.maximum(cubes - 1, 0)  # the first of its own
    alone = (kind == TEXT) & (np.bincount(row[kind == TEXT], minlength=len(row_cubes))[row] == 1)
    for r in np.unique(row[(kind != DENSE) & ~alone]):
        video = np.flatnonzero((row == r) & (kind == VIDEO))
        text = np.flatnonzero((row == r) & (kind == TEXT) & ~alone)
        for number in np.unique(cubes[video]):
            tile = video[cubes[video] == number]
            of_tile = (np.arange(number)[:, None] * size + offsets).flatten()
            tokens = start[tile, None] + of_tile
            jobs.append((VIDEO, np.array([r]), tokens.reshape(1, -1), tile[None]))
        if len(text):
            jobs.append((TEXT, np.array([r]), start[text][None], text[None]))
    if alone.any():
        tile = np.flatnonzero(alone)
        jobs.append((TEXT, row[tile], start[tile][:, None], tile[:, None]))
    made = []
    for job_kind, job_rows, tokens, tile_of in jobs:
        gaps = np.flatnonzero(~row_cubes[job_rows[0]]) if job_kind == VIDEO else np.empty(0, int)
        made.append(
            ScoreJob(
                kind=job_kind,
                row=torch.as_tensor(job_rows).to(device),
                tokens=torch.as_tensor(tokens).to(device),
                scored=tokens.shape[1] // tile_of.shape[1],
                tile_of=torch.as_tensor(tile_of).to(device),
                own_block=own_block[tile_of],
                limit=torch.as_tensor(own_block[tile_of]).to(device, torch.int32),
                gap_blocks=gaps.tolist(),
                gaps=torch.as_tensor(gaps).to(device),
            )
        )
    return made


def _ffn_plan(
    tokens: Tokens, settings: RowSettings, size: int, device: torch.device
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
    tokens: Tokens,
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
