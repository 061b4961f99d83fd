"""The needle benchmark without servers: its videos, grid, statistics, tables and pictures."""

import dataclasses
import json
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from needle import __main__ as command  # benchmarks
from needle import evs, grid, intervals, plots, report, results, run, servers, tables, videos, work
from needle.videos import Cell
from vllm.multimodal.video_prune.evs import compute_retained_tokens_count

from vllm_adaspark.accounts.cost import PRESETS
from vllm_adaspark.methods.adaspark.settings import AdaSparkConfig
from vllm_adaspark.methods.adatp.settings import AdaTPSettings

# Videos


@pytest.fixture(scope="module")
def chosen() -> list[videos.Video]:
    return videos.choose(Cell(128), 12)


def test_videos_are_held_out_and_nobody_elses(chosen):
    """evaluate.py measures on the seeds from 1,000 on, training reports on those before."""
    for video in [*chosen, *videos.choose(Cell(1024), 12)]:
        number = videos.scenes.HELD_OUT_SEEDS.index(video.seed)
        assert videos.FIRST <= number < videos.LAST
        assert video.seed not in videos.scenes.TRAINING_SEEDS
    assert videos.FIRST > 1_000_000
    longest = videos.FIRST + videos.SEEDS * 2 * (grid.LENGTHS[-1] // Cell(1).tokens + 1)
    assert longest <= videos.LAST


def test_videos_are_the_same_each_time_and_begin_alike(chosen):
    assert videos.choose(Cell(128), 6) == chosen[:6]
    assert len({video.seed for video in chosen}) == 12


def test_every_video_asks_one_question_of_each_skill(chosen):
    for video in chosen:
        assert tuple(q.skill for q in video.asked) == videos.scenes.SKILLS
    assert Counter(video.motion for video in chosen) == {"calm": 6, "busy": 6}


def test_needles_lie_at_every_depth(chosen):
    """Of 12 questions a skill, every sixth of the video has 2, give or take 1."""
    for skill in videos.scenes.SKILLS:
        found = [v.depth(q) for v in chosen for q in v.asked if q.skill == skill]
        assert all(0 < depth < 1 for depth in found)
        spread = Counter(videos.depth_bin(depth) for depth in found)
        assert all(1 <= spread[place] <= 3 for place in range(videos.DEPTHS)), (skill, spread)


def test_parts_of_a_video_hold_all_its_frames(tmp_path):
    video = videos.choose(Cell(16, parts=2), 1)[0]
    whole = videos.choose(Cell(16), 1)[0]
    parts = [videos.footage.read_mp4(path) for path in videos.write(video, tmp_path)]
    (path,) = videos.write(whole, tmp_path)
    assert [len(part) for part in parts] == [16, 16]
    apart = np.concatenate(parts).astype(int) - videos.footage.read_mp4(path)
    assert np.abs(apart).mean() < 4  # the codec starts anew in the second part
    before = path.stat().st_mtime_ns
    assert videos.write(whole, tmp_path) == [path]
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("count", [0, 10_000])
def test_a_bad_number_of_videos_is_refused(count):
    with pytest.raises(ValueError, match=f"videos={count}: must be from 1 to"):
        videos.choose(Cell(64), count)


# Grid


@pytest.mark.parametrize(
    "made",
    [grid.default(), grid.full(), grid.quick(), grid.adatp(), grid.on_places(True)],
)
def test_every_contender_can_be_served(made):
    for contender in made.contenders:
        if contender.kind == "adaspark":
            config = AdaSparkConfig().override(contender.settings)
            assert config.cube_volume == contender.block
            # A changed default of the plugin must not change a contender.
            named = contender.settings.keys() | {"enabled", "flops", "keep", "prune", "trace"}
            if "flops" in contender.settings:  # it chooses these
                named |= {"p_attn", "p_ffn"}
            for field in dataclasses.fields(AdaSparkConfig):
                assert field.name in named or not field.metadata["request"], field.name
        elif contender.kind == "adatp":
            AdaTPSettings().override(contender.settings | {"flops": 0.3})  # like another one's
            named = contender.settings.keys() | {"enabled", "flops", "keep", "trace"}
            for field in dataclasses.fields(AdaTPSettings):
                assert field.name in named or not field.metadata["request"], field.name
        else:
            assert contender.settings is None
            assert (contender.kind == "evs") == (contender.rate is not None or bool(contender.like))


def test_the_default_grid_has_what_the_readme_promises():
    curves = {contender.curve for contender in grid.default().contenders}
    assert curves == {"dense", "adaspark", "adaspark bounds", "topk", "uniform", "evs"}
    shapes = {tuple(c.settings["cube"]) for c in grid.default().contenders if c.settings}
    assert shapes == {(4, 4, 4), (1, 8, 8), (16, 2, 2), (8, 4, 4)}
    everywhere = [c.name for c in grid.default().contenders if c.lengths == grid.LENGTHS]
    assert {"dense", grid.MAIN.name, f"evs like {grid.MAIN.name.split()[1]}"} <= {*everywhere}
    assert grid.default().videos * 6 >= 60
    assert grid.default().longest == 16384
    pairs = {
        (c.settings["p_attn"], c.settings["p_ffn"]) for c in grid.full().contenders if c.settings
    }
    assert pairs >= {(a, f) for a in grid.ATTENTION_SHARES for f in grid.FFN_SHARES}


@pytest.mark.parametrize("made", [grid.default(), grid.adatp()])
def test_contenders_come_after_those_they_match(made):
    order = [contender.name for contender in run.ordered(made.contenders)]
    for contender in made.contenders:
        assert contender.like is None or order.index(contender.like) < order.index(contender.name)
    kinds = [(c.kind, c.block) for c in run.ordered(made.contenders)]
    changes = sum(a != b for a, b in pairwise(kinds))
    assert changes == len(set(kinds)) - 1  # every kind of server once


def test_only_and_lengths_narrow_the_grid_and_keep_what_is_needed():
    narrow = grid.narrowed(grid.default(), ["evs like p=0.5/0.5"], [4096])
    assert [c.name for c in narrow.contenders] == ["dense", grid.MAIN.name, "evs like p=0.5/0.5"]
    assert {c.lengths for c in narrow.contenders} == {(4096,)}
    assert not narrow.extra
    with pytest.raises(ValueError, match="--only 'evss' matches no contender; there are:"):
        grid.narrowed(grid.default(), ["evss"], [])
    with pytest.raises(ValueError, match=r"--lengths \[17\]"):
        grid.narrowed(grid.default(), [], [17])


def test_stock_dense_answers_about_more_videos_than_the_others():
    made = grid.default()
    few, more = made.numbers(grid.DENSE), made.numbers(grid.MORE_DENSE)
    numbers = list(range(grid.MORE_VIDEOS))
    assert numbers[few] == numbers[: made.videos] and numbers[few] + numbers[more] == numbers
    assert not numbers[dataclasses.replace(made, videos=50).numbers(grid.MORE_DENSE)]
    assert made.cells(grid.MORE_DENSE) == made.cells(grid.DENSE)
    assert grid.MORE_DENSE.curve == "dense"


def test_a_grid_refuses_contenders_that_cannot_be_matched():
    rival = dataclasses.replace(grid.rivals(0.5, 0.5)[0], lengths=grid.LENGTHS)
    with pytest.raises(ValueError, match=r"is to match 'adaspark p=0\.5/0\.5'"):
        grid.Grid((grid.DENSE, dataclasses.replace(grid.MAIN, lengths=(4096,)), rival))
    with pytest.raises(ValueError, match="same name"):
        grid.Grid((grid.DENSE, grid.DENSE))


def test_a_users_contender_joins_the_grid():
    given = ["--contender", "mine", "--settings", '{"p_attn": 0.4}', "--only", "adaspark mine"]
    made = command.chosen_grid(command.parse_arguments(given))
    assert [contender.name for contender in made.contenders] == ["dense", "adaspark mine"]
    assert made.contenders[1].settings == grid.BASE | {"p_attn": 0.4}
    budget = command.own_contender("b", '{"flops": 0.5}', (4096,))
    assert AdaSparkConfig().override(budget.settings).flops == 0.5


@pytest.mark.parametrize(
    "settings, message",
    [
        ("{", "not JSON"),
        ("3", "expected a JSON object"),
        ('{"p_atn": 1}', "unknown key 'p_atn' .did you mean 'p_attn'"),
        ('{"p_attn": 2}', "p_attn=2"),
    ],
)
def test_bad_settings_of_a_user_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        command.own_contender("mine", settings, (4096,))


def test_quick_leaves_the_docs_alone(tmp_path):
    options = command.parse_arguments(["--quick", "--folder", str(tmp_path)])
    assert options.out.is_relative_to(tmp_path)
    assert options.page.is_relative_to(tmp_path)
    assert command.parse_arguments([]).page == report.PAGE


# Servers


def test_stock_and_evs_servers_run_without_the_plugin(tmp_path):
    for server in (servers.Server("stock"), servers.Server("evs", rate=0.75)):
        arguments, env = servers.command(server, tmp_path, 4096)
        assert env["VLLM_PLUGINS"] == ""
        assert "--hf-overrides" not in arguments
        assert ("--video-pruning-rate" in arguments) == (server.kind == "evs")
    arguments, env = servers.command(servers.Server("adaspark", block=128), tmp_path, 4096)
    assert "adaspark_http" in env["VLLM_PLUGINS"]
    assert arguments[arguments.index("--block-size") + 1] == "128"
    arguments, env = servers.command(servers.Server("adatp", dtype="float32"), tmp_path, 4096)
    config = json.loads(arguments[arguments.index("--additional-config") + 1])
    assert config == {"method": "adatp", "adaspark": {"cube": [4, 4, 4]}}
    assert arguments[arguments.index("--dtype") + 1] == "float32"
    names = [servers.Server("evs", rate=0.5, dtype=dtype).name for dtype in ("auto", "float32")]
    assert names == ["evs-0.5000", "evs-0.5000-float32"]


def test_two_longest_prompts_fit_one_step(tmp_path):
    """A prompt cut into chunks would compute cubes that the settings leave out."""
    arguments, _ = servers.command(servers.Server("stock"), tmp_path, 16384)
    batched = int(arguments[arguments.index("--max-num-batched-tokens") + 1])
    assert batched >= servers.AT_ONCE * (16384 + run.MOST_TEXT)


# EVS


@pytest.mark.parametrize("rate", [0.5, 0.75, 0.9, 0.9999, 0.3127])
def test_kept_tokens_are_counted_as_vllm_does(rate):
    for cell in (Cell(64), Cell(100, (112, 168)), Cell(1024)):
        vllm = compute_retained_tokens_count(cell.tokens_per_patch, cell.patches, rate)
        assert evs.kept_tokens(cell, rate) == vllm


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.52, 0.9, 1.0])
def test_the_rate_spends_the_flops_asked_for(ratio):
    """As near below as whole tokens allow."""
    model, cell, text = PRESETS["3b"], Cell(512), 18
    kept = evs.kept_tokens(cell, evs.rate_for(model, ratio, cell, text))
    assert evs.flops_ratio(model, kept, cell.tokens, text) <= ratio
    if kept < cell.tokens:
        assert evs.flops_ratio(model, kept + 1, cell.tokens, text) > ratio


