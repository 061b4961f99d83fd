"""The speed benchmark at its smallest, with real servers: all rows come out, whatever the times."""

from __future__ import annotations

import cpu_kernel
import pytest
import torch
import warm
from speed import __main__ as bench
from speed import attention, dropping, ffn, report, scaling, served
from speed.record import DENSE, Record, machine

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]
PARTS = {"media decode", "processor", "vision tower", "language model", "other"}


@pytest.fixture
def record(tmp_path) -> Record:
    return Record(tmp_path / "work.jsonl", {"machine": machine()})


def test_layers(record, monkeypatch) -> None:
    monkeypatch.setitem(ffn.SHAPES, "3B", (64, 128))
    names = {attention.USUAL, attention.LARGE, attention.NO_AMX}
    plans = [attention.Plan(2048, (0.5,), name, rounds=1) for name in sorted(names)]
    attention.measure(record, plans)
    ffn.measure(record, [ffn.Plan("3B", (0.5,), tokens=512, rounds=1)])
    rows = {(row["name"], row["contender"]): row for row in bench.result_of(record)["rows"]}
    if not torch.cpu._is_amx_tile_supported():
        names.remove(attention.NO_AMX)
    assert rows.keys() == {
        (name, contender) for name in (*names, "ffn 3B") for contender in (DENSE, "adaspark")
    }
    for (_, contender), row in rows.items():
        assert len(row["time_s"]) == 1 and row["efficiency"] > 0
        assert (row["density"] < 1) == (contender != DENSE)
    assert scaling.selection(list(rows.values()))[0]["share"] > 0


def test_kernel_alone(monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernel, "CASES", 448)
    isa = cpu_kernel._get_attn_isa(cpu_kernel.DTYPE, cpu_kernel.BLOCK, cpu_kernel.HEAD_SIZE)
    assert cpu_kernel.rate(64, 256, 7, isa, rounds=1) > 0


def test_served(record, tmp_path, monkeypatch) -> None:
    # One thread each, as in all tests: two would wait for each other on a busy machine.
    monkeypatch.setenv(served.RESERVED, "1")
    plans = [
        served.Single(512, rounds=1),
        served.AtOnce(2, 512, rounds=1),
        served.Decoding(512, rounds=1, answer_tokens=4),
    ]
    served.measure(record, plans, tmp_path, shape="tiny")
    two = (DENSE, "AdaTP")
    with warm.forked_from_the_warm():
        dropping.measure(record, [dropping.Plan(2, 1024, 1, 2, two)], tmp_path / "deep")
    result = bench.with_other_parts(bench.result_of(record), tmp_path / "none.json", ["served"])
    rows = {(row["name"], row["contender"]): row for row in result["rows"]}
    expected = [("ttft, language model", contender) for contender in plans[0].contenders]
    expected += [(plan.name, contender) for plan in plans for contender in plan.contenders]
    between = {name: rows.pop(("dropping, 2 at once", name)) for name in two}
    assert 0.2 < between["AdaTP"]["density"] < 0.28 and between[DENSE]["density"] == 1
    assert all(row["cpu_s"] > 0 and row["requests_per_s"] > 0 for row in between.values())
    assert rows.keys() == set(expected)
    for contender in plans[0].contenders:
        row = rows["ttft", contender]
        assert row["parts"].keys() == PARTS
        assert all(row["parts"][part] > 0 for part in PARTS - {"other"}), "each part was noticed"
        # Every token is kept and all is computed, or less is.
        assert (row["density"] == 1) == (contender in (DENSE, "p=1")), contender
    at_once = rows["2 at once", DENSE]
    assert at_once["requests_per_s"] == pytest.approx(2 / at_once["median_s"])
    text = report.markdown(result)
    assert "EVS drops" in text and "### Requests at once" in text
    assert "### Tokens dropped between the layers" in text
    served.measure(record, plans, tmp_path / "untouched", shape="tiny")  # all is there already
    assert not (tmp_path / "untouched").exists()
