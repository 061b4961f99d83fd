"""The per-step plan: query tiles, their candidate cubes, and whole cubes for the FFN.

Built once per step on the host with NumPy, then used by every layer.  A *query tile* is the tokens
of one KV block in this step; a decode token is a tile of one.  Four kinds:

* ``VIDEO``: a complete cube, all of it in this step.  Its tokens choose cubes together.
* ``TEXT``: at least one token is not video.  It takes the union of its tokens' choices.
* ``CUT``: a cube that a chunk edge cuts.  It attends to everything: a chunk edge may only ever
  make more be computed.
* ``SPAN``: all of a request's tokens, when none of its tiles would leave anything out (no video,
  p >= 1, too few cubes).  Dense, and as cheap as the stock kernel.

A tile's *candidates* are the cubes before its own block.  All other blocks up to and including its
own are always attended: anchor blocks (any token that is not video) and the own block.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from .. import tags
from ..config import SHARE_STEPS
from .state import BlockTags, KeyWrites, StepRows

VIDEO, TEXT, CUT, SPAN = range(4)


@dataclass(frozen=True)
class Tiles:
    """Host facts of the step's tiles, in token order; together they cover every token once."""

    row: np.ndarray  # [tiles]
    start: np.ndarray  # [tiles] first token in the step
    length: np.ndarray  # [tiles] tokens
    block: np.ndarray  # [tiles] logical index of the last block it touches
    kind: np.ndarray  # [tiles] VIDEO, TEXT, CUT or SPAN
    sparse: np.ndarray  # [tiles] bool: may leave candidates out
    tail_gap: np.ndarray  # [tiles] slots of the last block after the tile's last token
    candidates: np.ndarray  # [tiles, blocks] bool, all false unless sparse
    preceding: np.ndarray  # [tiles] cubes before its own block, chosen or not

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class ScoreJob:
    """Queries scored together: the same number of tokens from each of some rows.

    ``tile_of[i, j]`` indexes the sparse tiles (not all tiles).  In a VIDEO job the tokens of a
    tile are consecutive and ``tile_of`` is per tile, ``[rows, tokens / block_size]``.
    """

    kind: int
    row: torch.Tensor  # [rows] int64
    tokens: torch.Tensor  # [rows, tokens] int64, index into the step
    tile_of: torch.Tensor  # [rows, tokens] or [rows, tiles] int64
    own_block: np.ndarray  # [rows, tokens] or [rows, tiles], host: candidates lie below it
    first_token: int | None  # if all tokens are consecutive: the first


@dataclass(frozen=True)
class AttentionPlan:
    """What every layer needs to choose cubes and build tables; tensors on the device.

    Its ``tiles`` are the step's, but a row in which no tile is sparse is one SPAN tile.
    """

    tiles: Tiles
    jobs: list[ScoreJob]
    sparse_tiles: torch.Tensor  # [sparse] int64, index of each sparse tile
    candidates: torch.Tensor  # [sparse, blocks] bool
    always: torch.Tensor  # [tiles, blocks] bool: attended without being chosen
    blocks: torch.Tensor  # [tiles, blocks] int32 physical blocks
    row_blocks: torch.Tensor  # [rows, blocks] int64 physical blocks
    tail_gap: torch.Tensor  # [tiles] int32
    query_start: torch.Tensor  # [tiles + 1] int32
    share: torch.Tensor  # [sparse] fp32
    min_cubes: torch.Tensor  # [sparse] int64
    rule: torch.Tensor  # [sparse] int64
    dense_layers: torch.Tensor  # [sparse] int64
    rules: tuple[int, ...]  # the selection rules that occur
    dense_layers_range: tuple[int, int]  # lowest and highest over the sparse tiles
    max_query_len: int
    max_seq_len: int
    num_tokens: int
    cache: dict = field(default_factory=dict)  # what the first layer derives for the others


