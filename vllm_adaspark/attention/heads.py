"""A choice of cubes that does not depend on how many tensor-parallel ranks there are.

A KV head chooses by the probabilities of all query heads of its GQA group, and under a FLOPs budget
all KV heads of the model share one p.  Two layouts leave a rank with less than that:

* More ranks than KV heads.  vLLM then gives each KV head to several ranks, and to each of these a
  part of the group's query heads, in order.  The mean over the group is the mean of theirs.
* A budget, under which a rank needs the probabilities of the KV heads it does not hold.

In both cases the ranks gather their probabilities, once per layer.  They are small beside what a
layer reduces anyway: with 4,096 tokens in a step and 128K behind them, half a megabyte a rank for
the video and 8 KB for each text token, against 64 MB of hidden states twice (72B, bf16).

Each rank computes the means itself, from the same numbers in the same order.  So the choice of all
ranks that hold a KV head is the same to the bit, whatever the collective does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HeadRanks:
    """The tensor-parallel ranks among which a model's heads are divided.

    Attributes:
        rank: this one's number.
        ranks: how many there are.
        kv_heads: of the model.
        gather: from every rank's tensor of this shape, ``[n, ...]``, to ``[ranks * n, ...]``, in
            order of rank; it must not wait for the device.
    """

    rank: int
    ranks: int
    kv_heads: int
    gather: Callable[[torch.Tensor], torch.Tensor]

    @property
    def sharing(self) -> int:
        """How many ranks hold the same KV head."""
        return max(1, self.ranks // self.kv_heads)

    def complete(self, probs: torch.Tensor, *, all_heads: bool) -> tuple[torch.Tensor, slice]:
        """Probabilities to choose by, and where this rank's KV heads are among them.

        Args:
            probs: ``[tiles, kv_heads of this rank, blocks]``, each the mean over this rank's query
                heads; on every rank for the same tiles and blocks.
            all_heads: whether the choice needs all KV heads of the model.

        Returns:
            ``[tiles, KV heads, blocks]``, each the mean over its whole GQA group; a slice of the
            second dimension.
        """
        mine = probs.shape[1]
        if not all_heads and self.sharing == 1:
            return probs, slice(0, mine)
        first = self.rank // self.sharing  # this rank's place among those with other KV heads
        by_rank = self.gather(probs.contiguous()).view(self.ranks, *probs.shape)
        by_holder = by_rank.unflatten(0, (-1, self.sharing))
        if not all_heads:
            by_holder = by_holder[first : first + 1]
        heads = by_holder.mean(1).transpose(0, 1).flatten(1, 2)  # [tiles, KV heads, blocks]
        return heads, slice(first * mine, (first + 1) * mine) if all_heads else slice(0, mine)
