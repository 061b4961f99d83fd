"""The comparison of scores that could choose cubes (benchmarks/cube_scores.py)."""

import cube_scores  # benchmarks; puts examples/places on the path
import places
import prompts
import pytest
import torch
from batches import Words
from network import tokenizer
from scoring import logits
from tower import build

PATCHES, TOKENS = 12, 12 * 64


@pytest.fixture(scope="module")
def asked():
    """A model of random weights, a batch about one video of random tokens in cube order."""
    torch.manual_seed(0)
    model = build(layers=3).eval()
    words = Words(tokenizer(places.every_question_text()), places.every_question_text())
    scene = places.make(places.HELD_OUT_SEEDS[0], PATCHES, "pan")
    order = cube_scores.cube_order(PATCHES)
    tokens = torch.randn(TOKENS, model.get_input_embeddings().weight.shape[1])
    video = tokens[order], order, torch.zeros(0, TOKENS).bool(), scene
    return model, prompts.assemble(model, words, [video], [places.questions(scene)[:5]])


def test_cubes_are_four_by_four_by_four():
    order = cube_scores.cube_order(PATCHES)
    assert sorted(order.tolist()) == list(range(TOKENS))
    patch, row, column = order // 64, order % 64 // 8, order % 8
    for at in (patch, row, column):
        blocks = at.view(-1, 64) // 4
        assert (blocks == blocks[:, :1]).all()


def test_all_cubes_kept_are_dense_and_dense_is_the_models(asked):
    model, batch = asked
    start = batch.prefix.shape[1] - TOKENS
    dense = cube_scores.answers(model, batch, start, TOKENS, None, 1.0)
    with torch.no_grad():
        expected = logits(model, batch)[0][0, :, 0]
    torch.testing.assert_close(dense, expected, atol=1e-4, rtol=1e-4)
    for score in cube_scores.SCORES.values():
        whole = cube_scores.answers(model, batch, start, TOKENS, score, 1.0)
        torch.testing.assert_close(whole, dense)
        some = cube_scores.answers(model, batch, start, TOKENS, score, 0.2)
        assert (some - dense).abs().max() > 1e-3


def test_scores_are_what_they_say():
    torch.manual_seed(1)
    q, keys = torch.randn(2, 5, 8), torch.randn(2, 3, 64, 8)
    products = torch.einsum("hmd,hctd->hmct", q, keys)
    torch.testing.assert_close(cube_scores.mean(q, keys), products.mean(-1))
    torch.testing.assert_close(cube_scores.mass(q, keys), products.exp().sum(-1).log())
    assert (cube_scores.bounds(q, keys) >= products.amax(-1)).all()
    # A mass is at least that of so many mean keys (Jensen), and parts lie between.
    whole = cube_scores.mass(q, keys)
    parts = cube_scores.parts(q, keys) + torch.tensor(4.0).log()
    assert (whole >= parts).all()
    assert (parts >= cube_scores.mean(q, keys) + torch.tensor(64.0).log()).all()
    # Of keys that vary a little, the second term is nearly all there is beside the mean.
    near = keys * 0.05
    told = cube_scores.spread(q, near) + torch.tensor(64.0).log()
    wrong = (told - cube_scores.mass(q, near)).abs()
    without = (
        cube_scores.mean(q, near) + torch.tensor(64.0).log() - cube_scores.mass(q, near)
    ).abs()
    assert wrong.mean() < 0.5 * without.mean()
