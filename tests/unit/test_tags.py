"""Tags: every field survives the ride in the positions, and the positions survive the tags."""

import dataclasses
import random

import pytest
import torch

from vllm_adaspark.config import (
    COMPENSATIONS,
    IMPORTANCES,
    SELECTIONS,
    TEXT_QUERIES,
    AdaSparkConfig,
)
from vllm_adaspark.tags import (
    BUDGET,
    MAX_POSITION,
    Tags,
    add_tags,
    split_tags,
    tag_word,
    unpack,
    with_shares,
)

HIGHEST = AdaSparkConfig(
    p_attn=1.0,
    p_ffn=1.0,
    selection=SELECTIONS[-1],
    keep=1.0,
    min_cubes=16,
    dense_layers=15,
    text_queries="sparse",
    importance=IMPORTANCES[-1],
    compensation=COMPENSATIONS[-1],
)
LOWEST = AdaSparkConfig(
    p_attn=0.001,
    p_ffn=0.001,
    selection=SELECTIONS[0],
    min_cubes=1,
    dense_layers=0,
    text_queries="dense",
    importance=IMPORTANCES[0],
    compensation=COMPENSATIONS[0],
)


def expected(config: AdaSparkConfig) -> dict:
    share = config.p_attn if config.selection == "top_p" else config.keep
    return {
        "is_video": True,
        "attn_share": round(share * 1000) if config.enabled else 1000,
        "ffn_share": round(config.p_ffn * 1000) if config.enabled else 1000,
        "importance": IMPORTANCES.index(config.importance),
        "compensation": COMPENSATIONS.index(config.compensation),
        "rule": SELECTIONS.index(config.selection),
        "sparse_text": config.text_queries == "sparse",
        "min_cubes": config.min_cubes,
        "dense_layers": config.dense_layers,
    }


def unpacked(word: int | torch.Tensor) -> dict:
    return {name: field.item() for name, field in unpack(torch.as_tensor(word))._asdict().items()}


def random_config(rng: random.Random) -> AdaSparkConfig:
    return AdaSparkConfig(
        enabled=rng.random() < 0.9,
        p_attn=rng.randint(1, 1000) / 1000,
        p_ffn=rng.randint(1, 1000) / 1000,
        selection=rng.choice(SELECTIONS),
        keep=rng.randint(1, 1000) / 1000,
        min_cubes=rng.randint(1, 16),
        dense_layers=rng.randint(0, 15),
        text_queries=rng.choice(TEXT_QUERIES),
        importance=rng.choice(IMPORTANCES),
        compensation=rng.choice(COMPENSATIONS),
    )