def test_no_rate_spends_less_than_the_first_patch():
    with pytest.raises(ValueError, match=r"ratio=1e-06: less than EVS needs"):
        evs.rate_for(PRESETS["3b"], 1e-6, Cell(64), 18)


# Statistics


def row(contender="dense", right=1, video=0, tokens=4096, haystack="calm", **more) -> dict:
    return {
        "contender": contender,
        "settings": {},
        "skill": "basic",
        "haystack": haystack,
        "tokens": tokens,
        "depth": 0.5,
        "flops_ratio": 1.0,
        "density": 1.0,
        "ffn_density": 1.0,
        "correct": right,
        "total": 1,
        "video": video,
        "frame": "112×112",
        "parts": 1,
    } | more


def test_an_interval_holds_its_share_and_narrows_with_videos():
    few = [row(right=int(n % 5 > 0), video=n) for n in range(20)]
    many = [row(right=int(n % 5 > 0), video=n) for n in range(400)]
    narrow, wide = intervals.accuracy(many), intervals.accuracy(few)
    assert narrow.value == wide.value == 0.8
    assert narrow.low < 0.8 < narrow.high
    assert narrow.high - narrow.low < (wide.high - wide.low) / 2
    # The normal approximation: 2 × 1.96 × sqrt(.8 × .2 / 400)
    assert narrow.high - narrow.low == pytest.approx(0.078, rel=0.2)
    assert intervals.accuracy(many) == narrow  # the same each time


