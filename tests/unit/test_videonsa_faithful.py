"""VideoNSA's faithful mode: each step of the transcription, and the closed forms against it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from vllm_adaspark.methods.videonsa import faithful
from vllm_adaspark.methods.videonsa import faithful_reference as reference

# Scores closer than this may be ranked either way by float32.
TIE = 1e-4


@dataclass
class Prompt:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    vision: torch.Tensor
    z: torch.Tensor
    scale: float

    def reference(self, **settings) -> reference.Answer:
        return reference.attend(
            self.q, self.k, self.v, self.vision, self.z, scale=self.scale, **settings
        )


def prompt(layout: list[int], heads: int = 28, kv_heads: int = 4, d: int = 8, seed=0) -> Prompt:
    """A random prompt: so many text tokens, then so many vision tokens, and so on in turn."""
    torch.manual_seed(seed)
    vision = torch.tensor([nth % 2 == 1 for nth, n in enumerate(layout) for _ in range(n)]).bool()
    tokens = len(vision)
    drift = torch.randn(tokens // 16 + 1, kv_heads, d).repeat_interleave(16, 0)[:tokens]
    return Prompt(
        q=1.5 * torch.randn(tokens, heads, d),
        k=torch.randn(tokens, kv_heads, d) + drift,
        v=torch.randn(tokens, kv_heads, d),
        vision=vision,
        z=torch.randn(tokens, heads, 3),
        scale=d**-0.5,
    )


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm())


# The steps of the transcription


def test_a_vision_token_gets_the_mean_of_all_values() -> None:
    """Spec 5.1: the dense pass of a zero query, with text values and the model's own head map."""
    p = prompt([5, 30, 7])
    k, v = p.k.double(), p.v.double()
    dense = reference.dense_pass(p.q.double(), k, v, p.vision, p.scale)
    for t in (5, 20, 34):
        for head in (0, 6, 7, 27):
            assert torch.allclose(dense[t, head], v[: t + 1, head // 7].mean(0))
    plan = faithful.plan_prompt(p.vision.numpy(), 32, 256, p.q.device)
    want = dense[p.vision][:, ::7]  # one head of each group
    assert relative_rms(faithful.value_means(plan, p.v), want) < 1e-6


def test_text_tokens_get_half_of_each_branch() -> None:
    """Spec 5.2, for all kinds of text tokens: before, between and behind vision tokens."""
    p = prompt([70, 60, 9, 90, 30])
    answer = p.reference(block_counts=2, window=50)
    plan = faithful.plan_prompt(p.vision.numpy(), 2, 50, p.q.device)
    _, v0 = reference.null_text(p.k, p.v, p.vision)
    terms = faithful.text_terms(plan, v0, faithful.block_means(v0), 28)
    assert relative_rms(terms, answer.nsa[~p.vision]) < 1e-5

    # Token 135 in words: block 2; with two places it selects block 0 and its own.
    t, head = 135, 3  # head 3's copies are with KV heads 0 and 1
    blocks = [v0[64 * j : 64 * j + 64].mean(0) for j in range(5)]
    want = torch.zeros(8)
    for g in (0, 1):
        compressed = torch.stack(blocks[2:])[:, g].mean(0)
        selected = torch.cat([v0[:64, g], v0[128:136, g]]).mean(0)
        want += 0.5 * 0.5 * (compressed + selected + v0[86:136, g].mean(0))
    assert torch.allclose(answer.nsa[t, head].float(), want, atol=1e-6)


def test_gates_of_text_are_one_half() -> None:
    p = prompt([4, 4])
    gates = reference.gates_of(p.z, p.vision)
    assert (gates[:4] == 0.5).all()
    assert torch.allclose(gates[4:], (p.z[4:] / 0.3).sigmoid())


def test_text_is_null_but_there() -> None:
    """Spec 5.3: what text keys and values are is nothing to the branches, that they are is."""
    p = prompt([9, 100])
    nsa = p.reference().nsa[p.vision]
    p.k[:9], p.v[:9] = 77, -55
    assert torch.equal(p.reference().nsa[p.vision], nsa)
    k0, v0 = reference.null_text(p.k, p.v, p.vision)
    assert (k0[:9] == 0).all() and torch.equal(k0[9:], p.k[9:]) and torch.equal(v0[9:], p.v[9:])
    # A token weighs e^0 per null token: with zero queries, all tokens seen count alike.
    rows = torch.zeros(109, 4, 16, 8)
    near = reference.attend_window(rows, k0, v0, 20, 1.0)
    assert torch.allclose(near[12, 0, 0], v0[9:13, 0].sum(0) / 13, atol=1e-6)
    means = reference.block_means(v0)
    assert torch.allclose(means[0], v0[9:64].sum(0) / 64, atol=1e-6)
    assert torch.allclose(means[1], v0[64:109].mean(0), atol=1e-6)


def test_heads_go_to_other_kv_heads() -> None:
    """Spec 5.4, its table: which two KV heads a query head of the released model is with."""
    groups = reference.rows_of_groups(28, 4)
    assert [len(group) for group in groups] == [16] * 4
    found = {h: [g for g, group in enumerate(groups) if h in group] for h in range(28)}
    table = {range(4): [0, 1], range(4, 16): [0, 2], range(16, 20): [1, 2], range(20, 28): [1, 3]}
    assert found == {head: kv for heads, kv in table.items() for head in heads}
    assert groups[0] == [*range(16)]
    assert groups[1] == [*range(16, 28), *range(4)]
    assert groups[2] == [*range(4, 20)]
    assert groups[3] == [*range(20, 28), *[reference.NO_HEAD] * 8]


@pytest.mark.parametrize("heads, kv_heads", [(28, 4), (4, 2), (16, 2), (14, 2), (6, 1), (40, 2)])
def test_rows_are_the_heads_repeated(heads: int, kv_heads: int) -> None:
    """The closed form has the transcription's rows, and gives a head the mean of its copies."""
    query = torch.randn(3, heads, 5)
    rows = faithful.group_rows(query, kv_heads)
    groups = reference.rows_of_groups(heads, kv_heads)
    want = [reference.group_queries(query, torch.ones(3).bool(), group) for group in groups]
    assert torch.equal(rows, torch.stack(want, 1))
    assert rows.shape[2] == faithful.rows_per_group(heads, kv_heads) == len(groups[0])
    assert rows.shape[2] % 16 == 0
    assert all(any(head in group for group in groups) for head in range(heads))
    assert torch.allclose(faithful.mean_of_copies(rows, heads), query)


def test_compression_sees_its_own_block_and_later_ones() -> None:
    """Spec 5.5: the mask is inverted."""
    torch.manual_seed(0)
    rows, keys, values = (torch.randn(*size, 8) for size in ((200, 1, 2), (4, 1), (4, 1)))
    out, lse = reference.compress(rows, keys, values, 1.0)
    assert lse.shape == (2, 200)
    for block in range(4):
        changed = values.clone()
        changed[block] += 1
        moved = (reference.compress(rows, keys, changed, 1.0)[0] != out).any(-1).any(-1).flatten()
        assert torch.equal(moved, torch.arange(200) < 64 * (block + 1))


@pytest.mark.parametrize("tokens", [10, 64, 100])
def test_log_sum_exp_is_read_in_another_layout(tokens: int) -> None:
    """Spec 5.6: token t, row i gets that of row (64 t + i) // T, token (64 t + i) % T."""
    lse = torch.randn(64, tokens)
    read = reference.misread(lse)
    assert read.shape == lse.shape
    for t in (0, 1, tokens - 1):
        for i in (0, 17, 63):
            assert read[i, t] == lse[(64 * t + i) // tokens, (64 * t + i) % tokens]


def test_block_counts_grow_to_a_power_of_two() -> None:
    """Spec 5.7."""
    counts = (1, 10, 16, 20, 28, 32, 34, 40, 64)
    want = [1, 16, 16, 32, 32, 32, 64, 64, 64]
    assert [reference.places_of(count) for count in counts] == want


@pytest.mark.parametrize("misread_lse", [False, True])
def test_own_block_is_always_selected(misread_lse: bool) -> None:
    p = prompt([20, 170, 10])
    answer = p.reference(block_counts=2, misread_lse=misread_lse)
    for t, by_head in enumerate(answer.selected):
        for blocks in by_head:
            own = t // 64
            assert own in blocks and len(blocks) == min(own + 1, 2)
            assert max(blocks) == own
            if not p.vision[t]:  # ties on all blocks: the earliest, by decree
                assert blocks == [*range(min(own, 1)), own]


def test_up_to_64_tokens_select_what_they_window() -> None:
    """One block: compression gives its mean to all, selection and window see the same tokens."""
    p = prompt([3, 50, 8])
    group = reference.rows_of_groups(28, 4)[0]
    rows = reference.group_queries(p.q, p.vision, group).unsqueeze(1)
    k0, v0 = (x[:, :1] for x in reference.null_text(p.k, p.v, p.vision))
    mean_keys, mean_values = reference.block_means(k0), reference.block_means(v0)
    compressed, lse = reference.compress(rows, mean_keys, mean_values, p.scale)
    assert torch.allclose(compressed, mean_values[0].expand_as(compressed), atol=1e-6)
    selected, _ = reference.select_blocks(rows, mean_keys, lse, 32, p.scale)
    assert selected == [[[0]]] * 61
    chosen = reference.attend_blocks(rows, k0, v0, selected, p.scale)
    assert torch.equal(chosen, reference.attend_window(rows, k0, v0, 256, p.scale))


# The whole layer


def run(p: Prompt, block_counts: int, window: int, misread_lse: bool) -> tuple:
    """Fast output without the text tokens' dense part, blocks chosen, and the plan."""
    plan = faithful.plan_prompt(
        p.vision.numpy(), block_counts, window, p.q.device, misread_lse=misread_lse
    )
    gates = (p.z / reference.TEMPERATURE).sigmoid()
    gates[~p.vision] = float("nan")  # not read
    pages = faithful.TorchPages()
    out, chosen = faithful.attend(plan, p.q, p.k, p.v, gates, p.scale, pages)
    return out, chosen, plan


CASES = [
    # layout, heads, kv_heads, block_counts, window
    ([23, 190, 10], 28, 4, 2, 100),
    ([0, 130], 28, 4, 2, 30),
    ([1, 63], 28, 4, 32, 256),
    ([0, 1], 4, 2, 32, 256),
    ([9, 40], 4, 2, 2, 256),
    ([64, 64, 1], 4, 2, 1, 5),
    ([3, 80, 70, 110, 5], 14, 2, 2, 64),
    ([130, 260, 2], 6, 1, 4, 7),
    ([5, 140], 40, 2, 2, 256),
]


@pytest.mark.parametrize(
    "case, misread_lse", [(0, False), (7, False), *((nth, True) for nth in range(len(CASES)))]
)
def test_fast_equals_transcription(
    case: int, misread_lse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, heads, kv_heads, block_counts, window = CASES[case]
    monkeypatch.setattr(faithful, "SLAB_LOGITS", 1 << 12)  # several slabs
    p = prompt(layout, heads, kv_heads, seed=case)
    want = p.reference(block_counts=block_counts, window=window, misread_lse=misread_lse)
    got, chosen, _ = run(p, block_counts, window, misread_lse)

    positions, near_ties = p.vision.nonzero().flatten().tolist(), 0
    same = torch.ones(len(p.q)).bool()
    for nth, t in enumerate(positions):
        for g in range(kv_heads):
            mine = [j for j in chosen[nth, g].tolist() if j >= 0] + [t // 64]
            if 0 < want.margins[t, g] < TIE:
                near_ties += 1
                same[t] = same[t] and mine == want.selected[t][g]
            else:
                assert mine == want.selected[t][g]
    assert near_ties <= len(positions) / 50
    text = p.q.double(), p.k.double(), p.v.double(), torch.zeros_like(p.vision)
    dense = reference.dense_pass(*text, p.scale)
    whole = got.double() + torch.where(p.vision[:, None, None], 0.0, dense)
    assert relative_rms(whole[same], want.output[same]) < 1e-5


def test_choices_differ_where_the_layout_is_misread() -> None:
    """The flag matters: heads are mixed with other weights."""
    p = prompt([23, 200, 3])
    chosen = [run(p, 2, 100, misread_lse)[1] for misread_lse in (False, True)]
    assert (chosen[0] != chosen[1]).any()


def test_fast_in_bfloat16() -> None:
    p = prompt([13, 60, 2])
    low = Prompt(p.q.bfloat16(), p.k.bfloat16(), p.v.bfloat16(), p.vision, p.z, p.scale)
    want = low.reference(block_counts=32, window=20)  # nothing is left out, so nothing can flip
    got, _, _ = run(low, 32, 20, True)
    assert relative_rms(got[p.vision], want.output[p.vision]) < 5e-3


def test_a_later_token_changes_an_earlier_vision_row() -> None:
    """Why this mode refuses chunks and prefix caching; text rows' dense part stays causal."""
    p = prompt([9, 140, 9])
    before, _, _ = run(p, 4, 64, True)
    p.k[140] += 1
    p.v[140] += 1
    after, _, _ = run(p, 4, 64, True)
    moved = (before != after).any(-1).any(-1)
    assert moved[9:140].all()


def test_a_plan_knows_kinds_and_sequences() -> None:
    vision = np.zeros(130, bool)
    vision[2:5] = vision[70:] = True
    plan = faithful.plan_prompt(vision, 20, 256, torch.device("cpu"))
    assert plan.windows.query_start.tolist() == [0, 3, 63]
    assert plan.windows.seq_lens.tolist() == [5, 130]
    assert plan.windows.block_table.tolist() == [[0, 1, 2]] * 2
    assert (plan.windows.max_query_len, plan.windows.queries) == (60, 63)
    selection = plan.selection(2)
    assert selection is plan.selection(2) and selection.queries == 2 * 63
    assert selection.seq_lens.tolist() == [t + 1 for t in plan.vision.tolist()] * 2
    assert plan.vision.tolist() == [*range(2, 5), *range(70, 130)]
    assert plan.text.tolist() == [0, 1, *range(5, 70)]
    assert plan.own.tolist() == [t // 64 for t in plan.vision.tolist()]
    assert (plan.tokens, plan.blocks, plan.places) == (130, 3, 4), "no place for a fifth block"
    long = faithful.plan_prompt(np.ones(64 * 19 + 1, bool), 20, 256, torch.device("cpu"))
    assert (long.blocks, long.places) == (20, 32)
