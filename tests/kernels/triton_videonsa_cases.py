"""VideoNSA's Triton kernels against their twins, run by test_triton.py under the interpreter.

Not collected by itself: the interpreter must be asked for before anything imports Triton.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_adaspark import kernels
from vllm_adaspark.kernels import videonsa_compress, videonsa_select
from vllm_adaspark.kernels import videonsa_twins as twins
from vllm_adaspark.methods.videonsa import compress as layer
from vllm_adaspark.methods.videonsa import select
from vllm_adaspark.methods.videonsa.plan import build_plan
from vllm_adaspark.methods.videonsa.request import VideoNSARequest
from vllm_adaspark.methods.videonsa.settings import VideoNSASettings
from vllm_adaspark.paged.state import BlockSums, StepRows

assert kernels.interpreted(), "run through tests/kernels/test_triton.py"

NAN = float("nan")


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.float(), want.float()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def means(
    group: int, kv_heads: int, d: int, dtype: torch.dtype, ranges: list[tuple[int, int]]
) -> dict:
    """Arguments of `compress` for a token per range, in an order that is not the step's."""
    torch.manual_seed(group * d)
    n, width = len(ranges), max(end for _, end in ranges) + 3
    begin, end = torch.tensor(ranges, dtype=torch.int32).T.contiguous()
    keys, values = torch.randn(2, kv_heads, width, d)
    keys[:, end.max() :] = values[:, end.max() :] = NAN  # seen by nobody
    return dict(
        query=(2 * torch.randn(2 * n, kv_heads * group, d)).to(dtype),
        tokens=torch.randperm(2 * n)[:n],
        mean_keys=keys,
        mean_values=values.to(dtype),
        begin=begin,
        end=end,
        longest=int((end - begin).max()) + 2,
        scale=d**-0.5,
    )


# A request after the other, as they share a step: rising ranges, some empty, one long.
RANGES = [(0, end) for end in (0, 0, 1, 1, 2, 30)] + [(30, end) for end in (30, 31, 70, 110)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group, kv_heads, d", [(7, 2, 16), (2, 1, 32), (1, 2, 16), (20, 1, 16)])
def test_videonsa_compress_equals_twin(
    group: int, kv_heads: int, d: int, dtype: torch.dtype
) -> None:
    arguments = means(group, kv_heads, d, dtype, RANGES)
    out, importance = videonsa_compress.compress(**arguments)
    want, want_importance = twins.compress(**arguments)
    # The interpreter rounds bf16 probabilities towards zero.
    assert relative_rms(out, want) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert (out[[0, 1, 6]] == 0).all(), "tokens that see nothing"
    assert not out.isnan().any()
    for nth, (begin, end) in enumerate(RANGES):
        mine = slice(0, end - begin)
        got, right = importance[nth, :, mine], want_importance[nth, :, mine]
        assert torch.allclose(got, right, atol=2e-6), "fp32 logits, whatever the queries' dtype"
        if end > begin:
            assert torch.allclose(got.sum(-1), torch.tensor(float(group)), atol=1e-4)


def test_videonsa_compress_keeps_its_hands_off_other_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = means(2, 1, 16, torch.float32, RANGES)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(-7))
    _, importance = videonsa_compress.compress(**arguments)
    for nth, (begin, end) in enumerate(RANGES):
        assert (importance[nth, :, : end - begin] >= 0).all()
        assert (importance[nth, :, end - begin :] == -7).all()


def test_videonsa_compress_survives_large_logits() -> None:
    arguments = means(2, 1, 16, torch.float32, [(0, 100)])
    arguments["query"] *= 100
    out, importance = videonsa_compress.compress(**arguments)
    want, want_importance = twins.compress(**arguments)
    assert relative_rms(out, want) < 1e-4
    assert torch.allclose(importance[..., :100], want_importance[..., :100], atol=1e-4)


def test_videonsa_compress_and_choose_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = means(7, 2, 16, torch.float32, RANGES)
    monkeypatch.setattr(videonsa_compress, "SLAB_IMPORTANCES", 3 * 2 * arguments["longest"])
    out, chosen = videonsa_compress.compress_and_choose(**arguments, places=4)
    want, importance = twins.compress(**arguments)
    begin, end = arguments["begin"], arguments["end"]
    columns = twins.best(importance, end - begin, 4)
    assert relative_rms(out, want) < 1e-6
    assert torch.equal(chosen, torch.where(columns < 0, -1, columns + begin[:, None, None]))
    assert chosen[5].min() >= 0 and chosen[5].max() < 30
    assert chosen[9].min() >= 30 and chosen[9].max() < 110
    assert (chosen[[0, 1, 6]] == -1).all()


