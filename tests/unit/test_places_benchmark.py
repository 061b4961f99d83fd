"""The benchmark's second bed, "places": its videos, grid, tables and picture."""

from collections import Counter

import numpy as np
import pytest
from needle import __main__ as command  # benchmarks
from needle import grid, plots, report, tables, videos
from needle.beds import PLACES_BED  # puts examples/places on the path
from needle.videos import Cell
from tower import build

from vllm_adaspark.accounts.flops import ModelShape
from vllm_adaspark.methods.adaspark.budget import prompt_cost
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig

CELL = Cell(32, PLACES_BED.size, bed=PLACES_BED)


@pytest.fixture(scope="module")
def chosen() -> list[videos.Video]:
    return videos.choose(CELL, 10)


def test_every_video_asks_one_question_of_each_skill(chosen):
    assert CELL.tokens == 2048
    for video in chosen:
        assert tuple(question.skill for question in video.asked) == PLACES_BED.skills
        assert all(0 < video.depth(question) < 1 for question in video.asked)
    assert Counter(video.motion for video in chosen) == dict.fromkeys(PLACES_BED.haystacks, 2)
    assert videos.choose(CELL, 5) == chosen[:5]


def test_seeds_of_the_longest_videos_are_set_aside(chosen):
    longest = grid.on_places().longest // 64
    assert videos.FIRST + videos.SEEDS * 5 * (longest + 1) <= videos.LAST
    for video in chosen:
        assert videos.FIRST <= videos.scenes.HELD_OUT_SEEDS.index(video.seed) < videos.LAST


def test_a_video_is_the_beds(tmp_path):
    cell = Cell(12, PLACES_BED.size, bed=PLACES_BED)
    video = videos.Video(cell, "pan", videos.scenes.HELD_OUT_SEEDS[3], ())
    (path,) = videos.write(video, tmp_path)
    frames = videos.footage.read_mp4(path).astype(int)
    assert frames.shape == (24, 224, 224, 3)
    assert np.abs(frames - PLACES_BED.frames(video.scene)).mean() < 8  # the codec's loss


def test_all_methods_meet_at_each_budget():
    made = grid.on_places()
    for budget in grid.BUDGETS:
        named = {c.curve for c in made.contenders if f"flops={budget.flops:g}" in c.name}
        assert named >= {"adaspark+prune", "evs"}
        assert (named >= {"adatp", "fastv"}) == bool(budget.events)
        assert (named >= {"adaspark", "topk", "uniform"}) == bool(budget.alone)
    assert made.cells(made.contenders[0]) == [
        Cell(patches, (224, 224), bed=PLACES_BED) for patches in (32, 64, 128)
    ]
    assert len(grid.on_places(full=True).contenders) > len(made.contenders)


def test_budgets_can_be_met():
    """Projections always run: AdaSpark alone cannot keep to a small one of a short prompt."""
    model = build()
    sizes = model.config.text_config
    shape = ModelShape(
        sizes.hidden_size,
        sizes.num_attention_heads,
        sizes.num_key_value_heads,
        sizes.hidden_size // sizes.num_attention_heads,
        sizes.intermediate_size,
    )
    for contender in grid.on_places().contenders:
        if "flops" not in (contender.settings or {}) or contender.kind != "adaspark":
            continue
        config = AdaSparkConfig().override(contender.settings)
        for tokens in contender.lengths:
            dropped = int(tokens * config.prune)
            is_video = np.r_[np.zeros(4, bool), np.ones(tokens - dropped, bool), np.zeros(14, bool)]
            cost = prompt_cost(shape, sizes.num_hidden_layers, is_video, config, dropped)
            assert cost.least <= config.flops, (contender.name, tokens)


def test_the_bed_has_its_own_checkpoint_folder_and_page(capsys):
    options = command.parse_arguments(["--bed", "places"])
    assert options.checkpoint == PLACES_BED.checkpoint
    assert options.out.name == "places.json" and options.page == report.PLACES_PAGE
    assert options.folder.parent.name == ".places"
    with pytest.raises(SystemExit):
        command.parse_arguments(["--bed", "places", "--adatp"])
    assert "--bed places has one grid" in capsys.readouterr().err


@pytest.fixture
def result() -> dict:
    """Made up: EVS loses half of its answers where something moves."""
    made = grid.narrowed(grid.on_places(), ["*flops=0.25*"], [4096, 8192])
    rows = [
        {
            "contender": contender.name,
            "settings": {},
            "skill": skill,
            "haystack": haystack,
            "tokens": tokens,
            "depth": 0.5,
            "flops_ratio": 1.0 if contender.kind == "stock" else 0.25,
            "density": None,
            "ffn_density": None,
            "correct": int(contender.kind != "evs" or haystack == "calm" or number % 2),
            "total": 1,
            "video": number,
            "frame": "224×224",
            "parts": 1,
        }
        for contender in made.contenders
        for tokens in contender.lengths
        for haystack in PLACES_BED.haystacks
        for number in range(4)
        for skill in PLACES_BED.skills
    ]
    contenders = [
        {"name": c.name, "curve": c.curve, "kind": c.kind, "like": c.like} for c in made.contenders
    ]
    return {
        "series": "places",
        "frame": "224×224",
        "skills": list(PLACES_BED.skills),
        "date": "2030-01-02",
        "command": "x",
        "commit": "abc",
        "checkpoint": {"path": "x", "sha256": "0" * 64, "config": {"num_hidden_layers": 5}},
        "machine": {"processor": "P", "cores": 2, "memory_gib": 4},
        "versions": {"vllm": "1", "torch": "2", "vllm-adaspark": "3"},
        "videos_per_cell": 20,
        "contenders": contenders,
        "rows": rows,
    }


def test_tables_have_a_column_for_each_haystack_and_skill(result, tmp_path):
    evs = next(x for x in tables.haystacks_of_all(result).splitlines() if "evs like" in x)
    assert evs.startswith("| evs like flops=0.25 | 25 % | 100.0 % | 50.0 % | 50.0 % | 50.0 % |")
    assert "-40.0 [" in evs
    matched = next(x for x in tables.matched(result).splitlines() if "evs like" in x)
    assert matched.count("+50.0 [") == 4 and "+0.0 [+0.0, +0.0]" in matched
    assert "| contender | basic | colour | place |" in tables.skills_of_all(result)
    assert "140 questions for each contender and length" in tables.provenance(result)
    page = tmp_path / "places.md"
    report.write(result, page)
    assert tables.haystacks_of_all(result) in page.read_text()
    (picture,) = plots.draw(result, tmp_path)
    assert picture.name == "places_flops.png" and picture.stat().st_size > 5000