def test_whole_videos_are_drawn():
    """Ten answers about each of 20 videos, all alike, are 20 draws and not 200."""
    rng = np.random.default_rng(0)
    rows = [
        row(right=right, video=n) for n in range(20) for right in [int(rng.random() < 0.5)] * 10
    ]
    interval = intervals.accuracy(rows)
    assert interval.high - interval.low > 0.3


def test_a_difference_is_paired():
    """Videos are right or wrong at random, both contenders alike but for one video of 40."""
    rng = np.random.default_rng(1)
    shares = [int(rng.random() < 0.5) for _ in range(40)]
    first = shares.index(1)
    rows = [row(right=right, video=n) for n, right in enumerate(shares)]
    worse = [row(right=right * (n != first), video=n) for n, right in enumerate(shares)]
    lost = intervals.difference(worse, rows)
    assert lost.value == pytest.approx(-1 / 40)
    assert -0.1 < lost.low < 0 and lost.high == 0
    # A video that only one of them saw does not count.
    assert intervals.difference([*worse, row(right=0, video=99)], rows) == lost
    assert intervals.difference([row(video=99)], rows) is None


def test_every_length_is_drawn_from_by_itself():
    """All wrong at one length and all right at the other leaves nothing to chance."""
    rows = [row(right=n % 2, video=n, tokens=(4096, 8192)[n % 2]) for n in range(40)]
    assert intervals.accuracy(rows) == intervals.Interval(0.5, 0.5, 0.5)


