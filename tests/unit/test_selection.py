"""Selection: the vectorised rules against the twin's loops, and by hand."""

import numpy as np
import pytest
import torch

from vllm_adaspark.methods.adaspark.choose import (
    BUDGET,
    TOP_K,
    TOP_P,
    UNIFORM,
    BudgetGroups,
    select,
    top_k,
    top_p,
    under_budget,
    uniform,
)
from vllm_adaspark.methods.adaspark.reference_choice import choose, choose_under_budget
from vllm_adaspark.methods.adaspark.settings import SELECTIONS, AdaSparkConfig


def one_row(rule, probs, share, min_keep=1, valid=None):
    """Indices kept in a single row."""
    probs = torch.tensor(probs)
    valid = torch.ones_like(probs, dtype=torch.bool) if valid is None else torch.tensor(valid)
    share, min_keep = torch.tensor(share), torch.tensor(min_keep)
    if rule is uniform:
        kept = uniform(valid, share, min_keep)
    else:
        kept = rule(probs, valid, share, min_keep)
    return kept.nonzero().flatten().tolist()


def naive(probs, valid, rule, share, min_keep):
    """The twin's choice, row by row; all ``[rows, n]`` or ``[rows]``."""
    kept = torch.zeros_like(valid)
    for row in range(len(probs)):
        config = AdaSparkConfig(
            selection=SELECTIONS[rule[row]],
            p_attn=share[row].item(),
            keep=share[row].item(),
            min_cubes=min_keep[row].item(),
        )
        there = valid[row].nonzero().flatten()
        if len(there):
            kept[row, there] = choose(probs[row, there], config)[0]
    return kept


def dyadic_rows(rows, n, generator):
    """Probabilities in 64ths, so that sums are exact and ties and exact hits are common."""
    valid = torch.rand(rows, n, generator=generator) < torch.rand(rows, 1, generator=generator)
    probs = torch.zeros(rows, n)
    for row in range(rows):
        there = valid[row].nonzero().flatten()
        if len(there):
            at = there[torch.randint(len(there), (64,), generator=generator)]
            probs[row].index_add_(0, at, torch.full((64,), 1 / 64))
    return probs, valid


