"""The virtual batch as vLLM's CPU kernel is fastest with it: a tile's query heads one by one.

That kernel goes over a sequence's keys once for every query head, and takes the heads one after
the other, each through all sequences of a thread.  A tile's keys are then read as often from memory
as there are heads in its GQA group.  Here every (tile, query head) is a sequence of its own, a
tile's heads in a row, so all but the first find the keys in the core's cache: a fifth to a half
faster (docs/performance.md), the same numbers to the bit.

Single tokens are another matter: of these the kernel takes the whole group at once, so they stay as
they are.  The batch is therefore in two parts, which the kernel gets one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .tiles import TilePlan


@dataclass(frozen=True)
class Part:
    """Sequences of one shape.

    ``heads`` is the number of query heads a sequence has: one, or the whole group.
    """

    heads: int
    sequences: torch.Tensor  # [n] int64, index into the virtual batch: kv_head * tiles + tile
    query_start: torch.Tensor  # [n + 1] int32, in queries of ``heads`` heads
    rows: slice  # of HeadsApart.query
    max_query_len: int


@dataclass(frozen=True)
class HeadsApart:
    """What the layers of a step share: where queries go and come from, and buffers for them.

    A *row* is the query of one token and head; the model's are ``token * heads + head``.
    """

    parts: tuple[Part, ...]
    source: torch.Tensor  # [rows] int64, the model's row of each of ours
    target: torch.Tensor  # [rows] int64, the reverse
    query: torch.Tensor  # [rows, d]
    output: torch.Tensor  # [rows, d], in the output's dtype

    @classmethod
    def make(
        cls, plan: TilePlan, query: torch.Tensor, output: torch.Tensor, kv_heads: int
    ) -> HeadsApart:
        """For queries like ``query`` and outputs like ``output``, ``[tokens, heads, d]``."""
        heads = query.shape[1]
        group = heads // kv_heads
        lengths = torch.from_numpy(plan.tiles.length)
        parts, sources, done = [], [], 0
        for tiles, together in (
            ((lengths > 1).nonzero().squeeze(1), 1),
            ((lengths == 1).nonzero().squeeze(1), group),
        ):
            if not len(tiles):
                continue
            # [kv_heads, tiles, sequences of a tile]: a tile's heads are next to each other.
            shape = (kv_heads, len(tiles), group // together)
            head = torch.arange(heads).view(kv_heads, 1, -1)[..., ::together].expand(shape)
            tile = tiles[None, :, None].expand(shape)
            length = lengths[tile].flatten()
            start = torch.cat([length.new_zeros(1), length.cumsum(0)])
            # A sequence's queries are its tile's tokens, each with ``together`` heads from its own.
            nth = torch.arange(int(start[-1])) - start[:-1].repeat_interleave(length)
            first = torch.from_numpy(plan.tiles.start)[tile].flatten()
            token = first.repeat_interleave(length) + nth
            row = token * heads + head.flatten().repeat_interleave(length)
            sources.append((row[:, None] + torch.arange(together)).flatten())
            kv_head = torch.arange(kv_heads)[:, None, None]
            end = done + len(sources[-1])
            parts.append(
                Part(
                    heads=together,
                    sequences=(kv_head * len(lengths) + tile).flatten(),
                    query_start=start.int(),
                    rows=slice(done, end),
                    max_query_len=int(length.max()),
                )
            )
            done = end
        source = torch.cat(sources)
        target = torch.empty_like(source)
        target[source] = torch.arange(len(source))
        shape = (len(source), query.shape[2])
        return cls(tuple(parts), source, target, query.new_empty(shape), output.new_empty(shape))

    def gather(self, query: torch.Tensor) -> None:
        """Fill ``self.query`` from ``[tokens, heads, d]``."""
        torch.index_select(query.flatten(0, 1), 0, self.source, out=self.query)

    def scatter(self, output: torch.Tensor) -> None:
        """Put ``self.output`` into ``output [tokens, heads, d]``, contiguous."""
        torch.index_select(self.output, 0, self.target, out=output.view(-1, output.shape[2]))
