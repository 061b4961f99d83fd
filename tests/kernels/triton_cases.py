"""Each Triton kernel against a naive twin, run by test_triton.py under Triton's interpreter.

Not collected by itself: the interpreter must be asked for before anything imports Triton.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import harness
import numpy as np
import pytest
import torch

from kernels.scenes import gather, known_of, random_request, rows_of
from vllm_adaspark import kernels
from vllm_adaspark.kernels import ffn, nucleus, score, tables
from vllm_adaspark.methods.adaspark import choose as selection
from vllm_adaspark.methods.adaspark import score as attention_score
from vllm_adaspark.methods.adaspark.planner import build_plan
from vllm_adaspark.methods.adaspark.settings import COMPENSATIONS, AdaSparkConfig
from vllm_adaspark.paged import tables as attention_tables
from vllm_adaspark.paged.state import KEY_SUMMARIES
from vllm_adaspark.step import Runtime

assert kernels.interpreted(), "run through tests/kernels/test_triton.py"


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.float(), want.float()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


# Scores


def naive_probabilities(query, means, valid, scale) -> torch.Tensor:
    """``[tile_size, group, d]`` and ``[width, d]`` to pooled probabilities ``[width]``, fp64."""
    logits = query.double().flatten(0, 1) @ means.double().T * scale
    return logits.masked_fill(~valid, float("-inf")).softmax(-1).mean(0)


@pytest.mark.parametrize(
    "group, size, width, dtype",
    [
        (7, 32, 150, torch.bfloat16),  # more cubes than a block of columns
        (1, 64, 5, torch.float32),  # fewer queries and cubes than a block
        (2, 128, 130, torch.float32),
    ],
)
def test_score_pools_probabilities(group, size, width, dtype) -> None:
    torch.manual_seed(width)
    kv_heads, d, tiles, physical = 2, 32, 3, width + 9
    sums = torch.randn(physical, kv_heads, d) * size
    blocks = torch.randperm(physical)[:width]
    is_cube = torch.rand(width) > 0.2
    is_cube[0] = True
    sums[blocks[~is_cube]] = float("nan")  # stale sums must not reach a softmax
    means = score.cube_keys(sums, blocks, is_cube, size, dtype)
    for head in range(kv_heads):
        want = torch.where(is_cube[:, None], sums[blocks, head] / size, 0.0).to(dtype)
        # The interpreter rounds to bf16 towards zero, a GPU to nearest.
        tolerance = 0 if dtype == torch.float32 else 2**-7
        assert torch.allclose(means[head], want, rtol=tolerance, atol=0)

    # The tiles' tokens come in another order than the tiles, with other tokens between.
    first = torch.tensor([2 * size + 3, 0, 3 * size + 3])
    tokens = (first[:, None] + torch.arange(size)).flatten()
    tile_of = torch.tensor([1, 3, 0])
    limit = torch.tensor([width, max(1, width // 2), 1], dtype=torch.int32)
    candidates = torch.zeros(5, width, dtype=torch.bool)
    for tile, sparse in enumerate(tile_of):
        candidates[sparse] = is_cube & (torch.arange(width) < limit[tile])
    query = (2 * torch.randn(kv_heads, 4 * size + 3, group, d)).to(dtype)
    probs = torch.full((5, kv_heads, width), -1.0)
    score.pool_probabilities(probs, query, means, candidates, tile_of, tokens, limit, size, d**-0.5)
    for tile in range(tiles):
        for head in range(kv_heads):
            mine = slice(first[tile], first[tile] + size)
            want = naive_probabilities(
                query[head, mine],
                means[head],
                candidates[tile_of[tile]],
                d**-0.5,
            )
            got = probs[tile_of[tile], head]
            assert torch.allclose(got[: limit[tile]].double(), want[: limit[tile]], atol=2e-6)
            assert (got[limit[tile] :] == -1).all(), "columns past the limit are not the kernel's"
    assert (probs[[2, 4]] == -1).all(), "rows of other tiles are not the kernel's"


def pooled_one_tile(
    query: torch.Tensor, means: torch.Tensor, candidates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's and the naive probabilities [cubes] of one head's only tile, at scale 1."""
    size, width = query.shape[1], means.shape[1]
    probs = torch.zeros(1, 1, width)
    score.pool_probabilities(
        probs, query, means, candidates, torch.tensor([0]), torch.arange(size),
        torch.tensor([width], dtype=torch.int32), size, 1.0,
    )  # fmt: skip
    return probs[0, 0], naive_probabilities(query[0], means[0], candidates[0], 1.0)


