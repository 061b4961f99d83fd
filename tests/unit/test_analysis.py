"""What ``analyze`` measures, against the same computed the long way."""

from __future__ import annotations

import pytest
import torch

from vllm_adaspark.analysis import measure
from vllm_adaspark.analysis.measure import AttentionMass, Prompt, ffn_change, holders, statistics

BLOCK, HEADS, KV_HEADS, SIZE = 8, 4, 2, 16
SCALE = SIZE**-0.5


@pytest.fixture
def prompt() -> Prompt:
    """Five tokens of text, 60 of video, nine of text: cubes are the blocks 1 to 7."""
    is_video = torch.zeros(74, dtype=torch.bool)
    is_video[5:65] = True
    return Prompt(is_video, BLOCK)


@pytest.fixture
def qk(prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = len(prompt.is_video)
    q = 3 * torch.randn(tokens, HEADS, SIZE, generator=generator)
    return q, torch.randn(tokens, KV_HEADS, SIZE, generator=generator)


def test_cubes_are_whole_blocks_of_video(prompt: Prompt) -> None:
    assert prompt.cubes.tolist() == [False, *[True] * 7, False]
    before = prompt.preceding_cubes()
    assert before.shape == prompt.is_video.shape
    assert [int(before[at]) for at in (0, 8, 15, 16, 63, 64, 73)] == [0, 0, 0, 1, 6, 7, 7]


def test_queries_are_spread_over_tokens_that_may_choose(prompt: Prompt) -> None:
    queries = prompt.queries(10, least_cubes=4)
    assert queries["question"].tolist() == list(range(65, 74))
    video = queries["video"].tolist()
    assert len(video) == len(set(video)) == 10 and video == sorted(video)
    assert video[0] >= 40 and video[-1] == 64, "block 5 is the first with four cubes before it"
    assert not len(prompt.queries(10, least_cubes=8)["video"])


def test_a_prompt_without_video_has_no_queries() -> None:
    queries = Prompt(torch.zeros(40, dtype=torch.bool), BLOCK).queries(4, 1)
    assert [len(at) for at in queries.values()] == [0, 0]


@pytest.mark.parametrize(
    "weights, expected",
    [
        ([0.1, 0.6, 0.3], [1, 2, 2, 3, 3]),
        ([1.0, 0.0, 0.0, 0.0], [1, 1, 1, 1, 1]),
        ([0.25] * 4, [2, 4, 4, 4, 4]),
        ([0.0] * 4, [1, 1, 1, 1, 1]),
        ([5.0, 3.0, 2.0], [1, 2, 3, 3, 3]),
    ],
)
def test_holders(weights, expected) -> None:
    assert holders(torch.tensor(weights, dtype=torch.float64)).tolist() == expected


def the_long_way(q, k, prompt: Prompt, at: int, head: int) -> tuple[list, list, list]:
    """Shares of tokens and of cubes per mass, and where the mass falls, of one query and head."""
    scores = [float(q[at, head] @ k[j, head // (HEADS // KV_HEADS)]) * SCALE for j in range(at + 1)]
    probs = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    own = at // BLOCK
    cubes = [b for b in range(own) if all(prompt.is_video[b * BLOCK : (b + 1) * BLOCK])]
    on_cubes = [sum(probs[b * BLOCK : (b + 1) * BLOCK]) for b in cubes]

    def share(weights: list[float], mass: float) -> float:
        total = 0.0
        for number, weight in enumerate(sorted(weights, reverse=True), start=1):
            total += weight
            if total >= mass * sum(weights):
                return number / len(weights)
        return 1.0

    falls = [sum(on_cubes), sum(probs[own * BLOCK :])]
    return (
        [share(probs, mass) for mass in measure.MASSES],
        [share(on_cubes, mass) for mass in measure.MASSES],
        [*falls, 1 - sum(falls)],
    )


@pytest.mark.parametrize("at_once", [1 << 26, 4 * HEADS * 74 * 3])
def test_attention_mass_equals_the_long_way(monkeypatch, prompt: Prompt, qk, at_once) -> None:
    """Also in pieces of three queries, as for long prompts."""
    monkeypatch.setattr(measure, "BYTES", at_once)
    q, k = qk
    at = torch.tensor([16, 23, 40, 57, 63, 64, 65, 73])
    found = AttentionMass.of(q[at], k, at, SCALE, prompt)
    rows = [the_long_way(q, k, prompt, int(t), head) for t in at for head in range(HEADS)]
    for values, expected in zip(
        (found.tokens, found.cubes, found.falls_on), zip(*rows, strict=True), strict=True
    ):
        torch.testing.assert_close(
            values.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6
        )
    summary = found.summary()
    assert summary["cubes"]["0.9"]["mean"] == pytest.approx(float(found.cubes[:, 2].mean()))
    assert sum(summary["falls_on"].values()) == pytest.approx(1)


def test_memory_is_bounded_by_the_piece(monkeypatch, prompt: Prompt, qk) -> None:
    q, k = qk
    monkeypatch.setattr(measure, "BYTES", 4 * HEADS * len(k) * 3)
    at = torch.arange(len(q))
    pieces = [probs.shape for _, probs in measure.attention_rows(q, k, at, SCALE)]
    assert max(shape[0] for shape in pieces) == 3
    assert sum(shape[0] for shape in pieces) == len(q)


def test_ffn_change() -> None:
    before = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    branch = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, -4.0]])
    ratio, cosine = ffn_change(before, branch)
    torch.testing.assert_close(ratio, torch.tensor([2.0, 2.0**0.5, 1.0]))
    torch.testing.assert_close(cosine, torch.tensor([1.0, 0.5**0.5, -1.0]))


def test_statistics() -> None:
    found = statistics(torch.arange(101.0))
    assert found == pytest.approx(
        {"mean": 50, "std": (101**2 - 1) ** 0.5 / 12**0.5, "p10": 10, "p50": 50, "p90": 90}
    )
