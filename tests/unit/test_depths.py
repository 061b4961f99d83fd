"""Layers that see fewer tokens: numbers, slots, the way back; by hand and against a slow twin."""

from __future__ import annotations

import numpy as np
import torch

from vllm_adaspark.paged.depths import depths_of
from vllm_adaspark.paged.state import StepRows

BLOCK = 4


def rows_of(computed: list[int], queries: list[int], table: list[list[int]]) -> StepRows:
    """A step of requests that have ``computed`` tokens behind them and bring ``queries``."""
    return StepRows(
        query_start=np.concatenate([[0], np.cumsum(queries)]),
        seq_lens=np.array(computed) + queries,
        block_table=np.array(table),
    )


def test_slots_of_a_mixed_step_by_hand() -> None:
    """A prompt of 6 that loses 3, a decoding request that lost 2 before, and a dense chunk."""
    rows = rows_of([0, 5, 4], [6, 1, 3], [[7, 3], [2, 9], [1, 8]])
    depths = depths_of(rows, (2,), np.array([[0], [2], [0]]), np.array([[3], [0], [0]]), BLOCK)
    whole, left = depths.rows
    assert whole.slots.tolist() == [28, 29, 30, 31, 12, 13, 37, 32, 33, 34]
    assert whole.query_lens.tolist() == [6, 1, 3] and whole.seq_lens.tolist() == [6, 6, 7]
    # The survivors move to the front; the sixth token of the second request is its fourth there.
    assert left.slots.tolist() == [28, 29, 30, 11, 32, 33, 34]
    assert left.query_lens.tolist() == [3, 1, 3] and left.seq_lens.tolist() == [3, 4, 7]
    assert depths.dropping
    assert [depths.of(layer) for layer in range(5)] == [0, 0, 0, 1, 1]


def test_a_step_after_all_events_drops_nothing_but_keeps_its_lengths() -> None:
    rows = rows_of([9], [1], [[5, 6, 4]])
    depths = depths_of(rows, (0, 3), np.array([[4, 6]]), np.array([[0, 0]]), BLOCK)
    assert not depths.dropping
    assert [r.seq_lens.tolist() for r in depths.rows] == [[10], [6], [4]]
    assert [r.slots.tolist() for r in depths.rows] == [[17], [25], [23]]


def twin_slots(computed: int, lost_before: int, alive: list[bool], table: list[int]) -> list[int]:
    """Token by token: the n-th that is still alive lies in the n-th slot."""
    number, slots = computed - lost_before, []
    for lives in alive:
        if lives:
            slots.append(table[number // BLOCK] * BLOCK + number % BLOCK)
            number += 1
    return slots


def test_random_steps_equal_the_twin_and_come_back() -> None:
    rng = np.random.default_rng(4)
    for _ in range(200):
        requests, events = int(rng.integers(1, 5)), (1, 2, 5)[: int(rng.integers(1, 4))]
        computed = rng.integers(0, 20, requests)
        queries = rng.integers(1, 15, requests)
        blocks = -(-int((computed + queries).max()) // BLOCK)
        table = rng.permutation(requests * blocks).reshape(requests, blocks)
        lost = np.sort(rng.integers(0, computed[:, None] + 1, (requests, len(events))), 1)
        # Which tokens of the step are alive at each depth: never more than before, one at least.
        alive = [[np.ones(length, bool)] for length in queries]
        for of_row in alive:
            for _ in events:
                stays = of_row[-1] & (rng.random(len(of_row[-1])) < 0.7)
                stays[-1] = True
                of_row.append(stays)
        here = np.array([[(~depth).sum() for depth in of_row[1:]] for of_row in alive])
        rows = rows_of(computed.tolist(), queries.tolist(), table.tolist())
        depths = depths_of(rows, events, lost, here, BLOCK)

        tokens = int(queries.sum())
        positions = torch.arange(3 * (tokens + 2)).view(3, -1)  # padded by two
        depths.begin(positions)
        hidden = torch.arange(1.0, tokens + 1)[:, None].repeat(1, 2)
        whole = hidden.clone()
        for depth in range(len(events) + 1):
            now = np.concatenate([of_row[depth] for of_row in alive])
            if depth:
                before = np.concatenate([of_row[depth - 1] for of_row in alive])
                index = depths.drop(torch.from_numpy(now[before]))
                hidden = hidden[index]
            want = [
                slot
                for row, of_row in enumerate(alive)
                for slot in twin_slots(
                    computed[row], lost[row, depth - 1] if depth else 0, of_row[depth], table[row]
                )
            ]
            assert depths.rows[depth].slots.tolist() == want
            assert torch.equal(hidden, whole[torch.from_numpy(now)])
            assert torch.equal(depths.positions, positions[:, :tokens][:, torch.from_numpy(now)])
        restored = depths.restore(hidden, tokens + 2)
        last = torch.from_numpy(np.concatenate([of_row[-1] for of_row in alive]))
        assert torch.equal(restored[:tokens], whole * last[:, None])
        assert not restored[tokens:].any()
        copy = depths.host_part()
        assert copy.rows is depths.rows and copy.positions is None and depths.positions is not None