def test_score_survives_large_logits_and_late_candidates() -> None:
    size, d, width = 32, 16, 300
    query = torch.full((1, size, 1, d), 40.0)
    means = torch.randn(1, width, d)
    candidates = torch.zeros(1, width, dtype=torch.bool)
    candidates[0, 290:] = True  # none in the first blocks of columns
    got, want = pooled_one_tile(query, means, candidates)
    assert torch.allclose(got.double(), want, atol=1e-5)
    assert abs(float(got.sum()) - 1) < 1e-5


def test_score_takes_4096_cubes() -> None:
    torch.manual_seed(0)
    size, d, width = 32, 16, 4096
    query, means = torch.randn(1, size, 1, d), torch.randn(1, width, d)
    candidates = torch.ones(1, width, dtype=torch.bool)
    got, want = pooled_one_tile(query, means, candidates)
    assert relative_rms(got, want) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_score_of_single_tokens(dtype: torch.dtype) -> None:
    """Two requests with three tokens each; blocks that are no candidates hold NaN."""
    torch.manual_seed(0)
    kv_heads, group, d, width, size = 2, 7, 16, 70, 32
    row_blocks = torch.randperm(3 * width).view(3, width)
    row, tile_of = torch.tensor([2, 0]), torch.tensor([[3, 1, 0], [4, 2, 6]])
    tokens = torch.tensor([[5, 6, 7], [0, 1, 2]])
    limit = torch.randint(1, width + 1, (2, 3), dtype=torch.int32)
    is_cube = torch.rand(3, width) > 0.3
    is_cube[:, 0] = True
    sums = torch.randn(3 * width, kv_heads, d) * size
    sums[row_blocks[~is_cube]] = float("nan")
    candidates = torch.zeros(8, width, dtype=torch.bool)
    for i, j in np.ndindex(2, 3):
        candidates[tile_of[i, j]] = is_cube[row[i]] & (torch.arange(width) < limit[i, j])
    query = torch.randn(kv_heads, 9, group, d).to(dtype)
    probs = torch.full((8, kv_heads, width), -1.0)
    score.token_probabilities(
        probs, query, sums, row_blocks, candidates, row, tile_of, tokens, limit, size, 0.75
    )
    for i, j in np.ndindex(2, 3):
        tile, end = tile_of[i, j], limit[i, j]
        means = (sums[row_blocks[row[i]]] / size).nan_to_num()
        for head in range(kv_heads):
            q = query[head, tokens[i, j]][None]
            want = naive_probabilities(q, means[:, head], candidates[tile], 0.75)
            assert torch.allclose(probs[tile, head, :end].double(), want[:end], atol=2e-6)
            assert (probs[tile, head, end:] == -1).all()
    assert (probs[[5, 7]] == -1).all(), "rows of other tiles are not the kernel's"


def test_score_refuses_a_head_size_it_cannot_tile() -> None:
    with pytest.raises(ValueError, match="head_size=80"):
        score.pool_probabilities(
            *[torch.zeros(1, 1, 1, 80)] * 4, *[torch.zeros(1)] * 3, tile_size=32, scale=1.0
        )


@pytest.mark.parametrize("head_size", [16, 64, 128, 256])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("width", [1, 40, 4096])
def test_score_blocks_fit_in_a_programs_memory(head_size, element_bytes, width) -> None:
    rows, columns, stages = score.block_shape(head_size, element_bytes, width)
    assert (rows + stages * columns) * head_size * element_bytes <= score.SHARED_BYTES
    assert min(rows, columns) >= 16, "what a product takes"
    assert all(number.bit_count() == 1 for number in (rows, columns))
    assert columns == 128 or head_size * element_bytes > 256 or width < 128, (
        "no smaller than needed"
    )


