"""The twin itself: against dense attention, against cases worked by hand, and its invariants."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vllm_adaspark.methods.adaspark.paper import paper_attention, paper_ffn
from vllm_adaspark.methods.adaspark.reference import tile_attention, tile_ffn
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig

B = 8  # KV block
HEADS, KV_HEADS, D = 4, 2, 16
CONFIG = AdaSparkConfig(p_attn=0.6, p_ffn=0.6, min_cubes=1, dense_below=0)
PAPER = CONFIG.override("paper")


def random_qkv(n, seed=0, heads=HEADS, kv_heads=KV_HEADS, d=D):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, heads, d), (n, kv_heads, d), (n, kv_heads, d))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return 2 * q, k + k.view(-1, B, *k.shape[1:]).mean(1).repeat_interleave(B, 0) * 2, v


def layout(*runs):
    """``[n]`` bool from runs of (is video, tokens)."""
    return torch.cat([torch.full((count,), video, dtype=torch.bool) for video, count in runs])


# Text of one block and a bit (so the video starts inside a block), 6 whole cubes, more text.
PROMPT = layout((False, B + 3), (True, 6 * B + 5 + 2), (False, B + 6))


def dense_attention(q, k, v):
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)


def run(q, k, v, is_video, config, chunk=None, **kwargs):
    return tile_attention(q, k, v, is_video, B, chunk or (0, len(q)), config, **kwargs)


def in_chunks(q, k, v, is_video, config, edges):
    parts = [
        run(q, k, v, is_video, config, chunk)
        for chunk in zip([0, *edges], [*edges, len(q)], strict=True)
    ]
    return torch.cat([out for out, _ in parts]), [tile for _, tiles in parts for tile in tiles]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# p = 1 is dense


def test_paper_attention_at_p_1_is_dense():
    q, k, v = random_qkv(8 * B)
    cube_of = torch.tensor([-1, -1, 0, 1, 2, 3, -1, -1]).repeat_interleave(B)
    out, kept = paper_attention(q, k, v, cube_of, 1.0, D**-0.5)
    assert_close(out, dense_attention(q, k, v))
    assert not torch.allclose(paper_attention(q, k, v, cube_of, 0.5, D**-0.5)[0], out)
    # Text before the video has no cubes, cube i has i, the question has all.
    assert kept.sum(-1).unique_consecutive(dim=0).tolist() == [[i] * HEADS for i in (0, 1, 2, 3, 4)]


@pytest.mark.parametrize(
    "settings",
    [
        {"p_attn": 1.0},
        {"enabled": False},
        {"selection": "top_k", "keep": 1.0},
        {"selection": "uniform", "keep": 1.0},
        {"dense_layers": 4},
        {"dense_below": 99},
    ],
    ids=str,
)
@pytest.mark.parametrize("edges", [[], [B], [2 * B + 1, 2 * B + 2, 4 * B]], ids=str)
def test_tile_attention_is_dense_when_told_so(settings, edges):
    n = 9 * B
    q, k, v = random_qkv(n)
    config = replace(CONFIG, **settings)
    starts, ends = [0, *edges], [*edges, n]
    parts = [run(q, k, v, PROMPT[:n], config, c, layer=3) for c in zip(starts, ends, strict=True)]
    assert_close(torch.cat([out for out, _ in parts]), dense_attention(q, k, v))
    assert all(tile.dense for _, tiles in parts for tile in tiles)
    assert all(tile.kept.all() for _, tiles in parts for tile in tiles)


def test_dense_layers_end():
    q, k, v = random_qkv(9 * B)
    config = replace(CONFIG, dense_layers=4)
    _, tiles = run(q, k, v, PROMPT[: 9 * B], config, layer=4)
    assert any(not tile.dense and not tile.kept.all() for tile in tiles)


def test_scale():
    q, k, v = random_qkv(8 * B)
    explicit, _ = run(q, k, v, PROMPT[: 8 * B], CONFIG, scale=0.1)
    implied, _ = run(q * 0.1 * D**0.5, k, v, PROMPT[: 8 * B], CONFIG)
    assert_close(explicit, implied)


def test_half_precision_is_computed_in_float32():
    q, k, v = (x.bfloat16() for x in random_qkv(8 * B))
    out, _ = run(q, k, v, PROMPT[: 8 * B], CONFIG)
    assert out.dtype == torch.float32
    assert torch.equal(out, run(q.float(), k.float(), v.float(), PROMPT[: 8 * B], CONFIG)[0])


# By hand

# Block 0 is text, blocks 1 to 4 are cubes, block 5 is text; two tokens a block, head size 1.
# Every query is 1 and the keys of a cube are the log of its weight: a cube's share of the
# attention is then its weight, for the mean key and for the softmax alike.
WEIGHTS = torch.tensor([1.0, 5.0, 3.0, 1.0, 1.0, 1.0], dtype=torch.float64)
VALUES = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0, 60.0], dtype=torch.float64)
HAND_CUBE_OF = torch.tensor([-1, -1, 0, 0, 1, 1, 2, 2, 3, 3, -1, -1])


def hand_qkv():
    def per_token(x):
        return x.repeat_interleave(2).view(-1, 1, 1)

    return torch.ones(12, 1, 1, dtype=torch.float64), per_token(WEIGHTS.log()), per_token(VALUES)


def hand_output(blocks, own, own_tokens):
    """Weighted mean of the values of two tokens of each of ``blocks`` and some of ``own``."""
    count = torch.zeros(6, dtype=torch.float64)
    count[blocks] = 2
    count[own] += own_tokens
    mass = count * WEIGHTS
    return (mass * VALUES).sum() / mass.sum()


@pytest.mark.parametrize(
    ("p", "kept", "margin"),
    [
        # Probabilities .5 .3 .1 .1
        (0.499, [0], 0.001),
        (0.501, [0, 1], 0.001),
        (0.7, [0, 1], 0.1),  # mass .8, the next cube .2 below
        (0.75, [0, 1], 0.05),
        (0.85, [0, 1, 2], 0.0),  # cubes 2 and 3 tie: the earlier one
        (0.95, [0, 1, 2, 3], 0.05),
    ],
)
def test_the_question_by_hand(p, kept, margin):
    q, k, v = hand_qkv()
    config = AdaSparkConfig(p_attn=p, min_cubes=1, dense_below=0)
    out, tiles = tile_attention(q, k, v, HAND_CUBE_OF >= 0, 2, (0, 12), config, scale=1.0)
    for question, token in zip(tiles[-2:], (10, 11), strict=True):
        assert (question.block, question.kind) == (5, "text")
        assert question.tokens == range(token, token + 1)
        assert not question.dense
        assert question.candidates == [1, 2, 3, 4]
        assert question.kept.tolist() == [[cube in kept for cube in range(4)]]
        assert question.margin == pytest.approx(margin, abs=1e-12)

    blocks = [0, *(cube + 1 for cube in kept)]
    by_hand = torch.stack([hand_output(blocks, 5, 1), hand_output(blocks, 5, 2)])
    assert_close(out[-2:, 0, 0], by_hand)

    by_paper, paper_kept = paper_attention(q, k, v, HAND_CUBE_OF, p, 1.0)
    assert paper_kept[-1, 0].nonzero().flatten().tolist() == kept
    assert_close(by_paper[-2:, 0, 0], by_hand)


def test_a_cubes_own_tokens_by_hand():
    q, k, v = hand_qkv()
    config = AdaSparkConfig(p_attn=0.6, min_cubes=1, dense_below=0)
    out, tiles = tile_attention(q, k, v, HAND_CUBE_OF >= 0, 2, (0, 12), config, scale=1.0)
    assert [tile.kind for tile in tiles] == ["text"] * 2 + ["video"] * 4 + ["text"] * 2
    assert [tile.candidates for tile in tiles[:5]] == [[], [], [], [1], [1, 2]]
    # Cube 2 (block 3): 5/8 for cube 0 reach .6, cube 1 is left out.
    assert tiles[4].tokens == range(6, 8)
    assert tiles[4].kept.tolist() == [[True, False]]
    assert tiles[4].margin == pytest.approx(0.625 - 0.6)
    assert_close(out[6, 0, 0], hand_output([0, 1], 3, 1))
    assert_close(out[7, 0, 0], hand_output([0, 1], 3, 2))
    by_paper, _ = paper_attention(q, k, v, HAND_CUBE_OF, 0.6, 1.0)
    assert_close(out, by_paper)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"selection": "top_k", "keep": 0.25}, [0]),
        ({"selection": "top_k", "keep": 0.5}, [0, 1]),
        ({"selection": "top_k", "keep": 0.51}, [0, 1, 2]),
        ({"selection": "top_k", "keep": 0.01, "min_cubes": 2}, [0, 1]),
        ({"selection": "uniform", "keep": 0.5}, [1, 3]),
        ({"selection": "uniform", "keep": 0.01}, [3]),
        ({"selection": "uniform", "keep": 0.01, "min_cubes": 9}, [0, 1, 2, 3]),
        ({"p_attn": 0.1, "min_cubes": 3}, [0, 1, 2]),
    ],
    ids=str,
)
def test_other_rules_by_hand(settings, kept):
    config = AdaSparkConfig(**{"min_cubes": 1, "dense_below": 0} | settings)
    _, tiles = tile_attention(*hand_qkv(), HAND_CUBE_OF >= 0, 2, (0, 12), config, scale=1.0)
    assert tiles[-1].kept.tolist() == [[cube in kept for cube in range(4)]]


def test_video_averages_over_tokens_and_heads_and_text_over_heads_only():
    # Two cubes of keys (9, 0) and (0, 9), then two tokens: one seeks the first cube, the other,
    # less hard, the second.
    k = torch.tensor([[9.0, 0], [9, 0], [0, 9], [0, 9], [0, 0], [0, 0]])[:, None]
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.9])
    config = AdaSparkConfig(p_attn=0.5, min_cubes=1, dense_below=0)

    def tiles_of(token_4, token_5, video):
        """The tiles of the last block; a token is given as its query heads."""
        q = torch.zeros(6, len(token_4), 2)
        q[4], q[5] = torch.stack(token_4), torch.stack(token_5)
        is_video = torch.tensor([True] * 4 + [video] * 2)
        _, tiles = tile_attention(q, k, k, is_video, 2, (0, 6), config, scale=1.0)
        assert [(tile.kind, len(tile.tokens)) for tile in tiles[2:]] == (
            [("video", 2)] if video else [("text", 1)] * 2
        )
        return tiles[2:]

    def choices(*args, **kwargs):
        return [tile.kept.tolist() for tile in tiles_of(*args, **kwargs)]

    # One head: a cube decides as one.  The tokens give the first cube 1 / (1 + e^-9) = .999877 and
    # 1 / (1 + e^8.1) = .000303, the mean is .500090.  Every text token decides for itself.
    assert tiles_of([first], [second], video=True)[0].margin == pytest.approx(9.0e-5, abs=1e-6)
    assert choices([first], [second], video=True) == [[[True, False]]]
    assert choices([first], [second], video=False) == [[[True, False]], [[False, True]]]
    # Two heads of a GQA group average in either kind: the head that seeks harder wins.
    assert choices([second, first], [second, second], video=False) == [
        [[True, False]],
        [[False, True]],
    ]
    assert choices([second, first], [second, second], video=True) == [[[False, True]]]


def test_kv_heads_choose_on_their_own():
    k = torch.tensor([[9.0, 0], [9, 0], [0, 9], [0, 9], [0, 0], [0, 0]])[:, None].expand(6, 2, 2)
    q = torch.zeros(6, 2, 2)
    q[4:] = torch.eye(2)  # head 0 seeks the first cube, head 1 the second
    config = AdaSparkConfig(p_attn=0.5, min_cubes=1, dense_below=0)
    for kind in ("video", "text"):
        is_video = torch.tensor([True] * 4 + [kind == "video"] * 2)
        _, tiles = tile_attention(q, k, k, is_video, 2, (0, 6), config, scale=1.0)
        assert tiles[-1].kind == kind
        assert tiles[-1].kept.tolist() == [[True, False], [False, True]]


# Kinds of tiles


def test_kinds_candidates_and_cubes():
    q, k, v = random_qkv(10 * B)
    _, tiles = run(q, k, v, PROMPT, CONFIG)
    # Block 0 is text, block 1 mixed, blocks 2 to 7 cubes, block 8 mixed, block 9 text.
    assert [(tile.block, tile.kind, len(tile.tokens)) for tile in tiles] == [
        *[(0, "text", 1)] * B,
        *[(1, "text", 1)] * 3,
        (1, "cut", B - 3),
        *[(block, "video", B) for block in range(2, 8)],
        (8, "cut", 2),
        *[(8, "text", 1)] * (B - 2),
        *[(9, "text", 1)] * B,
    ]
    assert all(tile.candidates == [b for b in range(2, 8) if b < tile.block] for tile in tiles)
    assert all(tile.kept.shape == (KV_HEADS, len(tile.candidates)) for tile in tiles)
    assert [t for tile in tiles for t in tile.tokens] == list(range(10 * B))


def test_tiles_at_chunk_edges():
    q, k, v = random_qkv(10 * B)

    def kinds(start, end):
        _, tiles = run(q, k, v, PROMPT, CONFIG, (start, end))
        return [(tile.block, tile.tokens.start, tile.tokens.stop, tile.kind) for tile in tiles]

    # Inside block 3 to inside block 5: neither end is a whole cube.
    assert kinds(3 * B + 2, 5 * B + 1) == [
        (3, 3 * B + 2, 4 * B, "cut"),
        (4, 4 * B, 5 * B, "video"),
        (5, 5 * B, 5 * B + 1, "cut"),
    ]
    # The video tokens of a block shared with text: cut, because the block is no cube.
    assert kinds(B + 3, 2 * B) == [(1, B + 3, 2 * B, "cut")]
    assert kinds(B + 2, 2 * B) == [(1, B + 2, B + 3, "text"), (1, B + 3, 2 * B, "cut")]
    assert kinds(8 * B - 1, 8 * B + 4) == [
        (7, 8 * B - 1, 8 * B, "cut"),
        (8, 8 * B, 8 * B + 2, "cut"),
        (8, 8 * B + 2, 8 * B + 3, "text"),
        (8, 8 * B + 3, 8 * B + 4, "text"),
    ]
    # One generated token.
    assert kinds(9 * B + 5, 9 * B + 6) == [(9, 9 * B + 5, 9 * B + 6, "text")]


@pytest.mark.parametrize(
    ("dense_below", "chunk", "tiles"),
    [
        # Blocks 2 to 7 are cubes; a tile begins at an even one.
        (0, (0, 10), [(2, 1), (3, 1), (4, 2), (6, 2)]),  # block 2 has none before it to choose
        (3, (0, 10), [(2, 1), (3, 1), (4, 1), (5, 1), (6, 2)]),
        (0, (5, 7), [(5, 1), (6, 1)]),  # the other cube of each is in another chunk
    ],
)
def test_an_even_cube_and_the_next_choose_together(dense_below, chunk, tiles):
    q, k, v = random_qkv(10 * B)
    config = CONFIG.override({"tile_cubes": 2, "dense_below": dense_below})
    _, made = run(q, k, v, PROMPT, config, (chunk[0] * B, chunk[1] * B))
    video = [tile for tile in made if tile.kind == "video"]
    assert [(tile.block, len(tile.tokens) // B) for tile in video] == tiles
    assert all(tile.candidates == list(range(2, tile.block)) for tile in video)


def test_text_between_videos_parts_the_video_tokens_of_a_block():
    q, k, v = random_qkv(3 * B)
    is_video = layout((True, B), (True, 2), (False, 1), (True, 3), (False, 2), (True, B))
    _, tiles = run(q, k, v, is_video, CONFIG)
    assert [(tile.block, tile.tokens.start - B, len(tile.tokens), tile.kind) for tile in tiles] == [
        (0, -B, B, "video"),
        (1, 0, 2, "cut"),
        (1, 2, 1, "text"),
        (1, 3, 3, "cut"),
        (1, 6, 1, "text"),
        (1, 7, 1, "text"),
        (2, B, B, "video"),
    ]
    assert [tile.dense for tile in tiles] == [tile.kind == "cut" for tile in tiles]


def test_a_block_cut_by_the_chunks_end_becomes_a_cube_later():
    q, k, v = random_qkv(10 * B)
    _, first = run(q, k, v, PROMPT, CONFIG, (0, 4 * B + 3))
    _, second = run(q, k, v, PROMPT, CONFIG, (4 * B + 3, 10 * B))
    assert first[-1].candidates == [2, 3]
    assert second[0].kind == "cut" and second[0].dense
    assert second[1].candidates == [2, 3, 4]


def test_dense_tiles():
    q, k, v = random_qkv(10 * B)
    _, tiles = run(q, k, v, PROMPT, replace(CONFIG, dense_below=3))
    assert [tile.dense for tile in tiles] == [
        len(tile.candidates) < 3 or tile.kind == "cut" for tile in tiles
    ]
    _, tiles = run(q, k, v, PROMPT, replace(CONFIG, text_queries="dense"))
    assert [tile.dense for tile in tiles] == [tile.kind != "video" for tile in tiles]
    assert all(tile.margin == math.inf for tile in tiles if tile.dense)


# Invariants


def test_tile_rule_is_the_paper_where_a_tile_agrees():
    # One query head per KV head, all queries of a cube alike; every question token asks its own.
    cube_of = torch.tensor([-1, 0, 1, 2, 3, 4, -1]).repeat_interleave(B)
    q, k, v = random_qkv(7 * B, heads=KV_HEADS)
    q[: 6 * B] = q[: 6 * B : B].repeat_interleave(B, 0)
    differ = False
    for p in (0.3, 0.6, 0.9):
        by_paper, kept = paper_attention(q, k, v, cube_of, p, D**-0.5)
        by_tile, tiles = run(q, k, v, cube_of >= 0, replace(CONFIG, p_attn=p))
        assert_close(by_tile, by_paper)
        for tile in tiles:
            for token in tile.tokens:
                assert torch.equal(kept[token, :, : len(tile.candidates)], tile.kept)
        question = torch.stack([tile.kept for tile in tiles[-B:]])
        differ |= len(question.unique(dim=0)) > 1
    assert differ


@pytest.mark.parametrize("edges", [[4 * B], [B, 2 * B, 3 * B], [3 * B, 8 * B]], ids=str)
def test_aligned_chunks_change_nothing(edges):
    q, k, v = random_qkv(10 * B)
    whole, tiles = run(q, k, v, PROMPT, CONFIG)
    parts, part_tiles = in_chunks(q, k, v, PROMPT, CONFIG, edges)
    assert_close(parts, whole)
    assert len(tiles) == len(part_tiles)
    for one, other in zip(tiles, part_tiles, strict=True):
        assert (one.tokens, one.kind, one.candidates) == (
            other.tokens,
            other.kind,
            other.candidates,
        )
        assert torch.equal(one.kept, other.kept)
    assert any(not tile.kept.all() for tile in tiles)


@pytest.mark.parametrize("seed", range(5))
def test_chunk_edges_add_to_a_cut_cube_and_leave_all_else(seed):
    n = 10 * B
    q, k, v = random_qkv(n, seed)
    generator = torch.Generator().manual_seed(seed)
    inside_a_late_cube = 6 * B + 3
    edges = torch.randint(1, n, (4,), generator=generator).tolist()
    edges = sorted({*edges, inside_a_late_cube})

    def seen(tiles):
        """``[n, kv_heads, blocks]`` bool, the cubes each token attends to."""
        kept = torch.zeros(n, KV_HEADS, 10, dtype=torch.bool)
        for tile in tiles:
            for at, block in enumerate(tile.candidates):
                kept[tile.tokens.start : tile.tokens.stop, :, block] = tile.kept[:, at]
        return kept

    whole_out, tiles = run(q, k, v, PROMPT, CONFIG)
    parts_out, part_tiles = in_chunks(q, k, v, PROMPT, CONFIG, edges)
    whole, parts = seen(tiles), seen(part_tiles)
    assert not (whole & ~parts).any()

    cut = torch.zeros(n, dtype=torch.bool)  # cubes with an edge inside
    for edge in edges:
        if edge % B and edge // B in range(2, 8):
            cut[edge // B * B : (edge // B + 1) * B] = True
    assert torch.equal(whole[~cut], parts[~cut])
    assert_close(parts_out[~cut], whole_out[~cut])
    # A cut cube attends to every cube before it.
    assert whole[cut].sum() < parts[cut].sum()
    assert parts[cut].sum(-1).T.tolist() == [(cut.nonzero().flatten() // B - 2).tolist()] * KV_HEADS


@pytest.mark.parametrize("chunk", [1, 3, B + 1])
def test_what_text_chooses_does_not_depend_on_chunks(chunk):
    q, k, v = random_qkv(10 * B)

    def text(tiles):
        return [
            (t.tokens, t.dense, t.candidates, t.kept.tolist()) for t in tiles if t.kind == "text"
        ]

    whole_out, whole = run(q, k, v, PROMPT, CONFIG)
    out, tiles = in_chunks(q, k, v, PROMPT, CONFIG, list(range(chunk, 10 * B, chunk)))
    assert text(tiles) == text(whole)
    assert len(text(whole)) == int((~PROMPT).sum())
    assert any(not tile.kept.all() for tile in whole if tile.kind == "text")
    assert_close(out[~PROMPT], whole_out[~PROMPT])


def test_nan_in_blocks_left_out_reaches_no_output():
    q, k, v = random_qkv(10 * B)
    chunk = (7 * B, 8 * B)
    config = replace(CONFIG, p_attn=0.3)
    clean, (tile,) = run(q, k, v, PROMPT, config, chunk)
    for kv_head in range(KV_HEADS):
        for at, block in enumerate(tile.candidates):
            if not tile.kept[kv_head, at]:
                v[block * B : (block + 1) * B, kv_head] = math.nan
    assert v.isnan().any()
    poisoned, _ = run(q, k, v, PROMPT, config, chunk)
    assert torch.equal(poisoned, clean)


def test_only_the_mean_of_a_key_left_out_matters():
    q, k, v = random_qkv(10 * B)
    chunk = (7 * B, 8 * B)
    config = replace(CONFIG, p_attn=0.3)
    clean, (tile,) = run(q, k, v, PROMPT, config, chunk)
    kv_head, at = (~tile.kept).nonzero()[0].tolist()
    first = tile.candidates[at] * B
    k[first, kv_head] += 50  # would dominate if it were attended to
    k[first + 1, kv_head] -= 50
    assert_close(run(q, k, v, PROMPT, config, chunk)[0], clean)
    kv_head, at = tile.kept.nonzero()[0].tolist()
    first = tile.candidates[at] * B
    k[first, kv_head] += 50
    k[first + 1, kv_head] -= 50
    assert not torch.allclose(run(q, k, v, PROMPT, config, chunk)[0], clean)


def test_what_lies_beyond_the_chunk_does_not_exist_yet():
    q, k, v = random_qkv(10 * B)
    end = 5 * B + 3
    expected, tiles = run(q, k, v, PROMPT, CONFIG, (2 * B, end))
    for x in (q, k, v):
        x[end:] = math.nan
    q[: 2 * B] = math.nan  # nor are earlier queries read
    is_video = PROMPT.clone()
    is_video[end:] = True
    out, again = run(q, k, v, is_video, CONFIG, (2 * B, end))
    assert torch.equal(out, expected)
    assert [tile.candidates for tile in again] == [tile.candidates for tile in tiles]


def test_a_token_never_sees_a_later_one():
    q, k, v = random_qkv(8 * B)
    before, _ = run(q, k, v, PROMPT[: 8 * B], CONFIG)
    v[5 * B + 4] += 100
    after, _ = run(q, k, v, PROMPT[: 8 * B], CONFIG)
    assert torch.equal(before[: 5 * B + 4], after[: 5 * B + 4])
    assert not torch.allclose(before[5 * B + 4], after[5 * B + 4])


# FFN


def square(h):
    return h * h


def test_ffn_by_hand():
    # One cube of four tokens with norms 4, 1, 3, 2; then a text token.
    x = torch.tensor([[0.0, 4.0], [1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 9.0]])
    cube_of = torch.tensor([0, 0, 0, 0, -1])
    # Shares .4 .1 .3 .2: p = .6 keeps tokens 0 and 2.  FFN outputs (0, 16) and (9, 0).
    mean = torch.tensor([4.5, 8.0])
    branch = torch.stack([torch.tensor([0.0, 16]), mean, torch.tensor([9.0, 0]), mean, x[4] ** 2])
    active = [True, False, True, False, True]

    y, runs = paper_ffn(x, square, cube_of, 0.6)
    assert runs.tolist() == active
    torch.testing.assert_close(y, x + branch)

    out, runs = tile_ffn(x, x, square, cube_of >= 0, 4, (0, 5), PAPER)
    assert runs.tolist() == active
    torch.testing.assert_close(out, branch)

    # The skipped tokens' mean is (.5, 1).
    for compensation, fill in (("bypass", [0.0, 0]), ("centroid", [0.25, 1])):
        branch[[1, 3]] = torch.tensor(fill)
        y, _ = paper_ffn(x, square, cube_of, 0.6, compensation)
        torch.testing.assert_close(y, x + branch)
        config = replace(PAPER, compensation=compensation)
        out, _ = tile_ffn(x, x, square, cube_of >= 0, 4, (0, 5), config)
        torch.testing.assert_close(out, branch)


def test_deviation_by_hand():
    # The FFN's input decides, not the stream before the norm (x).  The mean input is (2, 1); the
    # distances from it are 3, 1, 1, 3, so the shares .375 .125 .125 .375: p = .7 keeps 0 and 3.
    x = torch.tensor([[0.0, 1], [9, 9], [9, 9], [1, 0]])
    h = torch.tensor([[-1.0, 1], [2, 2], [2, 0], [5, 1]])
    is_video = torch.ones(4, dtype=torch.bool)
    config = AdaSparkConfig(p_ffn=0.7, importance="deviation", compensation="centroid")
    out, active = tile_ffn(x, h, square, is_video, 4, (0, 4), config)
    assert active.tolist() == [True, False, False, True]
    # The two others' mean is the mean itself.
    assert out.tolist() == [[1, 1], [4, 1], [4, 1], [25, 1]]


def test_tokens_that_are_all_alike_all_run():
    config = AdaSparkConfig(p_ffn=0.5, importance="deviation")
    is_video = torch.ones(8, dtype=torch.bool)
    _, active = tile_ffn(torch.ones(8, 4), torch.ones(8, 4), square, is_video, 8, (0, 8), config)
    assert active.all()


def test_ffn_reads_importance_before_the_norm():
    x = torch.tensor([[8.0], [1.0], [1.0], [1.0]])
    h = torch.tensor([[1.0], [5.0], [6.0], [7.0]])
    is_video = torch.ones(4, dtype=torch.bool)
    out, active = tile_ffn(x, h, square, is_video, 4, (0, 4), replace(PAPER, p_ffn=0.5))
    assert active.tolist() == [True, False, False, False]
    assert out.flatten().tolist() == [1.0] * 4


@pytest.mark.parametrize(("p", "count"), [(0.001, 1), (0.25, 2), (0.26, 3), (0.999, 8)])
def test_equal_norms_keep_the_earlier_tokens(p, count):
    x = torch.ones(8, 4)
    is_video = torch.ones(8, dtype=torch.bool)
    _, active = tile_ffn(x, x, square, is_video, 8, (0, 8), replace(PAPER, p_ffn=p))
    assert active.tolist() == [True] * count + [False] * (8 - count)


def test_ffn_is_dense_at_p_1_and_when_disabled():
    x = torch.randn(10 * B, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for settings in ({"p_ffn": 1.0}, {"enabled": False}):
        config = replace(CONFIG, **settings)
        out, active = tile_ffn(x, x, square, PROMPT, B, (0, 10 * B), config)
        assert active.all()
        assert_close(out, square(x))
    y, active = paper_ffn(x, square, torch.where(PROMPT, 0, -1), 1.0)
    assert active.all()
    assert_close(y, x + square(x))


def test_dense_layers_run_the_ffn_dense():
    x = torch.randn(10 * B, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = replace(CONFIG, dense_layers=4)
    chunk = (0, 10 * B)
    dense, active = tile_ffn(x, x, square, PROMPT, B, chunk, config, layer=3)
    assert active.all()
    assert_close(dense, square(x))
    out, active = tile_ffn(x, x, square, PROMPT, B, chunk, config, layer=4)
    expected, expected_active = tile_ffn(x, x, square, PROMPT, B, chunk, CONFIG)
    assert not active.all()
    assert torch.equal(active, expected_active)
    assert torch.equal(out, expected)


def test_tile_ffn_is_the_paper_on_whole_cubes():
    x = torch.randn(6 * B, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cube_of = torch.tensor([-1, 0, 1, 2, -1, 3]).repeat_interleave(B)
    for compensation in ("mean", "bypass"):
        config = replace(PAPER, compensation=compensation)
        y, expected = paper_ffn(x, square, cube_of, 0.6, compensation)
        out, active = tile_ffn(x, x, square, cube_of >= 0, B, (0, 6 * B), config)
        assert torch.equal(active, expected)
        assert 0 < active[B : 4 * B].sum() < 3 * B
        assert_close(x + out, y)


def test_a_cube_cut_by_a_chunk_edge_runs_the_ffn_dense():
    n = 10 * B
    x = torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, active = tile_ffn(x, x, square, PROMPT, B, (0, n), CONFIG)
    edge = 4 * B + 3
    parts = [tile_ffn(x, x, square, PROMPT, B, c, CONFIG) for c in ((0, edge), (edge, n))]
    out, runs = (torch.cat(column) for column in zip(*parts, strict=True))
    cut = slice(4 * B, 5 * B)
    assert not active[cut].all()
    assert runs[cut].all()
    assert_close(out[cut], square(x[cut]))
    rest = torch.ones(n, dtype=torch.bool)
    rest[cut] = False
    assert torch.equal(runs[rest], active[rest])
    assert_close(out[rest], whole[rest])
    # Text and blocks shared with text always run.
    assert active[: 2 * B].all() and active[8 * B :].all()
