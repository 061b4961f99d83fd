"""The plan of a step, made on the host from what the engine knows of its requests.

All three branches are laid out here as sequences for the paged kernel; only which blocks a token
selects is left for the layers.  How many it selects is known: as many as there are, up to
``block_counts - 1``, and its own.

* *Text* tokens, and all tokens of rows without vision, attend densely: consecutive ones are one
  sequence.
* Consecutive *vision* tokens are one sequence for the window.
* For the selection, each vision token and KV head is a sequence of one query, whose table a layer
  fills in.

A *cube* is a KV block that holds vision tokens, some or all of them.  Only cubes are compressed
and selected, by the means of their vision tokens; a vision token's own block is attended in any
case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from ...accounts.flops import ModelShape
from ...paged.plan import StepPlan, Told
from ...paged.scratch import Scratch
from ...paged.state import StepRows
from ...paged.tables import Sequences
from ...paged.tiles import DENSE, VIDEO, Tiles, Tokens, cubes_of, summary_writes
from . import gates
from .request import VideoNSARequest
from .settings import BLOCK

Index = torch.Tensor | slice  # of tokens; a slice where they are consecutive, which saves a copy


@dataclass(frozen=True)
class RowCubes:
    """The cubes of one request, and which of them each of its vision tokens may look at."""

    row: int
    tokens: slice  # of the step's vision tokens
    cubes: torch.Tensor  # [cubes] int64 physical blocks, in the request's order
    logical: torch.Tensor  # [cubes] int64 the same in the request
    sizes: torch.Tensor  # [cubes] fp32 vision tokens in each
    seen: np.ndarray  # [tokens] cubes before a token's own block; never falls
    seen_there: torch.Tensor  # the same on the device, int64
    most: int  # block_counts - 1


@dataclass(frozen=True)
class Window:
    """Vision tokens whose windows are equally long."""

    size: int
    tokens: Index  # of the step's vision tokens
    sequences: Sequences


@dataclass
class BranchPlan:
    """What every layer needs, and on the host ``[rows]`` counts for the accounts."""

    text: Index | None  # tokens of the step that attend densely
    text_sequences: Sequences | None
    vision: Index  # tokens of the step that run the branches
    vision_row: torch.Tensor  # [vision] int64 row of each
    number: int  # of vision tokens
    rows: tuple[RowCubes, ...]
    windows: tuple[Window, ...]
    own_block: torch.Tensor  # [vision] int64 physical block of each
    places: torch.Tensor  # [vision] int64 cubes that each selects
    selected_lens: torch.Tensor  # [vision] int32 keys of the selection
    most_places: int
    text_pairs: np.ndarray  # (query, key) pairs of text
    cmp_pairs: np.ndarray  # of vision queries and mean keys
    slc_pairs: np.ndarray
    swa_pairs: np.ndarray
    selected: np.ndarray  # (vision query, selected cube) pairs, the own block not counted
    blocks: int  # that a request of the step has at the most
    cut: Callable[[], Tiles] | None  # see ``tiles``
    first_layer: int = 0
    shared: Sequences | None = None
    scratch: Scratch = field(default_factory=Scratch)

    def buffer(self, name: str, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Uninitialised, of the dtype and on the device of ``like``.

        On a CPU a name is the same memory in all layers of a step: faults of fresh pages take a
        tenth of a layer there.
        """
        if like.device.type == "cpu":
            return self.scratch.take(name, shape, like.dtype, like.device)
        return like.new_empty(shape)

    @cached_property
    def tiles(self) -> Tiles:
        """The step as tiles, for traces: each vision token is one, which chooses among the cubes
        before its own block; text tokens choose nothing."""
        return self.cut()

    def selection(self, kv_heads: int) -> Sequences:
        """The sequences of the selection, whose table a layer fills in.

        Sequence ``kv_head * vision + token``; made by the first layer, used by all, since layers
        run one after the other.
        """
        if self.shared is None:
            number, device = kv_heads * self.number, self.own_block.device
            width = self.most_places + 1
            self.shared = Sequences(
                query_start=torch.arange(number + 1, dtype=torch.int32, device=device),
                seq_lens=self.selected_lens.repeat(kv_heads),
                block_table=torch.zeros(number, width, dtype=torch.int32, device=device),
                queries=number,
                max_query_len=1,
                max_seq_len=width * BLOCK,
            )
        return self.shared


