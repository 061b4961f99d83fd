"""One attention layer: stock kernel dense, FlexAttention, and ours, selection and tables included.

The head shape is Qwen2.5-VL-7B's.  Density is set by ``top_k``, so that it is what was asked for;
the work that was really done is counted by accounts/account.py.  FlexAttention gets the blocks
that ours chose, as a block mask, and does nothing for choosing them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from harness import PagedLayer, one_request

from vllm_adaspark.accounts.account import count_step
from vllm_adaspark.methods.adaspark.request import AdaSparkRequest
from vllm_adaspark.methods.adaspark.score import choose_cubes
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig

from .record import DENSE, Cell, Record, in_turn, progress

SHAPE = dict(heads=28, kv_heads=4, head_size=128, dtype=torch.bfloat16)
OURS, FLEX = "adaspark", "FlexAttention"
# Row names: the default, cubes of 128 tokens, and the kernel of CPUs that have no matrix tiles.
USUAL, LARGE, NO_AMX = "attention", "attention 8×4×4", "attention without AMX"


@dataclass(frozen=True)
class Plan:
    """What to measure at one length.

    Attributes:
        tokens: of the video; the whole prompt is video.
        shares: of the preceding cubes to keep.
        flex_shares: those at which FlexAttention runs, too.
        rounds: samples of each.
        dense_rounds: samples of the stock kernel, where it gets fewer.
        name: of the rows, USUAL, LARGE or NO_AMX.
        tile_cubes: cubes whose tokens choose together (benchmarks/tile_cubes.py compares them).
    """

    tokens: int
    shares: tuple[float, ...]
    name: str = USUAL
    flex_shares: tuple[float, ...] = ()
    rounds: int = 5
    dense_rounds: int | None = None
    tile_cubes: int = 1

    @property
    def config(self) -> AdaSparkConfig:
        """Cubes and all else, but for the share."""
        return AdaSparkConfig(
            selection="top_k",
            cube=(8, 4, 4) if self.name == LARGE else (4, 4, 4),
            tile_cubes=self.tile_cubes,
        )

    @property
    def isa(self) -> str | None:
        """vLLM's name of the kernel to take, None for its own choice."""
        return "vec" if self.name == NO_AMX else None


def measure(record: Record, plans: list[Plan]) -> None:
    """All samples of all plans."""
    flex = _compiled_flex(record) if any(plan.flex_shares for plan in plans) else None
    if not torch.cpu._is_amx_tile_supported():  # there is but one kernel to measure
        plans = [plan for plan in plans if plan.name != NO_AMX]
    for plan in plans:
        rounds = {
            cell: plan.dense_rounds or plan.rounds if cell.contender == DENSE else plan.rounds
            for cell in _cells(plan, flex is not None)
        }
        if any(record.count(cell) < number for cell, number in rounds.items()):
            progress(f"{plan.name}, {plan.tokens} tokens: set up")
            in_turn(record, _contenders(plan, flex, list(rounds)), rounds)


def _cells(plan: Plan, flex: bool) -> list[Cell]:
    cells = [Cell(plan.name, DENSE, plan.tokens)]
    for share in plan.shares:
        cells.append(Cell(plan.name, OURS, plan.tokens, share))
        if flex and share in plan.flex_shares:
            cells.append(Cell(plan.name, FLEX, plan.tokens, share))
    return cells


def _contenders(plan: Plan, flex: Any, cells: list[Cell]) -> dict[Cell, Callable[[], dict]]:
    inputs = _Inputs.make(plan.tokens)
    ours = {share: _Ours(inputs, plan, share) for share in plan.shares}
    contenders: dict[Cell, Callable[[], dict]] = {}
    for cell in cells:
        if cell.contender == DENSE:
            contenders[cell] = _stock(inputs, plan)
        elif cell.contender == OURS:
            contenders[cell] = ours[cell.share].sample
        else:
            contenders[cell] = _flex_sample(flex, inputs, ours[cell.share])
    return contenders


@dataclass(frozen=True)
class _Inputs:
    """A prompt that is all video, its physical blocks in random order."""

    query: torch.Tensor  # [tokens, heads, d]
    key: torch.Tensor  # [tokens, kv_heads, d]
    value: torch.Tensor
    output: torch.Tensor  # like query; contenders write it in turn

    @classmethod
    def make(cls, tokens: int) -> _Inputs:
        generator = torch.Generator().manual_seed(0)

        def random(heads: int) -> torch.Tensor:
            made = torch.empty(tokens, heads, SHAPE["head_size"], dtype=SHAPE["dtype"])
            return made.normal_(generator=generator)

        query = random(SHAPE["heads"])
        keys = [random(SHAPE["kv_heads"]) for _ in range(2)]
        return cls(query, *keys, torch.zeros_like(query))

    def layer(self, config: AdaSparkConfig, isa: str | None, *, sparse: bool) -> PagedLayer:
        """A layer whose cache holds the prompt, its step planned."""
        rows = one_request(len(self.query), config.cube_volume, shuffle_seed=0)
        num_blocks = rows.block_table.size + 1  # and vLLM's null block
        layer = PagedLayer(config, num_blocks=num_blocks, sparse=sparse, isa=isa, **SHAPE)
        layer.begin(rows, [AdaSparkRequest(config, np.ones(len(self.query), bool))])
        layer.write(self.key, self.value)
        return layer