def test_no_rows_have_no_share():
    with pytest.raises(ValueError, match="no rows"):
        intervals.accuracy([])


# Work


def record(contender="dense", answers=(("basic", "7", "7"),), **more) -> dict:
    return {
        "contender": contender,
        "server": "stock",
        "settings": None,
        "video": "calm-1",
        "seed": 1,
        "haystack": "calm",
        "tokens": 4096,
        "frame": "112×112",
        "parts": 1,
        "flops_ratio": 1.0,
        "attention_density": 1.0,
        "ffn_density": 1.0,
        "answers": [
            {"skill": skill, "depth": 0.25, "expected": expected, "answer": said}
            for skill, expected, said in answers
        ],
    } | more


def test_a_run_goes_on_with_what_it_has(tmp_path):
    path = tmp_path / "work.jsonl"
    work.Work(path, "weights").add(record())
    with path.open("a") as file:
        file.write('{"checkpoint": "wei')  # killed here
    again = work.Work(path, "weights")
    assert again.find("dense", "stock", None, "calm-1")["seed"] == 1
    assert again.find("dense", "stock", {"p_attn": 0.5}, "calm-1") is None
    assert again.find("dense", "stock", None, "calm-2") is None
    assert again.other_code == 0
    assert work.Work(path, "other weights").find("dense", "stock", None, "calm-1") is None
    again.add(record(video="calm-2"))
    assert work.Work(path, "weights").find("dense", "stock", None, "calm-2")


# Results


def test_rows_carry_what_was_asked():
    made = results.rows(
        record("adaspark p=0.5/0.5", [("basic", "7", "7"), ("count", "2", "3")], settings={"p": 1})
    )
    assert [(r["skill"], r["correct"], r["total"]) for r in made] == [
        ("basic", 1, 1),
        ("count", 0, 1),
    ]
    names = "contender settings skill haystack tokens depth flops_ratio density correct total"
    assert {*names.split()} <= made[0].keys()
    assert made[0]["settings"] == {"p": 1}
    assert made[0]["density"] == 1.0


@pytest.fixture(scope="module")
def result() -> dict:
    """Made-up answers of four contenders: EVS is best when calm, wrong when busy."""
    rng = np.random.default_rng(0)
    share = {
        "dense": 0.95,
        "adaspark p=1/1": 0.95,
        "adaspark p=0.5/0.5": 0.9,
        "evs like p=0.5/0.5": 0,
    }
    flops = {
        "dense": 1.0,
        "adaspark p=1/1": 1.0,
        "adaspark p=0.5/0.5": 0.4,
        "evs like p=0.5/0.5": 0.4,
    }
    rows = [
        row(
            name,
            right=int(rng.random() < (share[name] or (1.0 if haystack == "calm" else 0.2))),
            video=f"{haystack}{tokens}{number}",
            tokens=tokens,
            haystack=haystack,
            skill=skill,
            depth=float(rng.random()),
            flops_ratio=flops[name],
            density=flops[name],
            ffn_density=None if name.startswith("evs") else flops[name],
        )
        for name in share
        for tokens in grid.MIDDLE
        for haystack in videos.MOTIONS
        for number in range(6)
        for skill in videos.scenes.SKILLS
    ]
    rows += [row(frame="168×112", tokens=3072), row(parts=2, right=0)]
    rows += [row(grid.MORE_DENSE.name, tokens=1024, right=0)]
    contenders = [
        {
            "name": n,
            "curve": n.split()[0],
            "kind": "",
            "like": n.partition(" like ")[2] and grid.MAIN.name,
        }
        for n in share
    ]
    return {
        "date": "2030-01-02T03:04:05",
        "command": "python -m benchmarks.needle",
        "commit": "abc",
        "checkpoint": {"path": "x", "sha256": "0" * 64, "config": {"num_hidden_layers": 6}},
        "machine": {"processor": "P", "cores": 2, "memory_gib": 4},
        "versions": {"vllm": "1", "torch": "2", "vllm-adaspark": "3"},
        "videos_per_cell": 12,
        "contenders": contenders,
        "rows": rows,
    }


