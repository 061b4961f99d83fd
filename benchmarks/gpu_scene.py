"""Inputs of the GPU benchmark: queries, a cache, blocks chosen at random; and choosing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_adaspark.kernels import nucleus, score
from vllm_adaspark.kernels.tables import compact_tables
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.video.order import spread_tokens


@dataclass(frozen=True)
class Shape:
    """What is attended: ``queries`` new tokens, the last of ``tokens``."""

    tokens: int
    queries: int
    block: int
    heads: int = 28
    kv_heads: int = 4
    head_size: int = 128

    @property
    def tiles(self) -> int:
        return self.queries // self.block

    @property
    def width(self) -> int:
        return self.tokens // self.block

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def scale(self) -> float:
        return self.head_size**-0.5


@dataclass
class Scene:
    """Random inputs of one shape; ``tables`` and what follows belong to the sparse contenders."""

    shape: Shape
    query: torch.Tensor  # [queries, heads, d], as a model has it
    by_head: torch.Tensor  # [kv_heads, queries, group, d], the same
    cache: torch.Tensor  # [physical blocks, kv_heads, block, 2 d]
    blocks: torch.Tensor  # [width] int32 physical blocks
    chosen: torch.Tensor  # [tiles, kv_heads, width] bool
    tables: torch.Tensor | None = None  # [kv_heads * tiles, width + 1] int32
    seq_lens: torch.Tensor | None = None
    query_start: torch.Tensor | None = None
    kept_blocks: torch.Tensor | None = None

    @property
    def pages(self) -> torch.Tensor:
        """``[physical blocks * kv_heads, block, 2 d]``: a KV head's part passes for a block."""
        return self.cache.flatten(0, 1)

    def keys_and_values(self) -> torch.Tensor:
        """``[2, kv_heads, tokens, d]`` contiguous, in the order of the sequence."""
        d = self.shape.head_size
        flat = self.cache[self.blocks.long()].transpose(0, 1).flatten(1, 2)
        return torch.stack([flat[..., :d], flat[..., d:]])


def make_scene(shape: Shape, density: float, device: torch.device, seed: int) -> Scene:
    """Random inputs, and blocks chosen with probability ``density``."""
    torch.manual_seed(seed)
    dtype, d = torch.bfloat16, shape.head_size
    query = torch.randn(shape.queries, shape.heads, d, dtype=dtype, device=device)
    physical = shape.width + 2
    cache = torch.randn(physical, shape.kv_heads, shape.block, 2 * d, dtype=dtype, device=device)
    blocks = torch.randperm(physical, device=device)
    cache[blocks[shape.width :]] = float("nan")  # in no table: must not be read
    by_head = query.unflatten(1, (shape.kv_heads, -1)).transpose(0, 1).contiguous()
    scene = Scene(shape, query, by_head, cache, blocks[: shape.width].int(), None)
    choose(scene, density)
    return scene


def choose(scene: Scene, density: float) -> None:
    """Choose blocks anew; the tile's own one is always attended."""
    shape, device = scene.shape, scene.query.device
    size = (shape.tiles, shape.kv_heads, shape.width)
    scene.chosen = torch.rand(size, dtype=torch.float16, device=device) < density
    scene.chosen &= candidates(shape, device)[:, None]
    heads = torch.arange(shape.kv_heads * shape.tiles + 1, dtype=torch.int32, device=device)
    scene.query_start = heads * shape.block
    tables(scene)


def own_block(shape: Shape, device: torch.device) -> torch.Tensor:
    """``[tiles]`` int32."""
    first = shape.width - shape.tiles
    return torch.arange(first, shape.width, dtype=torch.int32, device=device)


def candidates(shape: Shape, device: torch.device) -> torch.Tensor:
    """``[tiles, width]`` bool: all blocks before the tile's own."""
    return torch.arange(shape.width, device=device) < own_block(shape, device)[:, None]


def tables(scene: Scene) -> None:
    """The scene's block tables, by our kernel."""
    shape, device = scene.shape, scene.query.device
    own = own_block(shape, device)
    scene.tables, scene.seq_lens, scene.kept_blocks = compact_tables(
        scene.chosen,
        torch.arange(shape.width, device=device) == own[:, None],
        scene.blocks.expand(shape.tiles, -1).contiguous(),
        torch.arange(shape.tiles, dtype=torch.int32, device=device),
        torch.zeros(shape.tiles, dtype=torch.int32, device=device),
        shape.block,
    )


class Selection:
    """The parts of choosing, as a layer runs them, on one scene."""

    def __init__(self, scene: Scene) -> None:
        shape, device = scene.shape, scene.query.device
        self.scene, self.shape = scene, shape
        self.sums = torch.randn(
            len(scene.cache), shape.kv_heads, shape.head_size, device=device
        )  # of real blocks; nothing depends on their being this cache's
        self.own = own_block(shape, device)
        self.candidates = candidates(shape, device)
        self.is_cube = torch.ones(shape.width, dtype=torch.bool, device=device)
        self.blocks = scene.blocks.long()
        self.tile = torch.arange(shape.tiles, device=device)
        # As methods/adaspark/planner.py has them: some tokens of each tile are asked.
        asking = torch.from_numpy(spread_tokens(shape.block, AdaSparkConfig().cube_queries))
        tile_start = torch.arange(shape.tiles, device=device)[:, None] * shape.block
        self.tokens = (tile_start + asking.to(device)).flatten()
        self.nth = torch.arange(len(self.tokens), device=device)
        self.asked = len(asking)
        self.probs = torch.zeros(shape.tiles, shape.kv_heads, shape.width, device=device)
        self.share = torch.full((shape.tiles, 1), 0.8, device=device)
        self.least = torch.ones(shape.tiles, 1, dtype=torch.int64, device=device)
        always = torch.arange(shape.width, device=device) == self.own[:, None]
        sparse_of = self.tile.int()
        gap = torch.zeros_like(sparse_of)
        rows = scene.blocks.expand(shape.tiles, -1).contiguous()
        self._tables = always, rows, sparse_of, gap, shape.block
        self._by_head = torch.empty_like(scene.by_head)
        self._output = torch.empty_like(scene.query)

    def parts(self) -> dict[str, Callable[[], None]]:
        return {"scores": self.scores, "nucleus": self.nucleus, "tables": self.tables,
                "transposition": self.transposition}  # fmt: skip

    def scores(self) -> None:
        shape = self.shape
        means = score.cube_keys(
            self.sums, self.blocks, self.is_cube, shape.block, self.scene.query.dtype
        )
        heads = self.scene.query.unflatten(1, (shape.kv_heads, -1)).transpose(0, 1)
        score.pool_probabilities(
            self.probs, heads[:, self.tokens].contiguous(), means, self.candidates, self.tile,
            self.nth, self.own, self.asked, shape.scale,
        )  # fmt: skip

    def nucleus(self) -> None:
        valid = self.candidates.unsqueeze(1).expand_as(self.probs)
        lead = self.probs.shape[:2]
        self.kept = nucleus.top_p(
            self.probs, valid, self.share.expand(lead), self.least.expand(lead)
        )

    def tables(self) -> None:
        compact_tables(self.scene.chosen, *self._tables)

    def transposition(self) -> None:
        heads = self.shape.kv_heads
        self._by_head.copy_(self.scene.query.unflatten(1, (heads, -1)).transpose(0, 1))
        self._output.unflatten(1, (heads, -1)).copy_(self.scene.by_head.transpose(0, 1))
