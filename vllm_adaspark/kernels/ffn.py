"""The sparse FFN without waiting for the GPU: the number of active tokens stays on the device.

Gathering the active tokens with ``nonzero`` makes the host wait in every layer, because a matrix
product needs its size.  What there is to choose from:

* copying the count to pinned memory early: there is no early; it depends on what the FFN reads;
* vLLM's fused-MoE kernel with one expert: programs beyond a count on the device return at once.
  It is a Triton product without tuned settings for one large expert;
* ``torch._grouped_mm`` with one group, taken here: CUTLASS, group ends read from the device, rows
  beyond the last end are not computed.  It is that only for bf16 on compute capability 9 and 10;
  elsewhere PyTorch copies the ends to the host, so nothing would be won.

Every buffer has the same rows: one per *item*, those that run first.  Items are the tokens of the
step and then, where any are wanted, the cubes' centroids; a centroid runs where a token skips.  The
elementwise kernels skip the rows beyond the count as the product does; those hold garbage which
nothing reads.  Other GPUs, other dtypes and quantized weights keep the twin, ``sparse_ffn`` of
methods/adaspark/ffn.py, and its wait.  The price under tensor parallelism: the all-reduce has at
least as many rows as the dense one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..methods.adaspark.settings import COMPENSATIONS
from . import interpreted

if TYPE_CHECKING:
    from ..methods.adaspark.plan import FFNPlan

CENTROID, MEAN = (COMPENSATIONS.index(name) for name in ("centroid", "mean"))

# Programs that share a cube's columns when its tokens are measured: a chunk has fewer cubes than
# a GPU has processors.
COLUMN_SPLITS = 8


def token_norms(x: torch.Tensor, tokens: torch.Tensor, centred: bool = False) -> torch.Tensor:
    """L2 norms ``[cubes, block_size]`` fp32 of ``x[tokens]``, without the gathered copy.

    Args:
        x: ``[tokens, hidden]`` with contiguous rows.
        tokens: ``[cubes, block_size]`` int64, contiguous.
        centred: of the differences from the cube's mean instead.
    """
    cubes, size = tokens.shape
    squares = torch.empty(COLUMN_SPLITS, cubes, size, dtype=torch.float32, device=x.device)
    _token_squares[cubes, COLUMN_SPLITS](
        x, tokens, squares, x.shape[1], x.stride(0),
        SIZE=size, COLUMNS=32, CENTRED=centred, num_warps=4,
    )  # fmt: skip
    return squares.sum(0).sqrt()


@triton.jit
def _token_squares(
    x, tokens, squares, hidden, stride,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    cube, split = tl.program_id(0), tl.program_id(1)
    nth = tl.arange(0, SIZE)
    row = tl.load(tokens + cube * SIZE + nth).to(tl.int64) * stride
    total = tl.zeros([SIZE], tl.float32)
    for first in range(split * COLUMNS, hidden, tl.num_programs(1) * COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (column < hidden)[None, :]
        value = tl.load(x + row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if CENTRED:  # a column's mean needs that column alone
            value -= (tl.sum(value, 0) / SIZE)[None, :]
        total += tl.sum(value * value, 1)
    tl.store(squares + (split * tl.num_programs(0) + cube) * SIZE + nth, total)


def active_first(runs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A stable partition of the items: those that run, then the others, each in order.

    Args:
        runs: ``[items]`` bool, contiguous.

    Returns:
        ``order [items]`` int32, the item at each place; ``place [items]`` int32, its inverse;
        ``count [1]`` int32, the items that run.
    """
    order, place = torch.empty(2, len(runs), dtype=torch.int32, device=runs.device)
    count = torch.empty(1, dtype=torch.int32, device=runs.device)
    # One program: a step has thousands of items, a few turns of the loops.
    _active_first[(1,)](
        runs.view(torch.uint8), order, place, count, len(runs),
        CHUNK=min(4096, triton.next_power_of_2(len(runs))), num_warps=8,
    )  # fmt: skip
    return order, place, count


@triton.jit
def _active_first(runs, order, place, count, items, CHUNK: tl.constexpr):
    total = tl.full([], 0, tl.int32)
    for first in range(0, items, CHUNK):
        item = first + tl.arange(0, CHUNK)
        total += tl.sum(tl.load(runs + item, mask=item < items, other=0).to(tl.int32), 0)
    before = tl.full([], 0, tl.int32)  # items that run in earlier chunks
    for first in range(0, items, CHUNK):
        item = first + tl.arange(0, CHUNK)
        inside = item < items
        run = tl.load(runs + item, mask=inside, other=0).to(tl.int32)
        running = before + tl.cumsum(run, 0) - run
        at = tl.where(run != 0, running, total + item - running)
        tl.store(order + at, item, mask=inside)
        tl.store(place + item, at, mask=inside)
        before += tl.sum(run, 0)
    tl.store(count, total)