@pytest.mark.parametrize("head_size", [16, 64, 128, 256])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("padded", [1, 8, 32])
def test_videonsa_compress_blocks_are_what_a_product_takes(
    head_size, element_bytes, padded
) -> None:
    rows, columns = videonsa_compress.block_shape(head_size, padded, element_bytes)
    assert rows >= 16 and columns >= 16 and rows % padded == 0
    assert all(number.bit_count() == 1 for number in (rows, columns))


def test_videonsa_compress_refuses_a_head_size_it_cannot_tile() -> None:
    arguments = means(1, 1, 80, torch.float32, [(0, 2)])
    with pytest.raises(ValueError, match="head_size=80"):
        videonsa_compress.compress(**arguments)


@pytest.mark.parametrize("longest, places", [(1, 5), (40, 7), (130, 31)])
def test_videonsa_best_equals_twin(longest: int, places: int) -> None:
    """With ties, fewer columns than places, and what is past a token's columns full of NaN."""
    torch.manual_seed(longest)
    importance = torch.rand(6, 2, longest)
    importance[1] = importance[1].mul(4).round()  # many ties
    importance[2] = 0
    count = torch.tensor([longest, longest, longest, 0, longest // 2, min(longest, places)]).int()
    past = torch.arange(longest) >= count[:, None, None]
    importance.masked_fill_(past, NAN)
    chosen = videonsa_compress.best(importance, count, places)
    assert torch.equal(chosen, twins.best(importance, count, places))
    for nth in range(6):
        for head in range(2):
            row = importance[nth, head, : count[nth]].tolist()
            want = sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:places])
            assert chosen[nth, head].tolist() == want + [-1] * (places - len(want))


def test_videonsa_best_of_nothing_and_of_too_much() -> None:
    count = torch.zeros(3, dtype=torch.int32)
    assert videonsa_compress.best(torch.zeros(3, 2, 0), count, 0).shape == (3, 2, 0)
    assert (videonsa_compress.best(torch.zeros(3, 2, 0), count, 5) == -1).all()
    with pytest.raises(ValueError, match="16385"):
        videonsa_compress.best(torch.zeros(3, 2, 16385), count, 5)