@pytest.mark.parametrize(
    "settings",
    [
        *({"p_attn": p} for p in (0.001, 0.5, 0.999, 1.0)),
        *({"p_ffn": p} for p in (0.001, 0.5, 0.999, 1.0)),
        *({"selection": s, "keep": 0.123} for s in SELECTIONS),
        *({"min_cubes": n} for n in range(1, 17)),
        *({"dense_layers": n} for n in range(16)),
        *({"text_queries": t} for t in TEXT_QUERIES),
        *({"importance": i} for i in IMPORTANCES),
        *({"compensation": c} for c in COMPENSATIONS),
        {"enabled": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("base", [LOWEST, HIGHEST], ids=["lowest", "highest"])
def test_one_field_at_a_time_leaves_the_others_alone(base, settings):
    config = dataclasses.replace(base, **settings)
    assert unpacked(tag_word(config)) == expected(config)


@pytest.mark.parametrize("base", [LOWEST, HIGHEST], ids=["lowest", "highest"])
def test_a_budget_has_a_rule_of_its_own_and_settable_shares(base):
    config = dataclasses.replace(base, flops=0.4, selection="top_p")
    word = tag_word(config)
    others = expected(config) | {"rule": BUDGET}
    assert unpacked(word) == others | {"attn_share": 400, "ffn_share": 400}
    assert unpacked(with_shares(word, 0.001, 1.0)) == others | {"attn_share": 1, "ffn_share": 1000}
    assert unpacked(with_shares(word, 1.0, 0.123)) == others | {
        "attn_share": 1000,
        "ffn_share": 123,
    }


def test_a_budget_that_is_switched_off_runs_dense():
    word = unpacked(tag_word(AdaSparkConfig(flops=0.4, enabled=False)))
    assert word["attn_share"] == word["ffn_share"] == 1000


def test_random_settings_and_positions_round_trip():
    rng = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    for case in range(300):
        config = random_config(rng)
        n = rng.randint(1, 40)
        start, stop = sorted((rng.randint(0, n), rng.randint(0, n)))
        dtype = (torch.int32, torch.int64)[case % 2]
        plain = torch.randint(0, MAX_POSITION + 1, (3, n), generator=generator).to(dtype)
        tagged = plain.clone()
        add_tags(tagged, tag_word(config), slice(start, stop))

        assert tagged.dtype == dtype
        assert tagged.min() >= 0
        assert tagged.long().max() < 2**31
        positions, words = split_tags(tagged)
        assert positions.dtype == dtype
        assert torch.equal(positions, plain)
        assert words.dtype == torch.int64
        video = torch.zeros(n, dtype=torch.bool)
        video[start:stop] = True
        assert (words[~video] == 0).all()
        assert (words[video] == tag_word(config)).all()
        for word in words[video][:1]:
            assert unpacked(word) == expected(config)


def test_highest_tags_on_the_highest_position_fit_into_int32():
    tagged = torch.full((3, 2), MAX_POSITION, dtype=torch.int64)
    add_tags(tagged, tag_word(HIGHEST), slice(0, 1))
    assert (tagged[:, 0] < 2**31).all()
    assert (tagged[:, 0] > MAX_POSITION).all()
    assert (tagged[:, 1] == MAX_POSITION).all()
    positions, words = split_tags(tagged.to(torch.int32))
    assert (positions == MAX_POSITION).all()
    assert unpacked(words[0]) == expected(HIGHEST)


def test_text_unpacks_to_no_video():
    tags = unpack(torch.zeros(4, dtype=torch.int64))
    assert isinstance(tags, Tags)
    assert not tags.is_video.any()
    assert (tags.attn_share == 0).all()


def test_unpack_keeps_the_shape():
    words = torch.full((2, 3), tag_word(HIGHEST))
    assert {field.shape for field in unpack(words)} == {(2, 3)}


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_position_too_large_is_refused_and_changes_nothing(row):
    positions = torch.zeros(3, 5, dtype=torch.int64)
    positions[row, 3] = MAX_POSITION + 1
    before = positions.clone()
    with pytest.raises(ValueError, match=f"{MAX_POSITION + 1} is above {MAX_POSITION}"):
        add_tags(positions, tag_word(LOWEST), slice(2, 5))
    assert torch.equal(positions, before)
    add_tags(positions, tag_word(LOWEST), slice(0, 3))  # the large one is not among these


def test_no_tokens_to_tag():
    positions = torch.zeros(3, 5, dtype=torch.int64)
    add_tags(positions, tag_word(HIGHEST), slice(5, 5))
    assert (positions == 0).all()


@pytest.mark.parametrize("in_place", [False, True])
def test_split_into_a_given_tensor(in_place):
    plain = torch.arange(12, dtype=torch.int32).view(3, 4)
    tagged = plain.clone()
    add_tags(tagged, tag_word(HIGHEST), slice(1, 3))
    out = tagged if in_place else torch.empty_like(tagged)
    positions, words = split_tags(tagged, out=out)
    assert positions.data_ptr() == out.data_ptr()
    assert torch.equal(out, plain)
    assert words.tolist() == [0, tag_word(HIGHEST), tag_word(HIGHEST), 0]