def waits_for_nothing(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether :func:`sparse_swiglu` can take these: bf16 on compute capability 9 or 10.

    Under the interpreter any CPU tensors can be taken, for the tests.
    """
    if interpreted():
        return x.device.type == "cpu"
    if x.device.type != "cuda" or torch.version.hip or not hasattr(torch, "_grouped_mm"):
        return False
    plain = all(t.dtype == torch.bfloat16 and t.ndim == 2 for t in (x, gate_up, down))
    # CUTLASS reads 16 bytes at a time.
    aligned = all(size % 8 == 0 for weight in (gate_up, down) for size in weight.shape)
    return plain and aligned and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def sparse_swiglu(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    active: torch.Tensor,
    plan: FFNPlan,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """``token_ffn.sparse_ffn`` of a SwiGLU FFN, all sizes on the host known beforehand.

    Args:
        x: ``[tokens, hidden]`` FFN input, contiguous.
        gate_up: ``[2 * intermediate, hidden]`` weight, gate first.
        down: ``[hidden, intermediate]`` weight.
        active: ``[cubes, block_size]`` bool.
        plan: the step's FFN plan.
        reduce: all-reduce of a tensor-parallel rank's part; its last rows are garbage.

    Returns:
        ``[tokens, hidden]``.
    """
    centroids = len(plan.tokens) if CENTROID in plan.compensations else 0
    runs = torch.ones(len(x) + centroids, dtype=torch.bool, device=x.device)
    runs[plan.tokens] = active
    if centroids:
        runs[len(x) :] = (plan.compensation == CENTROID) & ~active.all(1)
    order, place, count = active_first(runs)
    inputs = gather_inputs(x, order, place, count, active, plan.tokens)
    y = _grouped(silu_and_mul(_grouped(inputs, gate_up, count), count), down, count)
    if reduce is not None:
        y = reduce(y)
    return scatter_outputs(y, place, count, active, plan.tokens, plan.compensation, len(x))


def _grouped(x: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``x[:rows] @ weight.T`` in a buffer of all rows."""
    return torch._grouped_mm(x, weight.t().unsqueeze(0), offs=rows)


def gather_inputs(
    x: torch.Tensor,
    order: torch.Tensor,
    place: torch.Tensor,
    count: torch.Tensor,
    active: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """What the FFN runs on, ``[items, hidden]``; rows beyond the count are undefined.

    Args:
        x: ``[tokens, hidden]`` contiguous.
        order, place, count: from :func:`active_first`; items are the tokens and, if there are more
            items than tokens, the cubes' centroids: the means of their skipped tokens.
        active, tokens: ``[cubes, block_size]``.
    """
    in_step, hidden = x.shape
    cubes, size = tokens.shape
    out = x.new_empty(len(order), hidden)
    if len(order) > in_step:
        columns = 4096 // size  # what a program's registers hold
        _centroids[cubes, triton.cdiv(hidden, columns)](
            x, active.view(torch.uint8), tokens, place, count, out, in_step, hidden,
            SIZE=size, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    _gather[(len(order),)](
        x, order, count, out, in_step, hidden, COLUMNS=_columns(hidden), num_warps=4
    )
    return out


@triton.jit
def _centroids(
    x, active, tokens, place, count, out, in_step, hidden,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    cube = tl.program_id(0)
    at = tl.load(place + in_step + cube)
    if at >= tl.load(count):
        return
    nth = tl.arange(0, SIZE)
    skipped = tl.load(active + cube * SIZE + nth) == 0
    token = tl.load(tokens + cube * SIZE + nth).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden
    value = tl.load(
        x + token[:, None] * hidden + column[None, :],
        mask=skipped[:, None] & inside[None, :],
        other=0.0,
    ).to(tl.float32)
    mean = tl.sum(value, 0) / tl.maximum(tl.sum(skipped.to(tl.int32), 0), 1).to(tl.float32)
    target = out + at.to(tl.int64) * hidden + column
    tl.store(target, mean.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gather(x, order, count, out, in_step, hidden, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    if row >= tl.load(count):
        return
    item = tl.load(order + row)
    if item >= in_step:  # a centroid, which _centroids writes
        return
    source = x + item.to(tl.int64) * hidden
    for first in range(0, hidden, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < hidden
        value = tl.load(source + column, mask=inside)
        tl.store(out + row.to(tl.int64) * hidden + column, value, mask=inside)


def silu_and_mul(gate_up: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of the first ``rows [1]`` rows of ``[n, 2 * columns]``."""
    n = gate_up.shape[1] // 2
    out = gate_up.new_empty(len(gate_up), n)
    columns = min(1024, triton.next_power_of_2(n))
    _silu_and_mul[len(gate_up), triton.cdiv(n, columns)](
        gate_up, rows, out, n, COLUMNS=columns, num_warps=4
    )
    return out


@triton.jit
def _silu_and_mul(gate_up, rows, out, n, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    if row >= tl.load(rows):
        return
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n
    source = gate_up + row.to(tl.int64) * 2 * n + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    # Rounded as stock vLLM does, which multiplies in the model's dtype.
    gate = (gate * tl.sigmoid(gate)).to(out.dtype.element_ty)
    up = tl.load(source + n, mask=inside, other=0.0)
    product = gate.to(tl.float32) * up.to(tl.float32)
    tl.store(out + row.to(tl.int64) * n + column, product.to(out.dtype.element_ty), mask=inside)


def scatter_outputs(
    y: torch.Tensor,
    place: torch.Tensor,
    count: torch.Tensor,
    active: torch.Tensor,
    tokens: torch.Tensor,
    compensation: torch.Tensor,
    in_step: int,
) -> torch.Tensor:
    """Outputs back to their tokens, and what skipped tokens get instead.

    Args:
        y: ``[items, hidden]``, outputs of the rows of :func:`gather_inputs`.
        place, count: from :func:`active_first`.
        active, tokens: ``[cubes, block_size]``.
        compensation: ``[cubes]`` int64, index into settings.COMPENSATIONS.
        in_step: tokens of the step.

    Returns:
        ``[tokens, hidden]``.
    """
    hidden, size = y.shape[1], tokens.shape[1]
    out = y.new_empty(in_step, hidden)
    _scatter[(in_step,)](y, place, count, out, hidden, COLUMNS=_columns(hidden), num_warps=4)
    columns = 4096 // size  # what a program's registers hold
    _compensate[len(tokens), triton.cdiv(hidden, columns)](
        y, place, active.view(torch.uint8), tokens, compensation, out, in_step, hidden,
        SIZE=size, COLUMNS=columns, HAS_CENTROIDS=len(place) > in_step, CENTROID_CODE=CENTROID,
        MEAN_CODE=MEAN, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _scatter(y, place, count, out, hidden, COLUMNS: tl.constexpr):
    token = tl.program_id(0)
    at = tl.load(place + token)
    if at >= tl.load(count):
        return
    for first in range(0, hidden, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = column < hidden
        value = tl.load(y + at.to(tl.int64) * hidden + column, mask=inside)
        tl.store(out + token.to(tl.int64) * hidden + column, value, mask=inside)


@triton.jit
def _compensate(
    y, place, active, tokens, compensation, out, in_step, hidden,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, HAS_CENTROIDS: tl.constexpr,
    CENTROID_CODE: tl.constexpr, MEAN_CODE: tl.constexpr,
):  # fmt: skip
    cube = tl.program_id(0)
    nth = tl.arange(0, SIZE)
    ran = tl.load(active + cube * SIZE + nth) != 0
    token = tl.load(tokens + cube * SIZE + nth).to(tl.int64)
    code = tl.load(compensation + cube)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden

    at = tl.load(place + token).to(tl.int64)
    wanted = ran[:, None] & (column < tl.where(code == MEAN_CODE, hidden, 0))[None, :]
    value = tl.load(y + at[:, None] * hidden + column[None, :], mask=wanted, other=0.0)
    number = tl.maximum(tl.sum(ran.to(tl.int32), 0), 1).to(tl.float32)
    fill = tl.sum(value.to(tl.float32), 0) / number
    if HAS_CENTROIDS:
        own = tl.load(
            y + tl.load(place + in_step + cube).to(tl.int64) * hidden + column,
            mask=column < tl.where(code == CENTROID_CODE, hidden, 0),
            other=0.0,
        )
        fill += own.to(tl.float32)  # one of the two is 0
    target = out + token[:, None] * hidden + column[None, :]
    fill = tl.broadcast_to(fill.to(out.dtype.element_ty)[None, :], [SIZE, COLUMNS])
    tl.store(target, fill, mask=(~ran)[:, None] & inside[None, :])


def _columns(hidden: int) -> int:
    """Columns of a row that one program handles at a time."""
    return min(2048, triton.next_power_of_2(hidden))