def pages_of(group: int, kv_heads: int, d: int, block_size: int, places: int, dtype) -> dict:
    """Arguments of `select`: five tokens, NaN in all that none of them may read."""
    torch.manual_seed(group + d)
    n, blocks = 5, 12
    cache = torch.randn(blocks, kv_heads, block_size, 2 * d)
    pages = torch.randint(0, blocks - n, (n, kv_heads, places), dtype=torch.int32)
    pages[0] = -1  # nothing but its own block
    pages[1, :, places // 2 :] = -1  # as `best` leaves it
    pages[2, :, ::2] = -1  # and as it does not
    own = blocks - n + torch.randperm(n).int()
    offset = torch.tensor([0, block_size - 1, 3, block_size // 2, 1], dtype=torch.int32)
    for mine, last in zip(own.tolist(), offset.tolist(), strict=True):
        cache[mine, :, last + 1 :] = NAN
    for head in range(kv_heads):
        unread = set(range(blocks - n)) - set(pages[:, head].flatten().tolist())
        cache[sorted(unread), head] = NAN
    return dict(
        query=torch.randn(2 * n, kv_heads * group, d).to(dtype),
        tokens=torch.randperm(2 * n)[:n],
        cache=cache.to(dtype),
        pages=pages,
        own=own,
        offset=offset,
        scale=d**-0.5,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "group, kv_heads, d, block_size, places",
    [(7, 2, 16, 64, 3), (2, 1, 32, 16, 5), (16, 2, 16, 32, 1), (20, 1, 16, 16, 2)],
)
def test_videonsa_select_equals_twin(group, kv_heads, d, block_size, places, dtype) -> None:
    arguments = pages_of(group, kv_heads, d, block_size, places, dtype)
    got, want = videonsa_select.select(**arguments), twins.select(**arguments)
    assert got.dtype == dtype and got.shape == want.shape
    assert not got.isnan().any()
    # The interpreter rounds bf16 probabilities towards zero.
    assert relative_rms(got, want) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_videonsa_select_without_places_sees_its_own_block() -> None:
    arguments = pages_of(2, 2, 16, 64, 1, torch.float32)
    arguments["pages"] = arguments["pages"][..., :0]
    got, want = videonsa_select.select(**arguments), twins.select(**arguments)
    assert relative_rms(got, want) < 1e-6


def test_videonsa_select_refuses_what_it_cannot_read() -> None:
    arguments = pages_of(2, 2, 16, 64, 1, torch.float32)
    for change, message in (
        (dict(cache=arguments["cache"].bfloat16()), "bfloat16.*float32"),
        (dict(cache=arguments["cache"].transpose(1, 2)), "contiguous"),
        (dict(cache=arguments["cache"][:, :, :48].contiguous()), "block_size=48"),
    ):
        with pytest.raises(ValueError, match=message):
            videonsa_select.select(**arguments | change)


def test_videonsa_layer_equals_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a layer, from the planner's own plan: output, table and trace of two requests."""
    settings, heads, kv_heads, d = VideoNSASettings(block_counts=3), 4, 2, 16
    # Chunks of few tokens, because a program of the interpreter takes long.
    lengths, start, width = (64 * 7 + 3, 64 + 2), np.array([0, 6, 10]), 8
    blocks = np.random.default_rng(0).permutation(2 * width).astype(np.int32).reshape(2, width)
    rows = StepRows(start, np.array(lengths), blocks)
    requests = [VideoNSARequest(settings, np.ones(length, bool)) for length in lengths]
    plan = build_plan(rows, requests, torch.device("cpu"))
    torch.manual_seed(0)
    sums = [BlockSums(2 * width, kv_heads, d, 64, torch.device("cpu")) for _ in range(2)]
    for each in sums:
        each.vectors.normal_().mul_(64)
    branches = plan.attention
    query = 2 * torch.randn(branches.number, kv_heads, heads // kv_heads, d)

    def run() -> tuple[torch.Tensor, ...]:
        traced = torch.zeros(branches.number, kv_heads, branches.blocks, dtype=torch.bool)
        branches.selection(kv_heads).block_table.fill_(-1)
        out = layer.compress(query, branches, *sums, d**-0.5, None, traced)
        table = branches.shared.block_table.view(kv_heads, branches.number, -1)
        unused = torch.arange(table.shape[-1]) > branches.places[:, None]
        return out, table.masked_fill(unused, -1).sort(-1).values, traced

    calls, best = [], videonsa_compress.best
    monkeypatch.setattr(videonsa_compress, "best", lambda *a: calls.append(1) or best(*a))
    got = run()
    assert len(calls) == 2, "a row each"
    monkeypatch.setattr(layer, "use_triton", lambda tensor: False)
    want = run()
    assert relative_rms(got[0], want[0]) < 1e-5
    assert torch.equal(got[1], want[1]) and torch.equal(got[2], want[2])
    assert torch.equal(got[2].sum(-1), branches.places[:, None].expand(-1, kv_heads))


@pytest.mark.parametrize("block_counts", [3, 1])
def test_videonsa_selects_over_a_gpus_cache(block_counts: int) -> None:
    """From the planner's plan and a layer's table, over a cache as GPU backends keep it."""
    settings = VideoNSASettings(block_counts=block_counts)
    kv_heads, group, d = 2, 2, 16
    torch.manual_seed(3)
    prompts, queries = [("t" * 20 + "v" * 330), "v" * 210, "v" * 40], [12, 8, 4]  # the last tokens
    lengths = np.array([len(prompt) for prompt in prompts])
    table = torch.randperm(24)[: 3 * 6].view(3, 6)
    rows = StepRows(np.cumsum([0, *queries]), lengths, table.int().numpy())
    known = [VideoNSARequest(settings, np.array(list(prompt)) == "v") for prompt in prompts]
    plan = build_plan(rows, known, torch.device("cpu")).attention
    query = torch.randn(sum(queries), kv_heads * group, d)
    cache = torch.full((24, kv_heads, 64, 2 * d), NAN)
    for blocks, length in zip(table, lengths, strict=True):
        at = torch.arange(length)
        cache[blocks[at // 64], :, at % 64] = torch.randn(length, kv_heads, 2 * d)
    sums = [BlockSums(24, kv_heads, d, 64, cache.device) for _ in "kv"]
    for of, part in zip(sums, cache.split(d, -1), strict=True):
        of.vectors.copy_(part.sum(2))
    layer.compress(query.unflatten(1, (kv_heads, -1)), plan, *sums, d**-0.5, None)
    call = SimpleNamespace(kv_cache=cache, kv_heads=kv_heads, scale=d**-0.5)
    got = select.by_kernel(call, plan, query).flatten(1, 2)
    seen = plan.selection(kv_heads).block_table.view(kv_heads, plan.number, -1)
    for nth, (places, length) in enumerate(zip(plan.places, plan.selected_lens, strict=True)):
        for head in range(kv_heads):
            blocks = seen[head, nth, : int(places) + 1] // kv_heads
            keys, values = cache[blocks, head].flatten(0, 1)[:length].split(d, -1)
            q = query[nth].unflatten(0, (kv_heads, -1))[head]
            want = (q @ keys.T * d**-0.5).softmax(-1) @ values
            assert relative_rms(got[nth].unflatten(0, (kv_heads, -1))[head], want) < 1e-5
