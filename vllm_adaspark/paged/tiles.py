"""A step cut into query tiles, whose tokens attend to the same KV blocks.

There are three kinds:

* ``VIDEO``: a complete cube, all of it in this step; or a method's number of neighbouring ones.
* ``TEXT``: one token that is not video: question, answer, decode.
* ``DENSE``: a run of tokens that attend to everything.  A chunk edge inside a cube may thus only
  make more be computed.

A tile's *candidates* are the cubes before its own blocks, of which a method keeps some.  All other
blocks up to and including its own are always attended: blocks that hold text, and the own blocks.
Which tokens are tiles is the method's to say; what follows from it, for tables and counts, is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..requests import Request
from .scratch import Scratch
from .state import StepRows, SummaryWrites

DENSE, VIDEO, TEXT = range(3)


@dataclass(frozen=True)
class Tiles:
    """Host facts of the step's tiles, in token order; together they cover every token once."""

    row: np.ndarray  # [tiles]
    start: np.ndarray  # [tiles] first token in the step
    length: np.ndarray  # [tiles] tokens
    block: np.ndarray  # [tiles] logical index of the last block it touches
    kind: np.ndarray  # [tiles] DENSE, VIDEO or TEXT
    scored: np.ndarray  # [tiles] tokens of it that are scored against the candidates, for the FLOPs
    tail_gap: np.ndarray  # [tiles] slots of the last block after the tile's last token
    candidates: np.ndarray  # [tiles, blocks] bool, all false for DENSE

    def __len__(self) -> int:
        return len(self.row)


@dataclass(kw_only=True)
class TilePlan:
    """What every layer needs to make block tables from a choice; tensors on the device.

    *Sparse* tiles are those that are not DENSE.
    """

    tiles: Tiles
    sparse_tiles: torch.Tensor  # [sparse] int64, index of each sparse tile
    sparse_of: torch.Tensor  # [tiles] int32, the reverse; -1 for DENSE ones
    candidates: torch.Tensor  # [sparse, blocks] bool
    always: torch.Tensor  # [tiles, blocks] bool: attended without being chosen
    blocks: torch.Tensor  # [tiles, blocks] int32 physical blocks
    tail_gap: torch.Tensor  # [tiles] int32
    query_start: torch.Tensor  # [tiles + 1] int32
    max_query_len: int
    max_seq_len: int
    num_tokens: int
    first_layer: int = 0  # layers below it are dense
    shared: Any = None  # what the adapter's first layer made for all of them
    scratch: Scratch = field(default_factory=Scratch)  # for choosing and for tables