def test_score_takes_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large heads leave room for few queries and cubes at a time."""
    monkeypatch.setattr(score, "SHARED_BYTES", 4 << 10)
    assert score.block_shape(16, 4, 300)[:2] == (32, 16)
    torch.manual_seed(0)
    size, group, d, width = 32, 5, 16, 300
    query, means = torch.randn(1, size, group, d), torch.randn(1, width, d)
    candidates = torch.rand(1, width) > 0.3
    got, want = pooled_one_tile(query, means, candidates)
    assert relative_rms(got, want) < 1e-5


# Nucleus


def dyadic_rows(rows: int, n: int, levels: int) -> torch.Tensor:
    """Probabilities with many ties whose every partial sum is exact in fp32, in any order."""
    parts = torch.randint(0, levels, (rows, n))
    return parts / 2.0 ** (levels * n).bit_length()


def naive_top_p(probs, valid, share, least) -> torch.Tensor:
    """Entry by entry, in order of falling probability, the earlier of equal ones first; fp64."""
    kept = torch.zeros_like(valid)
    for row in np.ndindex(*probs.shape[:-1]):
        p, there = probs[row].double().tolist(), valid[row].nonzero().flatten().tolist()
        mass = 0.0
        for rank, entry in enumerate(sorted(there, key=lambda i, p=p: (-p[i], i))):
            kept[row][entry] = mass < share[row] or rank < least[row] or share[row] >= 1
            mass += p[entry]
    return kept


@pytest.mark.parametrize("n", [1, 64, 257, 1000])
@pytest.mark.parametrize("levels", [2, 100])
def test_nucleus_equals_naive_with_ties(n: int, levels: int) -> None:
    torch.manual_seed(n * levels)
    rows = 4
    probs = dyadic_rows(rows, n, levels)
    valid = torch.rand(rows, n) > 0.3
    valid[0] = False
    probs[1] = 0
    total = (probs * valid).sum(-1)
    # Shares that a partial sum meets exactly, and others.
    exact = probs.cumsum(-1)[torch.arange(rows), torch.randint(0, n, (rows,))].clamp(min=2**-30)
    none, some = torch.zeros(rows, dtype=torch.int64), torch.randint(0, 17, (rows,))
    part, all_of_it = total.clamp(min=1e-6) * 0.4, torch.ones(rows)
    for share, least in ((exact, none), (part, some), (all_of_it, none)):
        got = nucleus.top_p(probs, valid, share, least)
        assert torch.equal(got, naive_top_p(probs, valid, share, least))


def test_nucleus_equals_naive_on_random_rows() -> None:
    torch.manual_seed(0)
    for n, sharpness in ((64, 1.0), (500, 4.0), (4096, 2.0)):
        probs = (sharpness * torch.randn(4, n)).softmax(-1)
        valid = torch.ones_like(probs, dtype=torch.bool)
        share = torch.linspace(0.05, 0.95, 4)
        # Where a partial sum is within rounding of the share either choice is right.
        falling = probs.double().sort(-1, descending=True).values
        before = falling.cumsum(-1) - falling
        assert ((before - share[:, None]).abs().amin(-1) > 1e-6).all(), "choose another seed"
        least = torch.ones(4, dtype=torch.int64)
        got = nucleus.top_p(probs, valid, share, least)
        assert torch.equal(got, naive_top_p(probs, valid, share, least))


def test_nucleus_reads_broadcast_arguments() -> None:
    """As score.choose_cubes passes them: settings and validity are the same for all KV heads."""
    torch.manual_seed(1)
    probs = dyadic_rows(2 * 3, 70, 9).view(2, 3, 70)
    valid = (torch.rand(2, 70) > 0.5).unsqueeze(1).expand(2, 3, 70)
    share = (torch.rand(2) * probs.sum(-1).amax()).unsqueeze(1).expand(2, 3)
    least = torch.randint(1, 4, (2,)).unsqueeze(1).expand(2, 3)
    want = naive_top_p(probs, valid, share, least)
    assert torch.equal(nucleus.top_p(probs, valid, share, least), want)
    one = nucleus.top_p(probs[0, 0], valid[0, 0], share[0, 0], least[0, 0])
    assert torch.equal(one, want[0, 0])
    strided = probs.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(nucleus.top_p(strided, valid, share, least), want)


def test_nucleus_of_nothing_and_of_too_much() -> None:
    empty = nucleus.top_p(
        torch.zeros(0, 2, 5), torch.zeros(0, 2, 5, dtype=torch.bool), torch.zeros(0, 2),
        torch.zeros(0, 2, dtype=torch.int64),
    )  # fmt: skip
    assert empty.shape == (0, 2, 5)
    with pytest.raises(ValueError, match="16385"):
        nucleus.top_p(torch.zeros(16385), torch.ones(16385), torch.ones(()), torch.ones(()))


# Tables


@pytest.mark.parametrize("width", [1, 17, 1024, 1500])
def test_tables_equal_naive_lists(width: int) -> None:
    torch.manual_seed(width)
    kv_heads, tiles, size = 3, 5, 64
    sparse = torch.tensor([1, 2, 4])
    sparse_of = torch.full((tiles,), -1, dtype=torch.int32)
    sparse_of[sparse] = torch.arange(3, dtype=torch.int32)
    always = torch.rand(tiles, width) > 0.8
    always[:, -1] = True
    chosen = torch.rand(3, kv_heads, width) > 0.5
    chosen[0] = False  # an empty choice
    blocks = torch.randint(0, 1000, (tiles, width), dtype=torch.int32)
    tail_gap = torch.randint(0, size, (tiles,), dtype=torch.int32)
    table, seq_lens, kept_blocks = tables.compact_tables(
        chosen, always, blocks, sparse_of, tail_gap, size
    )
    assert table.shape == (kv_heads * tiles, width + 1)
    for head in range(kv_heads):
        for tile in range(tiles):
            kept = always[tile].clone()
            if sparse_of[tile] >= 0:
                kept |= chosen[sparse_of[tile], head]
            want = blocks[tile, kept] * kv_heads + head
            row = head * tiles + tile
            assert torch.equal(table[row, : len(want)], want)
            assert (table[row, len(want) :] == 0).all()
            assert kept_blocks[head, tile] == len(want)
            assert seq_lens[row] == len(want) * size - tail_gap[tile]


# FFN


@pytest.mark.parametrize("tokens, size, hidden", [(300, 64, 96), (140, 32, 40), (128, 128, 2100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ffn_token_norms(tokens: int, size: int, hidden: int, dtype: torch.dtype) -> None:
    torch.manual_seed(hidden)
    x = (torch.randn(tokens, hidden) * torch.rand(tokens, 1) + 3).to(dtype)
    at = torch.stack([torch.arange(size) + first for first in (0, tokens - size)])
    rows = x[at].double()
    assert relative_rms(ffn.token_norms(x, at), rows.norm(dim=-1)) < 1e-6
    centred = (rows - rows.mean(1, keepdim=True)).norm(dim=-1)
    assert relative_rms(ffn.token_norms(x, at, centred=True), centred) < 1e-5


@pytest.mark.parametrize("tokens", [1, 100, 4096, 5000])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_ffn_active_first_is_a_stable_partition(tokens: int, share: float) -> None:
    torch.manual_seed(tokens)
    runs = torch.rand(tokens) < share
    order, place, count = ffn.active_first(runs)
    want = torch.cat([runs.nonzero(), (~runs).nonzero()]).flatten().int()
    assert torch.equal(order, want)
    assert torch.equal(place[order.long()], torch.arange(tokens, dtype=torch.int32))
    assert count.tolist() == [int(runs.sum())]


def naive_ffn(x, gate_up, down, active, plan) -> torch.Tensor:
    """Token by token and cube by cube, fp32."""

    def run(rows: torch.Tensor) -> torch.Tensor:
        gate, up = (rows @ gate_up.float().T).chunk(2, -1)
        return torch.nn.functional.silu(gate) * up @ down.float().T

    x = x.float()
    out = run(x)
    for cube, tokens in enumerate(plan.tokens):
        ran, skipped = tokens[active[cube]], tokens[~active[cube]]
        if not len(skipped):
            continue
        out[skipped] = {
            "centroid": lambda a=skipped: run(x[a].mean(0, keepdim=True))[0],
            "mean": lambda a=ran: out[a].mean(0),
            "bypass": lambda: torch.zeros(()),
        }[COMPENSATIONS[plan.compensation[cube]]]()
    return out


@pytest.mark.parametrize(
    "names", [("bypass",), ("mean", "bypass"), ("centroid",), ("centroid", "mean", "bypass")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ffn_equals_naive(
    names: tuple[str, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(len(names))
    tokens, size, hidden, inner = 300, 32, 48, 72
    x = torch.randn(tokens, hidden).to(dtype)
    gate_up = (torch.randn(2 * inner, hidden) / hidden**0.5).to(dtype)
    down = (torch.randn(hidden, inner) / inner**0.5).to(dtype)
    firsts = torch.tensor([5, 37, 120, 152, 268])
    active = torch.rand(5, size) < 0.5
    active[:, 0] = True
    active[1] = True  # a cube that skips nothing
    codes = torch.tensor([COMPENSATIONS.index(names[i % len(names)]) for i in range(5)])
    plan = SimpleNamespace(
        tokens=firsts[:, None] + torch.arange(size),
        compensation=codes,
        compensations=tuple(codes.unique().tolist()),
    )
    assert ffn.waits_for_nothing(x, gate_up, down)
    seen = []
    # A centroid runs for a cube that wants one and has a token that skips.
    wanted = (codes == COMPENSATIONS.index("centroid")) & ~active.all(1)
    count = tokens - 5 * size + int(active.sum()) + int(wanted.sum())

    def reduce(y: torch.Tensor) -> torch.Tensor:
        seen.append(len(y))
        y = y.clone()
        y[count:] = float("nan")  # rows that nothing may read
        return y

    products = []
    monkeypatch.setattr(ffn, "_grouped", lambda x, w, rows: products.append(rows) or (x @ w.T))
    got = ffn.sparse_swiglu(x, gate_up, down, active, plan, reduce)
    assert [int(rows) for rows in products] == [count, count], "rows that run, and are charged"
    want = naive_ffn(x, gate_up, down, active, plan)
    assert got.dtype == dtype
    assert relative_rms(got, want) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert seen == [tokens + (5 if "centroid" in names else 0)]


def test_switch_needs_the_interpreter_or_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.use_triton(torch.zeros(1))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not kernels.use_triton(torch.zeros(1))


# In a layer: the same with and without the kernels, from the planner's own plans


def counting(monkeypatch: pytest.MonkeyPatch, module, name: str) -> list[str]:
    """A list that gets ``name`` at each call of ``module.name``."""
    calls, original = [], getattr(module, name)

    def call(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize(
    "selection_rule, head_size, group, summary, tile_cubes",
    [
        ("top_p", 16, 5, "sums", 1),
        ("top_p", 16, 5, "sums", 2),
        ("top_p", 16, 5, "bounds", 1),
        ("top_k", 80, 1, "sums", 1),
        ("top_k", 24, 1, "bounds", 1),
        ("uniform", 16, 2, "sums", 2),
    ],
)
def test_layer_attention_equals_torch(
    selection_rule: str,
    head_size: int,
    group: int,
    summary: str,
    tile_cubes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Heads of sizes that the score kernels do not take are scored in PyTorch."""
    config = AdaSparkConfig(
        p_attn=0.6, min_cubes=1, selection=selection_rule, cube=(2, 4, 4), dense_below=1
    )
    shape = dict(heads=2 * group, kv_heads=2, head_size=head_size, dtype=torch.float32)
    rng, pool = np.random.default_rng(0), list(range(1, 40))
    layout = [("text", 9), ("video", 32 * 7 + 3), ("text", 5)]
    requests = [
        random_request(rng, config, layout, **shape, pool=pool, sharpness=2.0) for _ in range(2)
    ]
    step = [(request, len(request.is_video)) for request in requests]
    rows = rows_of(step)
    q, k = (gather(step, name) for name in "qk")
    plan = build_plan(
        rows, known_of(step), 32, dense_below=1, cube_queries=16, tile_cubes=tile_cubes,
        device=q.device,
    )  # fmt: skip
    kept = KEY_SUMMARIES[summary](40, 2, head_size, 32, q.device, k.dtype)
    kept.write(k, plan.summary_writes)
    by_head = q.unflatten(1, (2, group)).transpose(0, 1).contiguous()

    calls = [
        counting(monkeypatch, *each)
        for each in (
            (score, "pool_probabilities"),
            (score, "token_probabilities"),
            (nucleus, "top_p"),
            (tables, "compact_tables"),
        )
    ]

    def run() -> tuple:
        chosen = attention_score.choose_cubes(by_head, kept, plan.attention, head_size**-0.5, 0)
        return chosen, attention_tables.build_tables(chosen, plan.attention, 32)

    chosen, batch = run()
    used, fits = [bool(each) for each in calls], head_size == 16
    scored = selection_rule != "uniform" and fits
    assert used == [scored, scored, selection_rule == "top_p", True]
    assert kernels.score_products("cpu", head_size, kept.number) == (1 + fits) * kept.number
    for module in (attention_score, attention_tables, selection):
        monkeypatch.setattr(module, "use_triton", lambda tensor: False)
    want, want_batch = run()
    candidates = plan.attention.candidates[:, None].expand_as(want)
    assert want.any() and (want != candidates).any(), "some cubes kept, some left out"
    assert torch.equal(chosen, want)
    assert torch.equal(batch.block_table[:, :-1], want_batch.block_table[:, :-1])
    assert torch.equal(batch.seq_lens, want_batch.seq_lens)


