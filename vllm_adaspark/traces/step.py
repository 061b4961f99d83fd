"""What the layers of one step chose, from the device to the traces of the step's requests."""

from __future__ import annotations

import numpy as np
import torch

from ..observing import observing
from ..paged.plan import StepPlan
from ..paged.state import StepRows
from ..paged.tiles import DENSE, by_cube
from .store import Sizes
from .trace import Chunk, pack_bits


class StepTrace:
    """What the layers of one step chose, on their device.

    ``failed``: a layer's choice could not be kept, so nothing here may be used.
    """

    def __init__(self) -> None:
        self._kept: dict[int, torch.Tensor] = {}
        self._ran: dict[int, torch.Tensor] = {}
        self._alive: dict[int, list[tuple[int, torch.Tensor]]] = {}  # by row
        self.failed = False

    def cubes(self, layer: int, chosen: torch.Tensor) -> None:
        """``[sparse, kv_heads, blocks]`` bool."""
        self._keep(self._kept, layer, chosen)

    def tokens(self, layer: int, active: torch.Tensor) -> None:
        """``[cubes, block_size]`` bool."""
        self._keep(self._ran, layer, active)

    def survivors(self, layer: int, row: int, tokens: torch.Tensor) -> None:
        """``[survivors]`` int64: which of a row's video tokens go on after a layer."""
        self._alive.setdefault(row, []).append((layer, tokens))

    def lasted(self, row: int, tokens: int, layers: int) -> np.ndarray:
        """``[tokens]`` uint16: how many of the model's layers saw each video token of a row."""
        lasted = np.full(tokens, layers, np.uint16)
        before = np.arange(tokens)
        for layer, alive in self._alive.get(row, ()):
            alive = alive.cpu().numpy()
            lasted[np.setdiff1d(before, alive, assume_unique=True)] = layer + 1
            before = alive
        return lasted

    def _keep(self, where: dict[int, torch.Tensor], layer: int, bits: torch.Tensor) -> None:
        with observing("recording what a layer chose"):  # out of memory, say
            where[layer] = _pack(bits)
            return
        self.failed = True

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
    """One row of a step; ``bits`` from :meth:`StepTrace.to_host`.

    A tile of several cubes is recorded as one for each, with what they chose together.
    """
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
        tile, tile_start, tile_length = by_cube(tiles, block_size)
        mine = tiles.row[tile] == row
        tile, tile_start, tile_length = tile[mine], tile_start[mine] + shift, tile_length[mine]
        all_sparse = tiles.kind != DENSE
        sparse = all_sparse[tile]
        chose = tile[sparse]
        always = pack_bits(~tiles.candidates[chose])
        # Another row of the step may be longer: blocks past this one's end say nothing.
        own = -(-blocks_of(end, plan, block_size) // 8)
        nth = np.cumsum(all_sparse) - 1  # of each sparse tile among those
        kept = (kept[:, nth[chose]] | always[None, :, None])[..., :own]
    if plan is None or plan.ffn is None or not ran.size:
        ffn_start, ran = np.zeros(0, np.int64), np.zeros((len(ran), 0, block_size // 8), np.uint8)
    else:
        mine = plan.ffn.row == row
        ffn_start = plan.ffn.tokens[:, 0].cpu().numpy()[mine] + shift
        ran = ran[:, mine]
    return Chunk(start, end, tile_start, tile_length, sparse, kept, ffn_start, ran)


def counted_bytes(row: int, rows: StepRows, plan: StepPlan | None, sizes: Sizes) -> int:
    """What every rank counts for :func:`chunk_of`, whatever its own layers left there."""
    tiles = sparse = blocks = cubes = 0
    if plan is not None and plan.attention is not None:
        of_plan = plan.attention.tiles
        tile, *_ = by_cube(of_plan, sizes.block_size)
        kind = of_plan.kind[tile[of_plan.row[tile] == row]]
        tiles, sparse = len(kind), np.count_nonzero(kind != DENSE)
        blocks = blocks_of(int(rows.seq_lens[row]), plan, sizes.block_size)
    if plan is not None and plan.ffn is not None:
        cubes = (plan.ffn.row == row).sum()
    return sizes.chunk(max(int(tiles), 1), int(sparse), blocks, int(cubes))


def blocks_of(tokens: int, plan: StepPlan, block_size: int) -> int:
    """KV blocks of so many tokens, as far as tiles choose among them."""
    return min(-(-tokens // block_size), plan.attention.tiles.candidates.shape[1])
