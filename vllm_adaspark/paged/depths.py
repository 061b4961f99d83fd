"""Layers that see fewer tokens than the ones before them: lengths, KV slots, and the way back.

A method may drop tokens *between* layers.  The layers after such an event form a *depth* of their
own: depth 0 are the layers up to and including the first event's, depth ``d`` those after the d-th.
At a depth a request's tokens are numbered without the dropped ones, and the token with number ``r``
lies in slot ``r % size`` of the request's block ``r // size``: survivors move to the front slots of
the same blocks.  So one block table serves all depths, and only lengths and slot mappings differ.

How many tokens a depth has is known on the host before the layers run, so its rows are made with
the step's plan (:func:`depths_of`).  Which tokens they are is known once a layer has run; then
:meth:`Depths.drop` takes the rows of the survivors along.  RoPE positions go with the tokens.  At
the end :meth:`Depths.restore` puts the rows back where the model runner expects them.

Blocks written like this must belong to one request alone (scheduler.py).  No vLLM here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from .state import StepRows


@dataclass(frozen=True)
class DepthRows:
    """What the layers of one depth see of a step, on the host.

    Attributes:
        query_start: ``[rows + 1]`` first token of each row at this depth.
        seq_lens: ``[rows]`` tokens of each request at this depth once the step is done.
        slots: ``[tokens]`` int64 KV slot of each token of the step at this depth.
    """

    query_start: np.ndarray
    seq_lens: np.ndarray
    slots: np.ndarray

    @property
    def query_lens(self) -> np.ndarray:
        return np.diff(self.query_start)


@dataclass
class Depths:
    """A step some of whose layers see fewer tokens.

    Attributes:
        events: layers after which a request of this step loses tokens, now or in an earlier step.
        rows: of each depth, one more than there are events.
        dropping: whether tokens are dropped in this step; else all were dropped before it.
    """

    events: tuple[int, ...]
    rows: tuple[DepthRows, ...]
    dropping: bool
    _depth: int = 0  # the one that the layers have reached
    _positions: torch.Tensor | None = None  # [..., tokens] of that depth
    _alive: torch.Tensor | None = None  # [tokens] of that depth: their index in the step

    def of(self, layer: int) -> int:
        """The depth that a layer belongs to."""
        return sum(layer > event for event in self.events)

    def begin(self, positions: torch.Tensor) -> None:
        """Take the step's RoPE positions ``[..., tokens]``, which may be padded."""
        tokens = int(self.rows[0].query_start[-1])
        self._depth = 0
        self._positions = positions[..., :tokens]
        self._alive = torch.arange(tokens, device=positions.device)

    @property
    def positions(self) -> torch.Tensor:
        """RoPE positions ``[..., tokens]`` at the depth that the layers have reached."""
        return self._positions

    def drop(self, keep: torch.Tensor) -> torch.Tensor:
        """Go one depth on with the tokens that ``keep`` names.

        Args:
            keep: ``[tokens of this depth]`` bool; as many are True as the next depth has tokens.

        Returns:
            ``[tokens of the next depth]`` int64, which rows of the hidden states go on.
        """
        self._depth += 1
        number = int(self.rows[self._depth].query_start[-1])
        # What nonzero() would say, without waiting for the device to count.
        index = torch.argsort((~keep).to(torch.uint8), stable=True)[:number]
        self._positions = self._positions[..., index]
        self._alive = self._alive[index]
        return index

    def restore(self, hidden: torch.Tensor, tokens: int) -> torch.Tensor:
        """``hidden`` of the last depth as ``[tokens, hidden]`` of the step; dropped rows are 0."""
        result = hidden.new_zeros(tokens, hidden.shape[1])
        result[self._alive] = hidden
        return result

    def host_part(self) -> Depths:
        """A copy that holds no device memory, for the accounts."""
        return replace(self, _positions=None, _alive=None)


def depths_of(
    rows: StepRows,
    events: Sequence[int],
    before: np.ndarray,
    here: np.ndarray,
    block_size: int,
) -> Depths:
    """The depths of a step.

    Args:
        rows: the step's requests, with their block table.
        events: layers after which tokens are dropped, rising.
        before: ``[rows, events]`` tokens of each request that earlier steps dropped, up to and
            including that event.
        here: ``[rows, events]`` tokens that this step drops, likewise.
        block_size: tokens in a KV block.
    """
    lens = rows.query_lens
    nothing = np.zeros((len(lens), 1), np.int64)
    before, here = (np.hstack([nothing, dropped]) for dropped in (before, here))
    made = []
    for depth in range(len(events) + 1):
        query = lens - here[:, depth]
        seq = rows.seq_lens - before[:, depth] - here[:, depth]
        start = np.concatenate([[0], np.cumsum(query)])
        row = np.repeat(np.arange(len(lens)), query)
        number = np.arange(len(row)) + (seq - query - start[:-1])[row]
        block = rows.block_table[row, number // block_size].astype(np.int64)
        made.append(DepthRows(start, seq, block * block_size + number % block_size))
    return Depths(tuple(events), tuple(made), bool(here.any()))