@pytest.mark.parametrize("importance", ["deviation", "norm"])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_layer_ffn_equals_torch(
    importance: str, compensation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from vllm_adaspark.methods.adaspark import ffn as token_ffn
    from vllm_adaspark.models import sparse_mlp as plugin_ffn

    config = AdaSparkConfig(
        p_ffn=0.5, importance=importance, compensation=compensation, cube=(2, 4, 4)
    )
    layout = [("text", 9), ("video", 32 * 3 + 3), ("text", 5)]
    request = random_request(
        np.random.default_rng(0), config, layout, heads=1, kv_heads=1, head_size=16,
        dtype=torch.float32, pool=list(range(1, 9)),
    )  # fmt: skip
    step = [(request, len(request.is_video))]
    plan = build_plan(
        rows_of(step), known_of(step), 32, dense_below=1,
        cube_queries=16, device=torch.device("cpu"),
    )  # fmt: skip

    class Linear(torch.nn.Module):
        tp_size = 1

        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5, False)
            self.quant_method = UnquantizedLinearMethod()

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return x @ self.weight.T, None

    mlp = plugin_ffn.SparseMLP.__new__(plugin_ffn.SparseMLP)
    torch.nn.Module.__init__(mlp)
    mlp.gate_up_proj, mlp.down_proj = Linear(24, 64), Linear(32, 24)
    mlp.act_fn = lambda x: torch.nn.functional.silu(x[:, :32]) * x[:, 32:]
    method = harness.adaspark(config, 1, 1, 16)
    mlp.adaspark, mlp.adaspark_layer = Runtime(method), 0
    mlp.adaspark.plan = plan
    monkeypatch.setattr(plugin_ffn, "get_tensor_model_parallel_world_size", lambda: 1)
    x, residual = torch.randn(2, len(request.is_video), 24)
    calls = [counting(monkeypatch, ffn, name) for name in ("sparse_swiglu", "token_norms")]
    got, active = mlp.run(x, residual), plan.ffn_active[0]
    assert all(calls)
    fused = len(calls[0])
    mlp.adaspark.lora = SimpleNamespace(idle=False, gathered=nullcontext)  # an adapter runs
    assert relative_rms(mlp.run(x, residual), got) == 0 and len(calls[0]) == fused + 1
    mlp.takes_lora, fused = True, fused + 1
    assert relative_rms(mlp.run(x, residual), got) < 1e-6 and len(calls[0]) == fused
    for module in (plugin_ffn, token_ffn, selection):
        monkeypatch.setattr(module, "use_triton", lambda tensor: False)
    want = mlp.run(x, residual)
    assert torch.equal(active, plan.ffn_active[0]) and (active < 32).all()
    assert relative_rms(got, want) < 1e-6