def random_settings(rows, generator, shares):
    rule = torch.randint(0, 3, (rows,), generator=generator)
    share = shares[torch.randint(len(shares), (rows,), generator=generator)]
    min_keep = torch.randint(1, 5, (rows,), generator=generator)
    return rule, share, min_keep


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        (0.25, [1]),
        (0.5, [1]),  # reached exactly: no more
        (0.501, [1, 3]),
        (0.75, [1, 3]),
        (0.751, [0, 1, 3]),  # 0 and 2 tie: the earlier one
        (0.875, [0, 1, 3]),
        (0.876, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_by_hand(share, kept):
    assert one_row(top_p, [0.125, 0.5, 0.125, 0.25], share) == kept


@pytest.mark.parametrize(
    ("share", "kept"),
    [(0.001, [1]), (0.25, [1]), (0.251, [1, 3]), (0.75, [0, 1, 3]), (1.0, [0, 1, 2, 3])],
)
def test_top_k_by_hand(share, kept):
    assert one_row(top_k, [0.125, 0.5, 0.125, 0.25], share) == kept


@pytest.mark.parametrize(
    ("share", "kept"),
    [(0.1, [9]), (0.2, [4, 9]), (0.3, [3, 6, 9]), (0.5, [1, 3, 5, 7, 9]), (1.0, list(range(10)))],
)
def test_uniform_by_hand(share, kept):
    assert one_row(uniform, [0.1] * 10, share) == kept


@pytest.mark.parametrize("number", [1, 2, 7, 10, 64, 101])
def test_uniform_keeps_the_numbers_that_the_docs_say(number):
    for kept in range(1, number + 1):
        told = [-(-(j + 1) * number // kept) - 1 for j in range(kept)]
        assert one_row(uniform, [1 / number] * number, 0.001, min_keep=kept) == told
        assert told[-1] == number - 1


def test_share_times_count_is_not_rounded_up_by_floating_point():
    # 0.1 * 30 and 0.7 * 10 are a little above 3 and 7 in floating point or not at all.
    assert len(one_row(top_k, [1 / 30] * 30, 0.1)) == 3
    assert len(one_row(top_k, [0.1] * 10, 0.7)) == 7
    assert len(one_row(uniform, [0.1] * 30, 0.1)) == 3
    # A thousandth more is one more.
    assert len(one_row(top_k, [0.1] * 10, 0.701)) == 8
    assert len(one_row(top_k, [1 / 3] * 3, 0.667)) == 3


@pytest.mark.parametrize("rule", [top_p, top_k, uniform])
def test_min_keep(rule):
    probs = [0.7, 0.1, 0.1, 0.05, 0.05]
    assert len(one_row(rule, probs, 0.01)) == 1
    assert len(one_row(rule, probs, 0.01, min_keep=3)) == 3
    assert len(one_row(rule, probs, 0.01, min_keep=16)) == 5  # at most all
    # Entries that are not there do not count towards it.
    valid = [False, True, False, True, True]
    assert one_row(rule, [0.0, 0.5, 0.0, 0.25, 0.25], 0.01, min_keep=3, valid=valid) == [1, 3, 4]


@pytest.mark.parametrize("rule", [top_p, top_k, uniform])
def test_share_one_keeps_every_valid_entry(rule):
    # Rounding lets the cumulated mass pass 1 before the last entries, and some have none.
    probs = torch.cat([torch.full((49,), 1 / 49 + 1e-3), torch.zeros(3)])
    valid = [True] * 51 + [False]
    assert one_row(rule, probs.tolist(), 1.0, valid=valid) == list(range(51))


@pytest.mark.parametrize("rule", [top_p, top_k, uniform])
def test_what_is_not_there_is_not_kept(rule):
    assert one_row(rule, [0.0, 0.0], 1.0, valid=[False, False]) == []
    # Not even if it holds NaN or a large number.
    kept = one_row(rule, [float("nan"), 1.0, 9.0], 0.5, valid=[False, True, False])
    assert kept == [1]


@pytest.mark.parametrize("n", [1, 2, 7, 33])
def test_mixed_rows_equal_the_loops_exactly_with_ties(n):
    generator = torch.Generator().manual_seed(n)
    probs, valid = dyadic_rows(400, n, generator)
    eighths = torch.arange(1, 9) / 8  # exact in thousandths and in binary
    rule, share, min_keep = random_settings(400, generator, eighths)
    expected = naive(probs, valid, rule, share, min_keep)
    assert torch.equal(select(probs, valid, rule, share, min_keep), expected)


def test_mixed_rows_equal_the_loops_on_softmax_rows():
    generator = torch.Generator().manual_seed(0)
    rows, n = 400, 40
    logits = 2 * torch.randn(rows, n, generator=generator, dtype=torch.float64)
    valid = torch.arange(n) < torch.randint(1, n + 1, (rows, 1), generator=generator)
    probs = logits.masked_fill(~valid, -torch.inf).softmax(-1)
    thousandths = torch.arange(1, 1001, dtype=torch.float64) / 1000
    rule, share, min_keep = random_settings(rows, generator, thousandths)
    expected = naive(probs, valid, rule, share, min_keep)
    assert torch.equal(select(probs, valid, rule, share, min_keep), expected)


def test_leading_dimensions():
    generator = torch.Generator().manual_seed(0)
    probs, valid = dyadic_rows(24, 9, generator)
    rule, share, min_keep = random_settings(24, generator, torch.arange(1, 9) / 8)
    flat = select(probs, valid, rule, share, min_keep)
    shape = (2, 3, 4)
    shaped = select(
        probs.view(*shape, 9),
        valid.view(*shape, 9),
        rule.view(shape),
        share.view(shape),
        min_keep.view(shape),
    )
    assert torch.equal(shaped.flatten(0, 2), flat)


@pytest.mark.parametrize("rules", [(TOP_P,), (TOP_K,), (UNIFORM,), (UNIFORM, TOP_P)])
def test_only_the_rules_that_occur(rules):
    generator = torch.Generator().manual_seed(0)
    probs, valid = dyadic_rows(60, 12, generator)
    _, share, min_keep = random_settings(60, generator, torch.arange(1, 9) / 8)
    rule = torch.tensor(rules)[torch.arange(60) % len(rules)]
    expected = naive(probs, valid, rule, share, min_keep)
    assert torch.equal(select(probs, valid, rule, share, min_keep, rules), expected)


def test_top_p_mass_is_reached_and_smallest():
    generator = torch.Generator().manual_seed(3)
    probs = (3 * torch.randn(200, 30, generator=generator)).softmax(-1).double()
    probs /= probs.sum(-1, keepdim=True)
    share = torch.rand(200, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    valid = torch.ones_like(probs, dtype=torch.bool)
    kept = top_p(probs, valid, share, torch.ones(200, dtype=torch.long))
    mass = (probs * kept).sum(-1)
    least = probs.masked_fill(~kept, 2).amin(-1)
    most_left_out = probs.masked_fill(kept, -1).amax(-1)
    assert (mass >= share - 1e-12).all()
    assert (mass - least < share + 1e-12).all()
    assert (least >= most_left_out).all()


def budget_groups(rows, share, valid, least):
    """One group over ``rows [groups, rows]``, each row keeping ``share`` or ``least`` entries; a
    row that occurs twice counts twice."""
    entries = valid[torch.tensor(rows), 0].sum(-1)  # [groups, rows], the same for each head
    keep = torch.maximum(share * entries, entries.clamp(max=least)).sum(1).numpy()
    return (BudgetGroups.of(np.array(rows), keep, valid.device),)


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_equals_the_loops_exactly_with_ties(seed):
    generator = torch.Generator().manual_seed(seed)
    heads, n = 2, 24
    probs, valid = dyadic_rows(12 * heads, n, generator)
    valid[:, -1], probs[:, -1] = False, 0  # a tile's own block is no candidate
    probs, valid = probs.view(12, heads, n), valid.view(12, heads, n)
    valid[:] = valid[:, :1]  # all heads of a tile have the same candidates
    probs = torch.where(valid, probs, 0.0)
    least = torch.randint(1, 3, (1, 1), generator=generator).expand(12, heads)
    share = float(torch.randint(1, 8, (), generator=generator)) / 8
    together, each = [0, 1, 1, 2, 3, 4, 4], [[5], [6], [7]]  # tiles 1 and 4 are of two cubes
    at_least = int(least[0, 0])
    groups = budget_groups([together], share, valid, at_least)
    groups += budget_groups(each, share, valid, at_least)
    kept = under_budget(probs, valid, least, groups)
    assert not kept[8:].any()  # rows of no group
    for group in [together, *each]:
        rows = [(tile, head) for tile in sorted(set(group)) for head in range(heads)]
        rows = [(tile, head) for tile, head in rows if valid[tile, head].any()]
        if not rows:
            continue
        asked = [probs[tile, head][valid[tile, head]] for tile, head in rows]
        weights = [group.count(tile) for tile, _ in rows]
        expected, _ = choose_under_budget(asked, share, at_least, weights=weights)
        for (tile, head), want in zip(rows, expected, strict=True):
            assert torch.equal(kept[tile, head][valid[tile, head]], want), (tile, head)


def test_a_budget_is_never_exceeded_and_goes_to_the_flat_rows():
    generator = torch.Generator().manual_seed(0)
    sharpness = torch.linspace(0.1, 8, 40)[:, None, None]
    probs = (torch.randn(40, 2, 64, generator=generator) * sharpness).softmax(-1)
    valid = torch.ones_like(probs, dtype=torch.bool)
    least = torch.ones(40, 1, dtype=torch.long)
    groups = (BudgetGroups.of(np.arange(40)[None], np.array([0.3 * 40 * 64]), probs.device),)
    kept = under_budget(probs, valid, least, groups)
    number = int(kept.sum())
    assert 0.3 * kept.numel() - 2 <= number <= 0.3 * kept.numel()
    assert kept.any(-1).all()
    assert kept[:10].sum() > 3 * kept[-10:].sum()


def test_a_budget_too_small_for_min_keep_keeps_that():
    probs = torch.tensor([[[0.5, 0.25, 0.25, 0.0]], [[0.1, 0.2, 0.3, 0.4]]])
    valid = torch.ones_like(probs, dtype=torch.bool)
    groups = (BudgetGroups.of(np.array([[0, 1]]), np.array([0.08]), probs.device),)
    kept = under_budget(probs, valid, torch.full((2, 1), 2), groups)
    assert kept.squeeze(1).tolist() == [[True, True, False, False], [False, False, True, True]]


def test_rows_with_and_without_a_budget_at_once():
    generator = torch.Generator().manual_seed(3)
    probs = torch.randn(6, 1, 16, generator=generator).softmax(-1)
    valid = torch.ones_like(probs, dtype=torch.bool)
    rule = torch.tensor([BUDGET, BUDGET, TOP_P, TOP_K, UNIFORM, TOP_P])[:, None]
    share = torch.full((6, 1), 0.5)
    least = torch.ones(6, 1, dtype=torch.long)
    groups = (BudgetGroups.of(np.array([[0, 1]]), np.array([16.0]), probs.device),)
    kept = select(probs, valid, rule, share, least, (TOP_P, TOP_K, UNIFORM, BUDGET), groups)
    assert torch.equal(kept[:2], under_budget(probs, valid, least, groups)[:2])
    assert kept[:2].sum() == 16
    assert torch.equal(kept[2], top_p(probs, valid, share, least)[2])
    assert torch.equal(kept[3], top_k(probs, valid, share, least)[3])
    assert torch.equal(kept[4], uniform(valid, share, least)[4])
