"""What the layers of one step chose, from the device to the traces of the step's requests."""

from __future__ import annotations

import numpy as np
import torch

from ..attention.plan import DENSE, StepPlan
from ..attention.state import StepRows
from .trace import Chunk, pack_bits


class StepTrace:
    """What the layers of one step chose, on their device."""

    def __init__(self) -> None:
        self._kept: dict[int, torch.Tensor] = {}
        self._ran: dict[int, torch.Tensor] = {}

    def cubes(self, layer: int, chosen: torch.Tensor) -> None:
        """``[sparse, kv_heads, blocks]`` bool."""
        self._kept[layer] = _pack(chosen)

    def tokens(self, layer: int, active: torch.Tensor) -> None:
        """``[cubes, block_size]`` bool."""
        self._ran[layer] = _pack(active)

    def to_host(self, layers: range) -> tuple[np.ndarray, np.ndarray]:
        """Bits ``[layers, sparse, kv_heads, bytes]`` and ``[layers, cubes, bytes]``.

        A layer that left nothing attended to everything, and ran everything.
        """
        return _stack(self._kept, layers, 4), _stack(self._ran, layers, 3)


def _pack(bits: torch.Tensor) -> torch.Tensor:
    """As trace.pack_bits, on the device."""
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8))
    weight = 1 << torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (padded.unflatten(-1, (-1, 8)) * weight).sum(-1, dtype=torch.uint8)


def _stack(by_layer: dict[int, torch.Tensor], layers: range, dims: int) -> np.ndarray:
    if not by_layer:
        return np.zeros((len(layers),) + (0,) * (dims - 1), np.uint8)
    left = torch.stack(list(by_layer.values())).cpu().numpy()
    full = np.full((len(layers), *left.shape[1:]), 0xFF, np.uint8)
    full[[layers.index(layer) for layer in by_layer]] = left
    return full


def chunk_of(
    row: int,
    rows: StepRows,
    plan: StepPlan | None,
    bits: tuple[np.ndarray, np.ndarray],
    block_size: int,
) -> Chunk:
    """One row of a step; ``bits`` from :meth:`StepTrace.to_host`."""
    kept, ran = bits
    start, end = int(rows.computed[row]), int(rows.seq_lens[row])
    shift = start - int(rows.query_start[row])  # from the step's tokens to the request's
    # Where all of this rank's layers are dense ones, a plan's tiles left nothing out.
    if plan is None or plan.attention is None or not kept.size:
        tile_start, tile_length = np.array([start]), np.array([end - start])
        sparse = np.array([False])
        kept = np.zeros((len(kept), 0, 1, 0), np.uint8)
    else:
        tiles = plan.attention.tiles
        mine = tiles.row == row
        tile_start, tile_length = tiles.start[mine] + shift, tiles.length[mine]
        sparse = tiles.kind[mine] != DENSE
        all_sparse = tiles.kind != DENSE
        always = pack_bits(~tiles.candidates[mine & all_sparse])
        kept = kept[:, mine[all_sparse]] | always[None, :, None]
    if plan is None or plan.ffn is None or not ran.size:
        ffn_start, ran = np.zeros(0, np.int64), np.zeros((len(ran), 0, block_size // 8), np.uint8)
    else:
        mine = plan.ffn.row == row
        ffn_start = plan.ffn.tokens[:, 0].cpu().numpy()[mine] + shift
        ran = ran[:, mine]
    return Chunk(start, end, tile_start, tile_length, sparse, kept, ffn_start, ran)