def _stock(inputs: _Inputs, plan: Plan) -> Callable[[], dict]:
    layer = inputs.layer(plan.config, plan.isa, sparse=False)

    def sample() -> dict:
        began = time.perf_counter()
        layer.attend(inputs.query, inputs.output)
        return {"time_s": time.perf_counter() - began}

    return sample


class _Ours:
    """Our path at one density."""

    def __init__(self, inputs: _Inputs, plan: Plan, share: float) -> None:
        self.config = plan.config.override({"keep": share})
        self.inputs, self.layer = inputs, inputs.layer(self.config, plan.isa, sparse=True)
        self.plan = self.layer.runtime.plan
        # The first layer of a step makes what all its layers share: not this layer's cost.
        self.layer.attend(inputs.query, inputs.output)
        rows = one_request(len(inputs.query), self.config.cube_volume, shuffle_seed=0)
        counts = count_step(rows, self.plan, range(1))
        self.work = float(counts.pairs[0, 0] / counts.dense_pairs[0])

    def sample(self) -> dict:
        chosen_before = self.plan.selection.seconds()
        began = time.perf_counter()
        self.layer.attend(self.inputs.query, self.inputs.output)
        time_s = time.perf_counter() - began
        selection = self.plan.selection.seconds() - chosen_before
        parts = {"selection": selection, "planning": self.plan.planning_seconds}
        return {"time_s": time_s, "work": self.work, "parts": parts}

    def block_mask(self) -> torch.Tensor:
        """Which key blocks a query block attends, ``[kv_heads, blocks, blocks]`` bool."""
        blocks = len(self.inputs.query) // self.config.cube_volume
        kept = torch.ones(SHAPE["kv_heads"], blocks, blocks).tril().bool()
        plan, impl = self.plan.attention, self.layer.impl
        if plan is None:  # nothing is left out
            return kept
        by_head = self.inputs.query.unflatten(1, (SHAPE["kv_heads"], -1)).transpose(0, 1)
        chosen = choose_cubes(by_head, impl._key_summaries, plan, impl.scale, 0)
        own = torch.from_numpy(plan.tiles.block)[plan.sparse_tiles]
        always = plan.always[plan.sparse_tiles]
        kept[:, own] = chosen.transpose(0, 1) | always
        return kept


# -- FlexAttention --------------------------------------------------------------------------------


def _compiled_flex(record: Record) -> Callable[..., torch.Tensor] | None:
    """torch's FlexAttention, compiled; None where that does not work, with a note of why."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    small = _Inputs.make(256)
    try:
        _run_flex(compiled, small, _mask_of(torch.ones(4, 4, 4).tril().bool(), 64))
    except Exception as error:  # whatever the compiler raises, the others are still measured
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        record.note("FlexAttention", f"not available: {reason}")
        progress(f"FlexAttention is not available: {reason}")
        return None
    return compiled


def _flex_sample(flex: Callable, inputs: _Inputs, ours: _Ours) -> Callable[[], dict]:
    mask = _mask_of(ours.block_mask(), ours.config.cube_volume)
    _run_flex(flex, inputs, mask)  # compiles for this length

    def sample() -> dict:
        return {"time_s": _run_flex(flex, inputs, mask), "work": ours.work}

    return sample


def _run_flex(flex: Callable, inputs: _Inputs, mask: Any) -> float:
    """Seconds of one run."""
    q, k, v = (
        x.transpose(0, 1).contiguous()[None] for x in (inputs.query, inputs.key, inputs.value)
    )
    with torch.no_grad():
        began = time.perf_counter()
        flex(q, k, v, block_mask=mask, enable_gqa=True)
        return time.perf_counter() - began


def _mask_of(kept: torch.Tensor, block_size: int) -> Any:
    """FlexAttention's block mask: the diagonal is causal, other kept blocks are full."""
    from torch.nn.attention.flex_attention import BlockMask

    diagonal = torch.eye(kept.shape[-1], dtype=torch.bool)
    by_head = kept.repeat_interleave(SHAPE["heads"] // SHAPE["kv_heads"], 0)[None]
    return BlockMask.from_kv_blocks(
        *_listed(by_head & diagonal),
        *_listed(by_head & ~diagonal),
        BLOCK_SIZE=block_size,
        mask_mod=lambda batch, head, query, key: query >= key,
    )


def _listed(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each row keeps, and which, those first."""
    order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return kept.sum(-1, dtype=torch.int32), order.to(torch.int32)


def selection_share(row: dict[str, Any]) -> float | None:
    """Planning and selection over the whole; a step's plan serves all layers of a 7B model."""
    if "parts" not in row:
        return None
    layers = 28
    return (row["parts"]["selection"] + row["parts"]["planning"] / layers) / statistics.median(
        row["time_s"]
    )