@dataclass
class VideoNSAPlan(StepPlan):
    """A step with vision tokens; layers leave the sums of their gates."""

    gate_sums: dict[int, torch.Tensor] = field(default_factory=dict)  # layer: [rows, branches]
    tokens: np.ndarray | None = None  # [rows] of the step

    def tell(self, shape: ModelShape, layers: range) -> Told:
        """FLOPs by branch; the same in every layer, since how much is selected is known."""
        branches: BranchPlan = self.attention
        pair = shape.attention_flops_per_pair
        by_part = {
            "text": branches.text_pairs * pair,
            "cmp": branches.cmp_pairs * pair * (1 + shape.score_products) / 2,
            "slc": branches.slc_pairs * pair,
            "swa": branches.swa_pairs * pair,
        }
        return told_everywhere(self, by_part, branches.selected, shape, layers)


def told_everywhere(
    step: VideoNSAPlan,
    attention: dict[str, np.ndarray],
    selected: np.ndarray,
    shape: ModelShape,
    layers: range,
) -> Told:
    """What a step tells whose layers all do the same.

    Args:
        step: the step's plan.
        attention: FLOPs by branch, ``[rows]``.
        selected: ``[rows]`` (vision query, selected cube) pairs.
        shape, layers: as in ``StepPlan.tell``.
    """

    def in_every_layer(of_rows: np.ndarray) -> np.ndarray:
        return np.tile(of_rows.astype(float), (len(layers), 1))

    gating = step.video_tokens * gates.flops_per_token(shape.hidden, shape.heads)
    flops = {"qkvo": step.tokens * shape.qkvo_flops_per_token} | attention
    flops |= {"gates": gating, "ffn": step.tokens * shape.ffn_flops_per_token}
    sums = {}
    if step.gate_sums:  # [layers, rows, branches]
        left = torch.stack([step.gate_sums[layer] for layer in layers]).cpu().numpy()
        sums = {f"gate_{name}": left[..., i] for i, name in enumerate(gates.BRANCHES)}
    return Told(
        flops={part: in_every_layer(of_rows) for part, of_rows in flops.items()},
        choices=step.video_tokens,
        attended=in_every_layer(selected),
        sums=sums,
    )