def tile_fields(
    rows: StepRows, tiles: Tiles, table: np.ndarray, device: torch.device
) -> dict[str, Any]:
    """The fields of a :class:`TilePlan`, for a method's own plan to be made with.

    Args:
        rows: the step's requests.
        tiles: at least one of them sparse.
        table: ``[rows, blocks]`` physical blocks.
        device: where the layers run.
    """
    sparse = np.flatnonzero(tiles.kind != DENSE)
    sparse_of = np.full(len(tiles), -1)
    sparse_of[sparse] = np.arange(len(sparse))
    up_to_own = np.arange(table.shape[1]) <= tiles.block[:, None]

    def to(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(array).to(device=device, dtype=dtype)

    return dict(
        tiles=tiles,
        sparse_tiles=to(sparse, torch.int64),
        sparse_of=to(sparse_of, torch.int32),
        candidates=to(tiles.candidates[sparse], torch.bool),
        always=to(up_to_own & ~tiles.candidates, torch.bool),
        blocks=to(table[tiles.row], torch.int32),
        tail_gap=to(tiles.tail_gap, torch.int32),
        query_start=to(np.append(tiles.start, rows.query_start[-1]), torch.int32),
        max_query_len=int(tiles.length.max()),
        max_seq_len=int(rows.seq_lens.max()),
        num_tokens=int(rows.query_start[-1]),
    )


def by_cube(tiles: Tiles, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tiles, those of several cubes cut into one part for each.

    Returns:
        ``[parts]`` each: which tile it is of, its first token in the step, its tokens.
    """
    parts = np.where(tiles.kind == DENSE, 1, -(-tiles.length // size))
    tile = np.repeat(np.arange(len(tiles)), parts)
    nth = np.arange(len(tile)) - np.repeat(np.cumsum(parts) - parts, parts)
    return tile, tiles.start[tile] + nth * size, tiles.length[tile] // parts[tile]


def cubes_of(
    rows: StepRows, requests: Sequence[Request | None], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """``[rows, blocks]`` bool each: the cubes there are once the step is done, and those there will
    be once the prompt is."""
    width = max(1, int(-(-rows.seq_lens.max(initial=1) // size)))
    in_prompt = _cubes_of_prompts(requests, width)
    return in_prompt & (np.arange(width) < rows.seq_lens[:, None] // size), in_prompt


def _cubes_of_prompts(requests: Sequence[Request | None], width: int) -> np.ndarray:
    """``[rows, blocks]`` bool: the cubes of each prompt, whether computed yet or not."""
    cubes = np.zeros((len(requests), width), bool)
    for row, request in enumerate(requests):
        if request is not None:
            of_row = request.is_cube[:width]
            cubes[row, : len(of_row)] = of_row
    return cubes


def _of_tokens(
    rows: StepRows, requests: Sequence[Request | None], fact: Callable[[Request], np.ndarray]
) -> np.ndarray:
    """``[tokens]`` bool: a request's ``fact`` of its prompt's tokens, for the step's tokens."""
    of_step = np.zeros(int(rows.query_start[-1]), bool)
    for row, request in enumerate(requests):
        if request is not None:
            done = int(rows.computed[row])
            of_row = fact(request)[done : done + int(rows.query_lens[row])]
            first = int(rows.query_start[row])
            of_step[first : first + len(of_row)] = of_row
    return of_step


@dataclass(frozen=True)
class Tokens:
    """Facts per token of the step."""

    row: np.ndarray
    position: np.ndarray  # in its request
    block: np.ndarray  # logical block
    is_video: np.ndarray
    opens_block: np.ndarray  # the first video token of its block
    of_cube: np.ndarray  # its block is a cube, computed in full once the prompt is
    cubes_before: np.ndarray  # complete cubes before its own block
    whole_cubes: np.ndarray  # [cubes] first token of each cube that is wholly in the step
    in_whole_cube: np.ndarray

    @classmethod
    def of(
        cls,
        rows: StepRows,
        requests: Sequence[Request | None],
        row_cubes: np.ndarray,
        in_prompt: np.ndarray,
        size: int,
    ) -> Tokens:
        """From the step's rows; ``row_cubes`` and ``in_prompt`` as :func:`cubes_of` gives them."""
        is_video = _of_tokens(rows, requests, lambda request: request.is_video)
        opens = _of_tokens(rows, requests, lambda request: request.opens_block)
        row, position = rows.token_row, rows.token_position
        block = position // size
        whole = np.flatnonzero((position % size == 0) & row_cubes[row, block])
        in_whole = np.zeros(len(row), bool)
        in_whole[whole[:, None] + np.arange(size)] = True
        before = np.cumsum(row_cubes, axis=1) - row_cubes
        of_cube = in_prompt[row, block]
        return cls(
            row, position, block, is_video, opens, of_cube, before[row, block], whole, in_whole
        )

    @property
    def cut(self) -> np.ndarray:
        """Tokens of cubes that a chunk edge cuts."""
        return self.of_cube & ~self.in_whole_cube


def cut_tiles(
    tokens: Tokens,
    row_cubes: np.ndarray,
    video: np.ndarray,
    text: np.ndarray,
    size: int,
    scored: np.ndarray,
    tile_cubes: int = 1,
) -> Tiles:
    """Cut the step into tiles.

    Args:
        tokens: of the step.
        row_cubes: ``[rows, blocks]`` bool, the cubes there are once the step is done.
        video: ``[tokens]`` bool, tokens whose cube may be a VIDEO tile, if it is whole.
        text: ``[tokens]`` bool, text tokens that are a TEXT tile each.
        size: tokens in a KV block.
        scored: ``[rows]`` tokens of a cube that are scored, 0 in rows that score none.
        tile_cubes: how many cubes may be one VIDEO tile.  They are blocks ``n * tile_cubes`` and
            what follows of a request, so that where a chunk begins does not decide who is paired.
            Where one of them may not choose in this step, the others are a tile without it.
    """
    row = tokens.row
    kind = np.where(video & tokens.in_whole_cube, VIDEO, np.where(text, TEXT, DENSE))

    opens = np.diff(row, prepend=-1) != 0
    opens |= np.diff(kind, prepend=-1) != 0
    opens |= kind == TEXT
    opens |= (kind == VIDEO) & (tokens.position % (size * tile_cubes) == 0)
    start = np.flatnonzero(opens)
    length = np.diff(start, append=len(row))
    last = start + length - 1
    block = tokens.block[last]
    kind, row = kind[start], row[start]
    first_block = tokens.block[start]
    candidates = row_cubes[row] & (np.arange(row_cubes.shape[1]) < first_block[:, None])
    candidates &= (kind != DENSE)[:, None]
    tail_gap = (block + 1) * size - tokens.position[last] - 1
    of_cubes = scored[row] * (length // size)
    scored = np.select([kind == VIDEO, kind == TEXT], [of_cubes, np.minimum(scored[row], 1)], 0)
    return Tiles(row, start, length, block, kind, scored, tail_gap, candidates)


def summary_writes(
    tokens: Tokens, wanted: np.ndarray, table: np.ndarray, size: int, device: torch.device
) -> SummaryWrites:
    """Which of the step's tokens are summed: the video tokens of cubes.

    Args:
        tokens: of the step.
        wanted: ``[rows]`` bool, rows in which a query may have to choose by sums.
        table: ``[rows, blocks]`` physical blocks.
        size: tokens in a KV block.
        device: where the layers run.
    """

    def to(array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.ascontiguousarray(array)).to(device, torch.int64)

    whole_tokens = whole_blocks = part_tokens = part_blocks = fresh = None
    first = tokens.whole_cubes
    first = first[wanted[tokens.row[first]]]
    all_video = tokens.is_video[first[:, None] + np.arange(size)].all(axis=1)
    first = first[all_video]
    at_once = np.zeros(len(tokens.row), bool)
    at_once[first[:, None] + np.arange(size)] = True
    if len(first):
        whole_tokens = slice(int(first[0]), int(first[-1]) + size)
        if (np.diff(first) != size).any():
            whole_tokens = to((first[:, None] + np.arange(size)).reshape(-1))
        whole_blocks = to(table[tokens.row[first], tokens.block[first]])
    part = np.flatnonzero(tokens.of_cube & tokens.is_video & ~at_once & wanted[tokens.row])
    if len(part):
        block = table[tokens.row[part], tokens.block[part]]
        part_tokens, part_blocks = to(part), to(block)
        fresh = to(block[tokens.opens_block[part]])
    return SummaryWrites(whole_tokens, whole_blocks, part_tokens, part_blocks, fresh)
