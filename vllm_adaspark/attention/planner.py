"""Makes the plan of a step, on the host with NumPy: tokens to tiles, candidates, jobs, budgets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .. import tags
from ..config import COMPENSATIONS, SHARE_STEPS
from ..cubes import spread_tokens
from ..selection import UNIFORM, BudgetGroups
from .plan import (
    DENSE,
    FALLBACKS,
    TEXT,
    VIDEO,
    AttentionPlan,
    FFNPlan,
    ScoreJob,
    StepPlan,
    Tiles,
)
from .state import BlockTags, KeyWrites, StepRows

# A text token costs a kernel as much as a decode token.  Past so many of them in one request's
# chunk, attending densely in one tile is cheaper than choosing for each.
MAX_TEXT_TILES = 1024


def build_plan(
    rows: StepRows,
    words: np.ndarray,
    block_tags: BlockTags,
    *,
    dense_below: int,
    cube_queries: int,
    device: torch.device,
) -> StepPlan | None:
    """The plan of a step, or None when no video has anything to do with it.

    Args:
        rows: the step's requests.
        words: ``[tokens]`` tag words of the step's tokens.
        block_tags: block state; this step's tokens are recorded in it here.
        dense_below: tiles with fewer candidates attend to all of them.
        cube_queries: tokens of a VIDEO tile whose probabilities decide.
        device: where the layers run.
    """
    block_tags.write(rows, words)
    size = block_tags.block_size
    width = max(1, int(-(-rows.seq_lens.max(initial=1) // size)))
    table = rows.block_table[:, :width]
    in_use = np.arange(width) < -(-rows.seq_lens[:, None] // size)
    in_use &= (rows.query_lens > 0)[:, None]
    row_cubes = block_tags.is_cube[table] & in_use  # [rows, blocks]
    if not row_cubes.any() and not words.any():
        return None
    # A request's settings are those of its first cube; all its videos share them.
    first = row_cubes.argmax(axis=1)
    word = np.where(row_cubes.any(axis=1), block_tags.word[table[np.arange(len(table)), first]], 0)
    settings = tags.unpack(word)

    tokens = _Tokens.of(rows, words != 0, row_cubes, size)
    may_choose = _may_choose(tokens, settings, dense_below)
    text, too_long = _text_that_chooses(tokens, settings, may_choose, len(row_cubes))
    asking = spread_tokens(size, cube_queries)
    asked = np.where(settings.rule == UNIFORM, 0, len(asking))  # it looks at no score
    tiles = _tiles(tokens, row_cubes, may_choose, text, size, asked)
    return StepPlan(
        attention=_attention_plan(rows, tiles, table, row_cubes, settings, asking, device),
        ffn=_ffn_plan(tokens, settings, size, device),
        key_writes=_key_writes(tokens, table, size, device),
        video_tokens=np.bincount(tokens.row[tokens.is_video], minlength=len(word)),
        cubes_seen=np.bincount(tokens.row, tokens.cubes_before, minlength=len(word)),
        block_size=size,
        fallback_tokens=_fallbacks(rows, tokens, row_cubes, settings, may_choose, too_long, size),
    )


def _fallbacks(
    rows: StepRows,
    tokens: _Tokens,
    row_cubes: np.ndarray,
    settings: tags.Tags,
    may_choose: np.ndarray,
    too_long: np.ndarray,
    size: int,
) -> dict[str, np.ndarray]:
    """How many tokens of each row ran dense though their settings are sparse, by reason."""
    has_text = np.zeros(row_cubes.shape, bool)
    text = np.flatnonzero(~tokens.is_video)
    has_text[tokens.row[text], tokens.block[text]] = True
    part = np.flatnonzero(tokens.is_video & ~tokens.in_whole_cube)
    row = tokens.row[part]
    sparse = may_choose[part] | (settings.ffn_share[row] < SHARE_STEPS)
    part, row = part[sparse], row[sparse]
    block = tokens.block[part]
    # Of a block that is not full yet only this step's part is known; that is a cube's part if no
    # text is in it.
    complete = (block + 1) * size <= rows.seq_lens[row]
    mixed = np.where(complete, ~row_cubes[row, block], has_text[row, block])
    by_reason = (row[~mixed], row[mixed], tokens.row[too_long])
    return {
        reason: np.bincount(rows_of, minlength=len(row_cubes))
        for reason, rows_of in zip(FALLBACKS, by_reason, strict=True)
    }


@dataclass(frozen=True)
class _Tokens:
    """Facts per token of the step."""

    row: np.ndarray
    position: np.ndarray  # in its request
    block: np.ndarray  # logical block
    is_video: np.ndarray
    cubes_before: np.ndarray  # complete cubes before its own block
    whole_cubes: np.ndarray  # [cubes] first token of each cube that is wholly in the step
    in_whole_cube: np.ndarray

    @classmethod
    def of(cls, rows: StepRows, is_video: np.ndarray, row_cubes: np.ndarray, size: int) -> _Tokens:
        row, position = rows.token_row, rows.token_position
        block = position // size
        fits = position + size <= rows.seq_lens[row]
        whole = np.flatnonzero((position % size == 0) & fits & row_cubes[row, block])
        in_whole = np.zeros(len(row), bool)
        in_whole[whole[:, None] + np.arange(size)] = True
        before = np.cumsum(row_cubes, axis=1) - row_cubes
        return cls(row, position, block, is_video, before[row, block], whole, in_whole)


def _may_choose(tokens: _Tokens, settings: tags.Tags, dense_below: int) -> np.ndarray:
    """Tokens with enough cubes before them, and settings that may leave some out, ``[tokens]``."""
    sparse = settings.attn_share[tokens.row] < SHARE_STEPS
    return sparse & (tokens.cubes_before >= max(dense_below, 1))


def _text_that_chooses(
    tokens: _Tokens, settings: tags.Tags, may_choose: np.ndarray, num_rows: int
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
    tiles: Tiles,
    table: np.ndarray,
    row_cubes: np.ndarray,
    settings: tags.Tags,
    asking: np.ndarray,
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
        share=to(settings.attn_share[sparse_row] / SHARE_STEPS, torch.float32),
        min_cubes=to(settings.min_cubes[sparse_row], torch.int64),
        rule=to(settings.rule[sparse_row], torch.int64),
        dense_layers=to(dense_layers, torch.int64),
        rules=tuple(np.unique(settings.rule[sparse_row]).tolist()),
        budget=_attention_budget(tiles, sparse, settings, device),
        dense_layers_range=(int(dense_layers.min()), int(dense_layers.max())),
        max_query_len=int(tiles.length.max()),
        max_seq_len=int(rows.seq_lens.max()),
        num_tokens=int(rows.query_start[-1]),
    )


def _attention_budget(
    tiles: Tiles, sparse: np.ndarray, settings: tags.Tags, device: torch.device
) -> tuple[BudgetGroups, ...]:
    """A request's video tiles of a step share one p; each text token has its own."""
    row, kind = tiles.row[sparse], tiles.kind[sparse]
    budgeted = settings.rule[row] == tags.BUDGET
    if not budgeted.any():
        return ()
    keep = tiles.candidates[sparse].sum(axis=1) * settings.attn_share[row] / SHARE_STEPS
    groups = []
    for r in np.unique(row[budgeted]):
        video = np.flatnonzero((row == r) & (kind == VIDEO))
        if len(video):
            groups.append(BudgetGroups.of(video[None], keep[video].sum(keepdims=True), device))
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

    Tiles that ask no token have none.  One job per row and kind; rows with a single text token (decode) share one job.  ``asking`` are
    the tokens of a VIDEO tile that are asked, as offsets in its block.
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
    tokens: _Tokens, settings: tags.Tags, size: int, device: torch.device
) -> FFNPlan | None:
    first = tokens.whole_cubes
    first = first[settings.ffn_share[tokens.row[first]] < SHARE_STEPS]
    if not len(first):
        return None
    row = tokens.row[first]
    dense_layers = settings.dense_layers[row]
    compensation = settings.compensation[row]
    by_budget = settings.rule[row] == tags.BUDGET
    keep = size * settings.ffn_share[row] / SHARE_STEPS
    of_request = [np.flatnonzero(row == r) for r in np.unique(row[by_budget])]
    return FFNPlan(
        tokens=torch.as_tensor(first[:, None] + np.arange(size)).to(device),
        share=torch.as_tensor(settings.ffn_share[row] / SHARE_STEPS).to(device, torch.float32),
        importance=torch.as_tensor(settings.importance[row]).to(device),
        importances=tuple(np.unique(settings.importance[row]).tolist()),
        compensation=torch.as_tensor(compensation).to(device),
        compensations=tuple(np.unique(compensation).tolist()),
        by_budget=torch.as_tensor(by_budget).to(device),
        budget=tuple(
            BudgetGroups.of(cubes[None], keep[cubes].sum(keepdims=True), device)
            for cubes in of_request
        ),
        dense_layers=torch.as_tensor(dense_layers).to(device),
        row=row,
        extra=(compensation == COMPENSATIONS.index("centroid")).astype(int),
        dense_layers_range=(int(dense_layers.min()), int(dense_layers.max())),
    )


def _key_writes(tokens: _Tokens, table: np.ndarray, size: int, device: torch.device) -> KeyWrites:
    def to(array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.ascontiguousarray(array)).to(device, torch.int64)

    whole_tokens = whole_blocks = part_tokens = part_blocks = fresh = None
    first = tokens.whole_cubes
    if len(first):
        whole_tokens = slice(int(first[0]), int(first[-1]) + size)
        if (np.diff(first) != size).any():
            whole_tokens = to((first[:, None] + np.arange(size)).reshape(-1))
        whole_blocks = to(table[tokens.row[first], tokens.block[first]])
    part = np.flatnonzero(tokens.is_video & ~tokens.in_whole_cube)
    if len(part):
        block = table[tokens.row[part], tokens.block[part]]
        part_tokens, part_blocks = to(part), to(block)
        fresh = to(block[tokens.position[part] % size == 0])
    return KeyWrites(whole_tokens, whole_blocks, part_tokens, part_blocks, fresh)