def build_plan(
    rows: StepRows, requests: Sequence[VideoNSARequest | None], device: torch.device
) -> VideoNSAPlan | None:
    """The plan of a step, or None when no vision token is in it.

    Args:
        rows: the step's requests, with their block table.
        requests: ``[rows]`` what is known of each; None for one without vision, and for padding.
        device: where the layers run.
    """
    on = [
        r if r is not None and r.has_vision(done, end) else None
        for r, done, end in zip(requests, rows.computed, rows.seq_lens, strict=True)
    ]
    if all(request is None for request in on):
        return None
    row_cubes, in_prompt = cubes_of(rows, on, BLOCK)
    table = rows.block_table[:, : row_cubes.shape[1]]
    tokens = Tokens.of(rows, on, row_cubes, in_prompt, BLOCK)
    runs = Runs.of(tokens)

    vision = np.flatnonzero(tokens.is_video)
    row, position, seen = (x[vision] for x in (tokens.row, tokens.position, tokens.cubes_before))
    most = np.array([r.config.block_counts - 1 if r else 0 for r in on])
    window = np.array([r.config.window_size if r else 0 for r in on])
    places = np.minimum(seen, most[row])
    selected_lens = places * BLOCK + position % BLOCK + 1
    text = np.flatnonzero(~tokens.is_video)

    def to(array: np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.as_tensor(array).to(device=device, dtype=dtype)

    def by_row(of_row: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.bincount(of_row, values, minlength=len(on))

    branches = BranchPlan(
        text=index_of(text, device) if len(text) else None,
        text_sequences=runs.sequences_of_text(table, device) if len(text) else None,
        vision=index_of(vision, device),
        vision_row=to(row),
        number=len(vision),
        rows=_rows(on, row, seen, row_cubes, table, device),
        windows=_windows(runs, row, window, table, device),
        own_block=to(table[row, tokens.block[vision]]),
        places=to(places),
        selected_lens=to(selected_lens, torch.int32),
        most_places=int(places.max()),
        text_pairs=by_row(tokens.row[text], tokens.position[text] + 1),
        cmp_pairs=by_row(row, seen),
        slc_pairs=by_row(row, selected_lens),
        swa_pairs=by_row(row, np.minimum(position + 1, window[row])),
        selected=by_row(row, places),
        blocks=row_cubes.shape[1],
        cut=lambda: vision_tiles(tokens, row_cubes),
    )
    return VideoNSAPlan(
        attention=branches,
        ffn=None,
        summary_writes=summary_writes(tokens, np.ones(len(on), bool), table, BLOCK, device),
        video_tokens=np.bincount(row, minlength=len(on)),
        cubes_seen=by_row(row, seen),
        block_size=BLOCK,
        tokens=rows.query_lens,
    )


@dataclass(frozen=True)
class Runs:
    """Consecutive tokens of one row, all vision or all text."""

    row: np.ndarray
    start: np.ndarray  # in the step
    length: np.ndarray
    end: np.ndarray  # in the request, past its last token
    vision: np.ndarray  # bool

    @classmethod
    def of(cls, tokens: Tokens) -> Runs:
        opens = (np.diff(tokens.row, prepend=-1) != 0) | (
            np.diff(tokens.is_video, prepend=False) != 0
        )
        start = np.flatnonzero(opens)
        length = np.diff(start, append=len(tokens.row))
        end = tokens.position[start] + length
        return cls(tokens.row[start], start, length, end, tokens.is_video[start])

    def sequences_of_text(self, table: np.ndarray, device: torch.device) -> Sequences:
        """The runs of text as sequences over the real KV cache."""
        return self.sequences(~self.vision, table, device)

    def sequences(self, which: np.ndarray, table: np.ndarray, device: torch.device) -> Sequences:
        """Some of them as sequences over the real KV cache."""
        length, end = self.length[which], self.end[which]
        blocks = -(-int(end.max()) // BLOCK)
        starts = np.concatenate([[0], np.cumsum(length)])

        def to(array: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(np.ascontiguousarray(array)).to(device, torch.int32)

        return Sequences(
            query_start=to(starts),
            seq_lens=to(end),
            block_table=to(table[self.row[which], :blocks]),
            queries=int(starts[-1]),
            max_query_len=int(length.max()),
            max_seq_len=int(end.max()),
        )


def _rows(
    requests: Sequence[VideoNSARequest | None],
    row: np.ndarray,
    seen: np.ndarray,
    row_cubes: np.ndarray,
    table: np.ndarray,
    device: torch.device,
) -> tuple[RowCubes, ...]:
    """The cubes of each row with vision tokens; ``row`` and ``seen`` of these tokens."""
    made = []
    for r in np.unique(row):
        first, last = np.searchsorted(row, [r, r + 1])
        of_row = seen[first:last]
        logical = np.flatnonzero(row_cubes[r])[: int(of_row.max())]
        sizes = requests[r].video_in_block[logical]
        made.append(
            RowCubes(
                row=int(r),
                tokens=slice(int(first), int(last)),
                cubes=torch.as_tensor(table[r][logical]).to(device, torch.int64),
                logical=torch.as_tensor(logical).to(device, torch.int64),
                sizes=torch.as_tensor(sizes).to(device, torch.float32),
                seen=of_row,
                seen_there=torch.as_tensor(of_row).to(device, torch.int64),
                most=requests[r].config.block_counts - 1,
            )
        )
    return tuple(made)


def _windows(
    runs: Runs, row: np.ndarray, window: np.ndarray, table: np.ndarray, device: torch.device
) -> tuple[Window, ...]:
    """Vision runs by the size of their window; ``row`` of the vision tokens."""
    made = []
    for size in np.unique(window[row]):
        which = runs.vision & (window[runs.row] == size)
        tokens = index_of(np.flatnonzero(window[row] == size), device)
        made.append(Window(int(size), tokens, runs.sequences(which, table, device)))
    return tuple(made)


def vision_tiles(tokens: Tokens, row_cubes: np.ndarray) -> Tiles:
    vision = tokens.is_video
    start = np.flatnonzero(
        vision | (np.diff(tokens.row, prepend=-1) != 0) | (np.diff(vision, prepend=True) != 0)
    )
    length = np.diff(start, append=len(vision))
    last = start + length - 1
    row, block, vision = tokens.row[start], tokens.block[last], vision[start]
    candidates = row_cubes[row] & (np.arange(row_cubes.shape[1]) < block[:, None])
    return Tiles(
        row=row,
        start=start,
        length=length,
        block=block,
        kind=np.where(vision, VIDEO, DENSE),
        scored=vision.astype(int),
        tail_gap=(block + 1) * BLOCK - tokens.position[last] - 1,
        candidates=candidates & vision[:, None],
    )


def index_of(tokens: np.ndarray, device: torch.device) -> Index:
    if len(tokens) == tokens[-1] - tokens[0] + 1:
        return slice(int(tokens[0]), int(tokens[-1]) + 1)
    return torch.as_tensor(tokens).to(device, torch.int64)


def take(tensor: torch.Tensor, tokens: Index) -> torch.Tensor:
    """Rows of ``tensor``; a view where they are consecutive."""
    return tensor[tokens] if isinstance(tokens, slice) else tensor.index_select(0, tokens)
