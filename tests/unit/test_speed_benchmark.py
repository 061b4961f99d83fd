"""The speed benchmark's arithmetic, and what it writes: no timing, rows are made up."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from speed import __main__ as bench
from speed import attention, model, off, plots, report, scaling, served, videonsa
from speed.record import DENSE, Cell, Record, features, in_turn, rows

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "bench.json"
ABOUT = {
    "machine": {
        "cpu": "a CPU",
        "threads": 2,
        "instructions": "AVX512",
        "versions": {"vllm": "0.32.0"},
    }
}


@pytest.fixture
def record(tmp_path) -> Record:
    return Record(tmp_path / "work.jsonl", ABOUT)


def row_of(record: Record, contender: str) -> dict:
    return next(row for row in rows(record) if row["contender"] == contender)


# -- rows ---------------------------------------------------------------------------------------


def test_rows_are_medians_compared_with_dense(record) -> None:
    for seconds in (10.0, 12.0, 100.0):
        record.add(Cell("attention", DENSE, 4096), seconds)
    for seconds in (5.0, 3.0, 4.0):
        parts = {"selection": seconds / 10}
        record.add(Cell("attention", "ours", 4096, 0.2), seconds, work=0.25, parts=parts)
    dense, ours = row_of(record, DENSE), row_of(record, "ours")
    assert (dense["median_s"], dense["efficiency"], dense["ratio_to_dense"]) == (12, 1, 1)
    assert ours["time_s"] == [5, 3, 4] and ours["median_s"] == 4
    assert (ours["density"], ours["asked"]) == (0.25, 0.2)
    assert ours["efficiency"] == 12 * 0.25 / 4 and ours["ratio_to_dense"] == 4 / 12
    assert ours["parts"] == {"selection": 0.4}


def test_only_the_dense_of_the_same_length_counts(record) -> None:
    record.add(Cell("attention", DENSE, 4096), 1.0)
    record.add(Cell("attention", "ours", 8192), 1.0)
    record.add(Cell("ffn 3B", "ours", 4096), 1.0)
    for row in rows(record)[1:]:
        assert row["efficiency"] is None and row["ratio_to_dense"] is None


def test_contenders_take_turns_and_turn_round(record) -> None:
    order = []

    def contender(name: str):
        def sample() -> dict:
            order.append(name)
            return {"time_s": 1.0}

        return sample

    cells = {Cell("x", name, 1): contender(name) for name in "abc"}
    in_turn(record, cells, dict(zip(cells, (2, 3, 1))))
    assert "".join(order) == "abc" + "ba" + "b"


# -- an interrupted run ---------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(record, tmp_path) -> None:
    cell = Cell("ttft", DENSE, 8192)
    record.add(cell, 1.5, parts={"vision": 0.5})
    record.note("EVS", {"video_pruning_rate": 0.5})
    with (tmp_path / "work.jsonl").open("a") as file:
        file.write('{"cell": {"name": "tt')  # cut in the middle of a line
    again = Record(tmp_path / "work.jsonl", ABOUT)
    assert again.samples == record.samples and again.notes == record.notes
    asked = []

    def sample() -> dict:
        asked.append(again.count(cell))
        return {"time_s": 2.0}

    in_turn(again, {cell: sample}, {cell: 3})
    assert asked == [1, 2]
    third = Record(tmp_path / "work.jsonl", ABOUT)
    assert [s["time_s"] for s in third.samples[cell]] == [1.5, 2.0, 2.0]


def test_samples_of_another_machine_are_refused(record, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"work\.jsonl holds samples of another run.*--fresh"):
        Record(tmp_path / "work.jsonl", {"machine": "another"})


def test_other_parts_of_an_older_run_are_kept(record, tmp_path) -> None:
    record.add(Cell("ffn 3B", DENSE, 8192), 1.0)
    out = tmp_path / "bench.json"
    older = [{"name": name, "tokens": 1} for name in ("attention", "ffn 3B", "ttft", "8 at once")]
    out.write_text(json.dumps({"about": ABOUT, "notes": {}, "rows": older[1:]}))
    names = [row["name"] for row in bench.with_other_parts(result(record), out, ["ffn"])["rows"]]
    assert names == ["ttft", "8 at once", "ffn 3B"]


def test_a_part_may_be_measured_on_another_machine_than_the_rest(record, tmp_path) -> None:
    record.add(Cell("decoding", DENSE, 8192), 2.0)
    record.add(Cell("decoding", "p=0.9", 8192), 1.0, work=0.8, parts={"choosing": 0.1})
    record.note("decoding", {"dtype": "float32"})
    out = tmp_path / "bench.json"
    there = {"machine": ABOUT["machine"] | {"cpu": "another CPU"}}
    older = [{"name": "tpot", "tokens": 1, "contender": DENSE, "median_s": 1, "ratio_to_dense": 1}]
    out.write_text(json.dumps({"about": there, "notes": {}, "rows": older}))
    for _ in range(2):  # and again
        both = bench.with_other_parts(result(record), out, ["decoding"])
        assert both["about"] == there and both["elsewhere"] == {"decoding": ABOUT}
        out.write_text(json.dumps(both))
    text = report.markdown(both)
    assert text.startswith("another CPU")
    assert "\n\na CPU, 2 threads, AVX512; vllm 0.32.0; float32.\n\n" in text
    # Measured where the rest was, it needs no word of its own.
    record.about["machine"] = there["machine"]
    assert bench.with_other_parts(result(record), out, ["decoding"])["elsewhere"] == {}
    # Nothing is left of another machine: it is not named.
    of_decoding = [row for row in both["rows"] if row["name"] == "decoding"]
    out.write_text(json.dumps({"about": "a third machine", "notes": {}, "rows": of_decoding}))
    alone = bench.with_other_parts(result(record), out, ["decoding"])
    assert alone["about"] == there and alone["elsewhere"] == {}


@pytest.mark.parametrize(
    "name, part",
    [
        ("decoding", "decoding"),
        ("long, together", "long"),
        ("attention", "attention"),
        ("ffn 7B", "ffn"),
        ("ttft, language model", "served"),
        ("dropping, 1 at once", "dropping"),
        ("off, a video, first token", "off"),
        ("compiled, ttft, language model", "compiled"),
    ],
)
def test_every_row_belongs_to_a_part(name, part) -> None:
    assert bench.part_of({"name": name}) == part


# -- arithmetic -----------------------------------------------------------------------------------


def test_exponent_of_a_power_law() -> None:
    points = [(tokens, 3e-9 * tokens**1.7) for tokens in (4096, 8192, 65536)]
    assert scaling.exponent(points) == pytest.approx(1.7)
    with pytest.raises(ValueError, match="two lengths or more"):
        scaling.exponent([(4096, 1.0), (4096, 2.0)])


def test_exponents_need_two_lengths(record) -> None:
    for tokens in (4096, 8192):
        record.add(Cell("attention", DENSE, tokens), tokens**2)
    record.add(Cell("attention", "ours", 8192, 0.2), 1.0)
    [fit] = scaling.exponents(rows(record))
    assert fit["contender"] == DENSE and fit["exponent"] == pytest.approx(2)
    assert fit["tokens"] == [4096, 8192]


def test_memory_is_what_the_state_takes() -> None:
    memory = scaling.memory()
    assert memory["kv_cache"] == 2 * 4 * 128 * 2
    assert memory["key_sums"] == 4 * 128 * 4 / 64
    assert memory["key_sums_share"] == pytest.approx(1 / 64)


def test_planning_is_shared_by_the_layers() -> None:
    row = {"time_s": [1.0, 3.0, 2.0], "parts": {"selection": 0.1, "planning": 0.28}}
    assert attention.selection_share(row) == pytest.approx((0.1 + 0.01) / 2)
    assert attention.selection_share({"time_s": [1.0]}) is None


def test_evs_costs_what_we_cost() -> None:
    shape = model.SHAPES["3B"]
    dense = model.flops(shape, 32768)
    share = model.flops(shape, 32768, attention=0.2, ffn=0.5) / dense
    kept = 1 - model.pruning_rate(shape, 32768, share)
    assert 0 < share < kept < 1, "dropping a token saves its attention twice over"
    assert model.flops(shape, round(32768 * kept)) / dense == pytest.approx(share, abs=1e-3)


def test_a_videos_tokens_fill_frames(tmp_path) -> None:
    with pytest.raises(ValueError, match="tokens=1000: must be a multiple of 32"):
        model.Videos(tmp_path).url(1000, 0)
    assert model.Videos(tmp_path).url(64, 0) == (tmp_path / "64-0.mp4").as_uri()
    assert (tmp_path / "64-0.mp4").stat().st_size > 0


def test_flex_gets_the_blocks_we_chose() -> None:
    kept = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]]).bool().expand(4, 3, 3)
    mask = attention._mask_of(kept, 64)
    dense = mask.to_dense()[0]
    assert dense.shape == (28, 3, 3) and torch.equal(dense[0].bool(), kept[0])
    assert mask.kv_num_blocks[0, 0].tolist() == [1, 1, 1], "the diagonal is causal"
    assert mask.full_kv_num_blocks[0, 0].tolist() == [0, 1, 1]


def test_the_median_of_pairs_has_an_interval() -> None:
    base = [1.0, 2.0, 4.0] * 14
    mine = [b * (1 + (n - 20) / 1000) for n, b in enumerate(base)]  # ratios 0.980 to 1.021
    median, low, high = off.paired(mine, base)
    assert median == pytest.approx(1.0005)
    # Of 42 coins, 14 or fewer are heads in 2.2 % of all cases, 15 or fewer in 4.4 %.
    assert (low, high) == pytest.approx((0.980 + 0.014, 1.021 - 0.014))
    assert off.paired([3.0] * 6, [2.0] * 6) == (1.5, 1.5, 1.5)
    with pytest.raises(ValueError, match="5 pairs are too few"):
        off.paired([1.0] * 5, [1.0] * 5)


# -- what is written ------------------------------------------------------------------------------


def result(record: Record) -> dict:
    made = bench.result_of(record)
    return made | {"scaling": scaling.summary(made["rows"])}


@pytest.fixture
def full(record) -> dict:
    """A result with a row of each kind."""
    choosing = {"selection": 0.1, "planning": 0.0}
    for tokens in (4096, 8192):
        record.add(Cell("attention", DENSE, tokens), 10.0)
        record.add(Cell("attention", "adaspark", tokens, 0.2), 2.5, work=0.22, parts=choosing)
    record.add(Cell("attention", "FlexAttention", 4096, 0.2), 7.5, work=0.22)
    record.add(Cell("ffn 7B", DENSE, 8192), 8.0)
    record.add(Cell("ffn 7B", "adaspark", 8192, 0.5), 5.0, work=0.5, parts={"selection": 0.5})
    branches = {"gates": 0.5, "selected": 3.0, "mixing": 0.25}
    record.add(Cell("videonsa", DENSE, 4096), 5.0)
    record.add(Cell("videonsa", "videonsa", 4096), 4.0, work=0.6, parts=branches)
    record.note("videonsa", {"dtype": "float32"})
    parts = {"media decode": 0.5, "language model": 4.0, "other": -0.001}
    for contender in (DENSE, "EVS"):
        record.add(Cell("ttft", contender, 8192), 4.5, parts=parts)
        record.add(Cell("ttft, language model", contender, 8192), 4.0)
        record.add(Cell("compiled, ttft", contender, 8192), 4.5, parts=parts)
        record.add(Cell("compiled, ttft, language model", contender, 8192), 4.0)
        record.add(Cell("tpot", contender, 8192), 0.0421)
        record.add(Cell("8 at once", contender, 1024), 4.0, requests_per_s=2.0, ttft_s=1.25)
    for contender, seconds, cpu in ((DENSE, 9.0, 8.0), ("AdaTP", 3.0, 2.0)):
        cell = Cell("dropping, 8 at once", contender, 2048)
        record.add(cell, seconds, cpu_s=cpu, requests_per_s=8 / seconds, alive=0.4)
    record.add(Cell("decoding", DENSE, 8192), 0.004)
    choosing = {"choosing": 0.0005, "planning": 0.001}
    record.add(Cell("decoding", "p=0.9", 8192), 0.0032, work=0.81, parts=choosing)
    record.note("decoding", {"dtype": "float32"})
    for end, planning in ((8192, 0.002), (16384, 0.004)):
        chunk = {"planning": planning, "choosing": 0.05, "kernel": 4.95}
        record.add(Cell("long", "adaspark", end), 5.0, work=0.2, parts=chunk, step_bytes=2 << 20)
    record.note("long", {"dtype": "float32", "sums_bytes": 1, "cache_bytes": 1 << 20})
    of_step = {"planning": 0.007, "accounting": 0.003}
    record.add(Cell("long, together", "decoding", 200), 0.01, parts=of_step)
    record.note("long, together", {"tokens": 16384})
    for pair in range(6):
        record.add(Cell("off, a video, first token", DENSE, 2048), 1.0 + pair)
        record.add(Cell("off, a video, first token", "p=1", 2048), 1.01 * (1.0 + pair))
    record.note("dropping", {"video_pruning_rate": 0.62, "matched_at": 16384, "layers": 16})
    record.note("EVS", {"video_pruning_rate": 0.485, "matched_at": 8192})
    record.note("FlexAttention", "not available: no compiler")
    return result(record)


def test_tables(full) -> None:
    text = report.markdown(full)
    assert "| 4096 | 20% | 22.0% | 10.000 | 7.500 | 2.500 | 4.00x | 0.88 | 4.0% |" in text
    assert "| 8192 | 20% | 22.0% | 10.000 | not measured | 2.500 | 4.00x | 0.88 | 4.0% |" in text
    assert "| 7B | 8192 | 50.0% | 8.000 | 5.000 | 1.60x | 0.80 | 10.0% |" in text
    assert "| 8192 | EVS | 100.0% | 4.50 | 0.50 | 4.00 | -0.00 | 1.00x | 1.00 |" in text
    assert "### VideoNSA's attention\n\nHere: float32.\n" in text
    assert "| 4,096 | 60.0% | 5.000 | 4.000 | 0.500 | 3.000 | 0.250 | 0.80x |" in text
    assert "| 8 | 1024 | dense | 100.0% | 2.000 | 1.00x | 1.25 |" in text
    assert "| 8192 | EVS | 42.1 | 1.00x |" in text
    assert "EVS drops 48.5% of the video tokens" in text
    assert "| 8 | 2048 | AdaTP | 100.0% | 3.00 | 3.00x | 4.00x | 2.667 | 40% |" in text
    assert "| 8,192 | p=0.9 | 81% | 4.00 | 3.20 | 1.25x | 0.50 |" in text
    assert "| 16,384 | 20% | 4.0 | 50 | 5.0 | 1.0% |" in text
    assert "2 MiB, 7.1% of the cache of 28 layers" in text
    assert "planning 1.00, choosing 0.00, kernel 0.00" in text
    assert (
        "200 requests in one step, decoding, each behind 16,384 video tokens: planning 7.0" in text
    )
    assert "| a video | first token | p=1 | 3500.0 | 1.010 | 1.010 to 1.010 | 6 |" in text
    assert text.count("| 8192 | EVS | 100.0% | 4.50 |") == 2 and "torch.compile on" in text
    assert "16 narrow layers" in text and "EVS drops 62.0%" in text
    assert "FlexAttention: not available: no compiler." in text
    assert "key sums 32 (1.6%)" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = {line.count("|") for line in table.splitlines()}
        assert len(cells) == 1, table  # a table's rows have as many as its head


def test_headline_tells_what_was_compared_with_stock(record) -> None:
    record.add(Cell("compiled, ttft, language model", DENSE, 8192), 4.0)
    for tokens in (8192, 32768):  # nothing to compare the second with
        record.add(Cell("compiled, ttft, language model", served.SPARSE, tokens), 1.6, work=0.43)
    text = report.headline(result(record))
    assert "| prefill of the language model | 8,192 | 43% | 4 s | 1.6 s | 2.50x | 1.07 |" in text
    assert "Here: torch.compile on." in text and "32,768" not in text


def test_tables_of_a_part(record) -> None:
    record.add(Cell("ffn 3B", DENSE, 8192), 1.0)
    text = report.markdown(result(record))
    assert "### FFN" in text and "### Attention" not in text and "### Time" not in text


def test_picture(full, tmp_path) -> None:
    plots.draw(full, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    plots.draw({"rows": []}, tmp_path / "empty.png")


def test_videonsas_layer_is_timed_by_part() -> None:
    layer = videonsa.Layer(128, torch.float32, block_counts=1, window_size=16)
    sample = layer.sample()
    assert set(sample["parts"]) == {*videonsa.PARTS.values(), "mixing"}
    assert all(seconds > 0 for seconds in sample["parts"].values())
    assert sum(sample["parts"].values()) == pytest.approx(sample["time_s"])
    assert layer.sample_dense()["time_s"] > 0 and sample["work"] > 0


def test_the_processors_features_are_named(record) -> None:
    flags = "processor\t: 0\nmodel name\t: a CPU\nflags\t\t: fpu avx2 avx512f avx512_bf16 {}\n"
    assert features(flags.format("amx_tile")) == ["AMX", "AVX-512 BF16", "AVX-512", "AVX2"]
    assert features("flags\t\t: fpu avx2 avx512fp16\n") == ["AVX2"] and features("") == []
    record.add(Cell("ffn 3B", DENSE, 8192), 1.0)
    about = {"machine": ABOUT["machine"] | {"features": ["AMX", "AVX2"]}}
    text = report.markdown(result(record) | {"about": about})
    assert text.startswith("a CPU, 2 threads, AMX, AVX2; vllm 0.32.0.")
    assert "AMX" not in report.markdown(result(record)), "an older run named none"


def test_picture_of_the_committed_run(monkeypatch, tmp_path) -> None:
    """One colour for each contender, a label at each line, and no legend."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    plots.draw(json.loads(COMMITTED.read_text(encoding="utf-8")), tmp_path / "bench.png")
    [figure] = drawn
    attention, worth, ttft = figure.axes
    assert all(axes.get_legend() is None for axes in figure.axes)
    for axes, number in ((attention, 3), (ttft, 3)):
        labels = {text.get_text(): text.get_color() for text in axes.texts}
        assert len(labels) == len(axes.lines)
        assert {line.get_color() for line in axes.lines} == set(labels.values())
        assert len(set(labels.values())) == number
    assert len(worth.patches) == len(worth.texts) == 6


def test_unknown_part(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--only", "ffn,attn"])
    with pytest.raises(SystemExit):
        bench.main()
    said = capsys.readouterr().err
    assert "--only attn: parts are attention, decoding, long, ffn, videonsa" in said


@pytest.mark.parametrize("plans", [bench.FULL, bench.QUICK], ids=["full", "quick"])
def test_plans_can_be_measured(plans, tmp_path) -> None:
    """Lengths that videos can have, and contenders there are."""
    known = {DENSE, served.EVS, *served.OURS, *served.DECODING}
    for plan in plans["served"] + plans["compiled"]:
        assert set(plan.contenders) <= known and DENSE in plan.contenders
        assert plan.tokens % (128 if plan.tokens >= 1024 else 32) == 0
    for plan in plans["attention"]:
        assert set(plan.flex_shares) <= set(plan.shares)