@dataclass(frozen=True)
class FFNPlan:
    """Cubes that lie wholly in this step and may skip tokens; tensors on the device."""

    tokens: torch.Tensor  # [cubes, block_size] int64, index into the step
    share: torch.Tensor  # [cubes] fp32
    mean: torch.Tensor  # [cubes] bool: mean compensation, else bypass
    dense_layers: torch.Tensor  # [cubes] int64
    row: np.ndarray  # [cubes], host
    dense_layers_range: tuple[int, int]


@dataclass
class StepPlan:
    """Everything the layers share in one step, and the counts they leave behind."""

    rows: StepRows
    tiles: Tiles
    attention: AttentionPlan | None
    ffn: FFNPlan | None
    key_writes: KeyWrites
    row_cubes: np.ndarray  # [rows] complete cubes of each request so far
    row_video_tokens: np.ndarray  # [rows] video tokens in this step
    block_size: int
    kept_blocks: dict[int, torch.Tensor] = field(default_factory=dict)  # layer: [kv_heads, tiles]
    ffn_active: dict[int, torch.Tensor] = field(default_factory=dict)  # layer: [cubes]


def build_plan(
    rows: StepRows,
    words: np.ndarray,
    block_tags: BlockTags,
    *,
    dense_below: int,
    device: torch.device,
) -> StepPlan | None:
    """The plan of a step, or None when no video has anything to do with it.

    Args:
        rows: the step's requests.
        words: ``[tokens]`` tag words of the step's tokens.
        block_tags: block state; this step's tokens are recorded in it here.
        dense_below: tiles with fewer candidates attend to all of them.
        device: where the layers run.
    """
    block_tags.write(rows, words)
    if not block_tags.any_video:
        return None
    size = block_tags.block_size
    width = max(1, int(-(-rows.seq_lens.max(initial=1) // size)))
    table = rows.block_table[:, :width]
    in_use = np.arange(width) < -(-rows.seq_lens[:, None] // size)
    row_cubes = block_tags.is_cube[table] & in_use & (rows.query_lens > 0)[:, None]  # [rows, blocks]
    if not row_cubes.any() and not words.any():
        return None
    # A request's settings are those of its first cube; all its videos share them.
    first = row_cubes.argmax(axis=1)
    word = np.where(row_cubes.any(axis=1), block_tags.word[table[np.arange(len(table)), first]], 0)
    settings = tags.unpack(word)

    tiles = _tiles(rows, words != 0, row_cubes, settings, size, dense_below)
    whole = tiles.kind == VIDEO
    row_of_token = np.repeat(np.arange(len(word)), rows.query_lens)
    return StepPlan(
        rows=rows,
        tiles=tiles,
        attention=_attention_plan(rows, tiles, table, settings, size, device),
        ffn=_ffn_plan(tiles, whole, settings, size, device),
        key_writes=_key_writes(tiles, whole, table, size, device),
        row_cubes=row_cubes.sum(axis=1),
        row_video_tokens=np.bincount(row_of_token[words != 0], minlength=len(word)),
        block_size=size,
    )


def _tiles(
    rows: StepRows,
    is_video: np.ndarray,
    row_cubes: np.ndarray,
    settings: tags.Tags,
    size: int,
    dense_below: int,
) -> Tiles:
    """Cut the step into tiles and classify them."""
    lens, computed, seq_lens = rows.query_lens, rows.computed, rows.seq_lens
    first_block = computed // size
    last_block = np.maximum(seq_lens - 1, 0) // size
    # Rows without video tokens or cubes need no tiling at all.
    has_video = np.zeros(len(lens), bool)
    has_video[np.repeat(np.arange(len(lens)), lens)[is_video]] = True
    tiled = (row_cubes.any(axis=1) | has_video) & (lens > 0)
    row, start, length, block = _cut(rows, tiled, first_block, last_block, size)

    video = np.add.reduceat(is_video, start) if len(start) else np.zeros(0, int)
    own_is_cube = row_cubes[row, block]
    kind = np.where(own_is_cube & (length == size), VIDEO, np.where(video < length, TEXT, CUT))
    kind[~tiled[row]] = SPAN
    before = np.arange(row_cubes.shape[1]) < block[:, None]
    candidates = row_cubes[row] & before  # [tiles, blocks]
    sparse = (
        (candidates.sum(axis=1) >= max(dense_below, 1))
        & (settings.attn_share[row] < SHARE_STEPS)
        & ((kind == VIDEO) | (kind == TEXT) & settings.sparse_text[row])
    )
    preceding = candidates.sum(axis=1)
    candidates &= sparse[:, None]
    end = np.repeat(computed - rows.query_start[:-1], lens)[start] + start + length
    tail_gap = (block + 1) * size - end
    return Tiles(row, start, length, block, kind, sparse, tail_gap, candidates, preceding)


def _cut(
    rows: StepRows,
    tiled: np.ndarray,
    first_block: np.ndarray,
    last_block: np.ndarray,
    size: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(row, start, length, block) of every tile; rows that are not ``tiled`` are one tile."""
    count = np.where(tiled, last_block - first_block + 1, 1)
    count[rows.query_lens == 0] = 0
    row = np.repeat(np.arange(len(count)), count)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    block = np.where(tiled[row], first_block[row] + nth, last_block[row])
    begin = np.where(tiled[row], np.maximum(rows.computed[row], block * size), rows.computed[row])
    end = np.where(tiled[row], np.minimum((block + 1) * size, rows.seq_lens[row]), rows.seq_lens[row])
    start = begin - rows.computed[row] + rows.query_start[row]
    return row, start, end - begin, block


def _attention_plan(
    rows: StepRows,
    tiles: Tiles,
    table: np.ndarray,
    settings: tags.Tags,
    size: int,
    device: torch.device,
) -> AttentionPlan | None:
    if not tiles.sparse.any():
        return None
    tiles = _merge_dense_rows(rows, tiles)
    sparse = np.flatnonzero(tiles.sparse)
    sparse_row = tiles.row[sparse]
    up_to_own = np.arange(table.shape[1]) <= tiles.block[:, None]
    dense_layers = settings.dense_layers[sparse_row]

    def to(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(array).to(device=device, dtype=dtype)

    return AttentionPlan(
        tiles=tiles,
        jobs=_score_jobs(tiles, sparse, size, device),
        sparse_tiles=to(sparse, torch.int64),
        candidates=to(tiles.candidates[sparse], torch.bool),
        always=to(up_to_own & ~tiles.candidates, torch.bool),
        blocks=to(table[tiles.row], torch.int32),
        row_blocks=to(table, torch.int64),
        tail_gap=to(tiles.tail_gap, torch.int32),
        query_start=to(np.append(tiles.start, rows.query_start[-1]), torch.int32),
        share=to(settings.attn_share[sparse_row] / SHARE_STEPS, torch.float32),
        min_cubes=to(settings.min_cubes[sparse_row], torch.int64),
        rule=to(settings.rule[sparse_row], torch.int64),
        dense_layers=to(dense_layers, torch.int64),
        rules=tuple(np.unique(settings.rule[sparse_row]).tolist()),
        dense_layers_range=(int(dense_layers.min()), int(dense_layers.max())),
        max_query_len=int(tiles.length.max()),
        max_seq_len=int(rows.seq_lens.max()),
        num_tokens=int(rows.query_start[-1]),
    )


def _merge_dense_rows(rows: StepRows, tiles: Tiles) -> Tiles:
    """The tiles with every row that has no sparse tile made one SPAN tile."""
    has_sparse = np.zeros(len(rows.seq_lens), bool)
    has_sparse[tiles.row[tiles.sparse]] = True
    opens_row = np.diff(tiles.row, prepend=-1) != 0
    kept = np.flatnonzero(has_sparse[tiles.row] | opens_row)
    row = tiles.row[kept]
    span = ~has_sparse[row]
    last = np.searchsorted(tiles.row, row, side="right") - 1  # last tile of the same row
    from_last = np.where(span, last, kept)
    return Tiles(
        row=row,
        start=tiles.start[kept],
        length=np.where(span, rows.query_lens[row], tiles.length[kept]),
        block=tiles.block[from_last],
        kind=np.where(span, SPAN, tiles.kind[kept]),
        sparse=tiles.sparse[kept],
        tail_gap=tiles.tail_gap[from_last],
        candidates=tiles.candidates[kept],
        preceding=tiles.preceding[from_last],
    )


def _score_jobs(
    tiles: Tiles, sparse: np.ndarray, size: int, device: torch.device
) -> list[ScoreJob]:
    """Group the sparse tiles' tokens so that each job is a few dense matrix products.

    One job per row and kind; rows with a single query token (decode) share one job.
    """
    jobs: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []
    row, kind = tiles.row[sparse], tiles.kind[sparse]
    singles = []
    for r in np.unique(row):
        video = np.flatnonzero((row == r) & (kind == VIDEO))
        text = np.flatnonzero((row == r) & (kind == TEXT))
        if len(video):
            tokens = tiles.start[sparse[video], None] + np.arange(size)
            jobs.append((VIDEO, np.array([r]), tokens.reshape(1, -1), video[None]))
        if len(text):
            tokens, tile_of = _ranges(tiles.start[sparse[text]], tiles.length[sparse[text]])
            if len(tokens) == 1:
                singles.append((r, tokens[0], text[0]))
            else:
                jobs.append((TEXT, np.array([r]), tokens[None], text[tile_of][None]))
    if singles:
        single_rows, tokens, tile = (np.array(column) for column in zip(*singles, strict=True))
        jobs.append((TEXT, single_rows, tokens[:, None], tile[:, None]))
    return [
        ScoreJob(
            kind=job_kind,
            row=torch.as_tensor(job_rows).to(device),
            tokens=torch.as_tensor(tokens).to(device),
            tile_of=torch.as_tensor(tile_of).to(device),
            own_block=tiles.block[sparse[tile_of]],
            first_token=int(tokens[0, 0]) if (np.diff(tokens.ravel()) == 1).all() else None,
        )
        for job_kind, job_rows, tokens, tile_of in jobs
    ]


def _ranges(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All integers of the ranges [start, start + length), and which range each is in."""
    which = np.repeat(np.arange(len(start)), length)
    before = np.repeat(np.cumsum(length) - length, length)
    return start[which] + np.arange(len(which)) - before, which


def _ffn_plan(
    tiles: Tiles, whole: np.ndarray, settings: tags.Tags, size: int, device: torch.device
) -> FFNPlan | None:
    cubes = np.flatnonzero(whole & (settings.ffn_share[tiles.row] < SHARE_STEPS))
    if not len(cubes):
        return None
    row = tiles.row[cubes]
    dense_layers = settings.dense_layers[row]
    return FFNPlan(
        tokens=torch.as_tensor(tiles.start[cubes, None] + np.arange(size)).to(device),
        share=torch.as_tensor(settings.ffn_share[row] / SHARE_STEPS).to(device, torch.float32),
        mean=torch.as_tensor(settings.mean_compensation[row]).to(device),
        dense_layers=torch.as_tensor(dense_layers).to(device),
        row=row,
        dense_layers_range=(int(dense_layers.min()), int(dense_layers.max())),
    )


def _key_writes(
    tiles: Tiles, whole: np.ndarray, table: np.ndarray, size: int, device: torch.device
) -> KeyWrites:
    def to(array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.ascontiguousarray(array)).to(device, torch.int64)

    physical = table[tiles.row, tiles.block]
    whole_tokens = whole_blocks = part_tokens = part_blocks = fresh = None
    if whole.any():
        whole_tokens = to((tiles.start[whole, None] + np.arange(size)).reshape(-1))
        whole_blocks = to(physical[whole])
    part = tiles.kind == CUT
    if part.any():
        tokens, which = _ranges(tiles.start[part], tiles.length[part])
        part_tokens, part_blocks = to(tokens), to(physical[part][which])
        starts_block = tiles.tail_gap[part] + tiles.length[part] == size
        fresh = to(physical[part][starts_block])
    return KeyWrites(whole_tokens, whole_blocks, part_tokens, part_blocks, fresh)
