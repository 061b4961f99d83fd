"""A padded batch to the tokens of one step, as a server would compute them, and back.

The layers never see padding: the sequences' tokens stand one after the other, in served order.  A
sequence that begins like the one before it (another question about the same video) shares its whole
KV blocks, as with vLLM's prefix cache; the layers compute them once.  Whether two begin alike is
seen from their embeddings and positions, on which alone everything else depends, so sharing changes
no result and no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..paged.state import StepRows
from .prompt import Prompt


@dataclass
class Step:
    """What the layers share in one forward pass.

    Attributes:
        rows: the sequences, over a made-up block table.
        keys: for each sequence ``[seq_len]`` the tokens of the step that are its keys.
        positions: ``[3, 1, tokens]`` M-RoPE positions of the step's tokens.
        num_blocks: blocks in the table.
        take: ``[tokens]`` where in the padded batch, flattened, each token of the step is.
        put: ``[batch, n]`` which token of the step each token of the batch is; 0 for padding.
        block_size: tokens of a block.
        plan: the method's, see :class:`~.passes.SparsePass`.
        key_summary: what is kept of a block's keys, as ``Settings.key_summary``.
        cubes: per layer ``[queries, kv_heads, blocks]`` bool, the blocks that were chosen; AdaSpark
            chooses once for a sparse tile of queries, VideoNSA for each token.
        active: per layer ``[cubes, block_size]`` bool, the tokens that ran the FFN.

    ``cubes`` and ``active`` are filled by the first pass through a layer and read by a second one,
    when gradient checkpointing computes it again: the choice is the same by construction.
    """

    rows: StepRows
    keys: list[torch.Tensor]
    take: torch.Tensor
    put: torch.Tensor
    positions: torch.Tensor
    num_blocks: int
    block_size: int
    plan: Any = None
    key_summary: str = "sums"
    cubes: dict[int, torch.Tensor] = field(default_factory=dict)
    active: dict[int, torch.Tensor] = field(default_factory=dict)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """``[batch, n, hidden]`` in prompt order to ``[1, tokens, hidden]`` in served order."""
        return padded.flatten(0, 1)[self.take][None]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """``[1, tokens, hidden]`` to ``[batch, n, hidden]``; what padding gets means nothing."""
        return packed[0][self.put]


def pack(embeddings: torch.Tensor, prompts: list[Prompt], size: int, tile: int) -> Step:
    """The step of a forward pass, its plan still to be made.

    Args:
        embeddings: ``[batch, n, hidden]`` of the padded batch, vision in place.
        prompts: its sequences.
        size: tokens of a KV block.
        tile: tokens that choose together, some KV blocks; a shared beginning ends between tiles.
    """
    device = embeddings.device
    columns = [torch.from_numpy(prompt.columns).to(device) for prompt in prompts]
    lengths = [len(prompt.columns) for prompt in prompts]
    table = np.zeros((len(prompts), -(-max(lengths) // size)), np.int64)
    put = torch.zeros(embeddings.shape[:2], dtype=torch.int64, device=device)
    query_start, positions, take, keys, blocks = [0], [], [], [], 0
    for row, (leader, shared) in enumerate(_shared(embeddings, prompts, columns, tile)):
        first, end = query_start[-1], query_start[-1] + lengths[row] - shared
        query_start.append(end)
        own = torch.arange(first, end, device=device)
        keys.append(torch.cat([keys[leader][:shared], own]) if shared else own)
        put[row, columns[row]] = keys[row]
        take.append(row * embeddings.shape[1] + columns[row][shared:])
        positions.append(prompts[row].positions[:, shared:])

        whole, of_row = shared // size, -(-lengths[row] // size)
        table[row, :whole] = table[leader, :whole]
        table[row, whole:of_row] = blocks + np.arange(of_row - whole)
        blocks += of_row - whole
    rows = StepRows(np.array(query_start), np.array(lengths), table)
    at = torch.from_numpy(np.concatenate(positions, axis=1)).to(device)
    return Step(rows, keys, torch.cat(take), put, at[:, None], blocks, size)


def _shared(
    embeddings: torch.Tensor, prompts: list[Prompt], columns: list[torch.Tensor], tile: int
) -> list[tuple[int, int]]:
    """For each sequence the one whose blocks it shares, and how many tokens of it (0: none)."""
    result, leader = [], 0
    for row, prompt in enumerate(prompts):
        shared = 0
        if row:
            # At least one token is its own, so that every sequence has something to compute.
            length = min(len(prompt.columns) - 1, len(prompts[leader].columns))
            ours, theirs = columns[row][:length], columns[leader][:length]
            same = (embeddings[row, ours] == embeddings[leader, theirs]).all(-1).cpu().numpy()
            pairs = prompt, prompts[leader]
            ours, theirs = (p.positions[:, :length] for p in pairs)
            same &= (ours == theirs).all(0)
            for told in ("is_video", "is_vision"):
                ours, theirs = (getattr(p, told)[:length] for p in pairs)
                same &= ours == theirs
            shared = int(np.append(same, False).argmin()) // tile * tile
        if not shared:
            leader = row
        result.append((leader, shared))
    return result