def test_tables_say_what_the_rows_say(result):
    matched = tables.matched(result).splitlines()
    assert len(matched) == 3  # head, rule, one pair
    calm, busy, _ = matched[2].split(" | ")[-3:]
    assert calm.startswith("-") and busy.startswith("+"), matched[2]
    assert "| 40 % | 40 % |" in matched[2]
    assert "| 4,096 | calm |" in tables.dense(result)
    assert "| 112×112, 2 videos | 4,096 | calm | 0/1 |" in tables.dense(result)
    assert "| 168×112 | 3,072 | calm | 1/1 |" in tables.dense(result)
    assert "| 112×112 | 1,024 | both | 0/1 |" in tables.dense(result)
    ablation = tables.ablation(result)
    assert all(contender["name"] in ablation for contender in result["contenders"])
    # Cheapest last, and only contenders that ran at every long length.
    assert [line.split(" | ")[1] for line in tables.long(result).splitlines()[2:]] == [
        "100 %",
        "100 %",
        "40 %",
        "40 %",
    ]
    assert "72 questions for each contender and length" in tables.provenance(result)


def test_a_series_of_its_own_fills_its_own_tables(result, tmp_path):
    """Every contender at each length, calm and busy, with intervals."""
    mine = result | {"series": "adatp", "dtype": "float32"}
    page = tmp_path / "quality.md"
    report.write(mine, page)
    text = page.read_text()
    line = next(
        x for x in text.splitlines() if x.startswith("| evs like p=0.5/0.5 | 40 % | 40 % |")
    )
    assert re.search(r"\| \d+\.\d % \[\d+\.\d, \d+\.\d\] \| -", line), line
    assert "2 cores, 4 GiB; computed in float32" in text
    assert tables.dense(result) not in text, "the others' tables stay"
    assert [path.name for path in plots.draw(mine, tmp_path)] == ["adatp_ablation.png"]


def test_other_shapes_do_not_blur_the_other_tables(result):
    usual = tables.Rows.of(result)
    assert len(usual) == len(result["rows"]) - 3


def test_the_page_is_filled_in(result, tmp_path):
    page = tmp_path / "quick" / "quality.md"
    report.write(result, page)
    text = page.read_text()
    assert all(f"<!-- needle: {name} -->\n" in text for name in tables.TABLES)
    assert tables.dense(result) in text and "`python -m benchmarks.needle`, commit abc" in text


def test_the_readme_and_the_models_card_are_filled_in(result, tmp_path):
    for name, place in (("README.md", "headline"), ("examples/needle/README.md", "card")):
        assert f"<!-- needle: {place} -->" in (report.ROOT / name).read_text()
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"<!-- needle: {place} -->\n<!-- end -->\n")
    report.write_summaries(result, tmp_path)
    card = (tmp_path / "examples/needle/README.md").read_text().splitlines()
    assert "| 112×112, 2 videos | 4,096 | 0/1 | – | – | – | – | – | 0.0 % |" in card
    assert "| 168×112 | 3,072 | 1/1 | – | – | – | – | – | 100.0 % |" in card
    first, _, dense, *_ = (tmp_path / "README.md").read_text().splitlines()[1:]
    assert first == "|  | 4,096 tokens | 8,192 tokens |"
    assert dense.startswith("| stock dense | ") and dense.endswith("(100 %) |")


def test_the_result_file_is_json_line_by_line(result, tmp_path):
    results.write(result, tmp_path / "needle.json")
    text = (tmp_path / "needle.json").read_text()
    assert json.loads(text) == result
    assert len(text.splitlines()) > len(result["rows"])


def test_pictures_are_drawn(result, tmp_path):
    drawn = plots.draw(result, tmp_path)
    assert [path.name for path in drawn] == [
        "needle_depth.png",
        "needle_flops.png",
        "needle_ablation.png",
    ]
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_curves_hold_contenders_of_one_rule():
    contenders = [{"name": c.name, "curve": c.curve} for c in grid.default().contenders]
    ours = plots.curve_members({"contenders": contenders}, "adaspark")
    assert "adaspark p=0.5/0.5" in ours
    assert not any("mean" in name or "cube" in name or name.endswith("/1") for name in ours[1:])


def test_machine_is_told():
    told = results.machine()
    assert told["cores"] >= 1
    assert told["memory_gib"] > 0


def test_arguments_without_settings_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.parse_arguments(["--contender", "mine"])
    assert "every --contender needs its --settings" in capsys.readouterr().err
