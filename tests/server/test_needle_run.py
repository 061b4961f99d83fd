"""The needle benchmark end to end: real servers, a real mp4, rows out of the answers."""

from dataclasses import replace

import pytest
from needle import NEEDLE, grid, report, results, tables  # benchmarks
from needle import __main__ as command
from needle.run import Fleet, Run
from needle.work import Work

CHECKPOINT = NEEDLE / "checkpoint"
TOKENS = 1024


@pytest.mark.server
def test_rows_come_out_and_evs_keeps_fewer_tokens(tmp_path, monkeypatch):
    ours = replace(grid.MAIN, lengths=(TOKENS,))
    evs = replace(grid.rivals(0.5, 0.5)[-1], lengths=(TOKENS,))
    asked = grid.Grid((ours, evs), videos=1)
    path = tmp_path / "work.jsonl"
    records = Run(asked, CHECKPOINT, tmp_path, Work(path, "weights")).measure()

    mine, theirs = ({row["contender"]: row for row in records}[c.name] for c in (ours, evs))
    assert mine["flops_ratio"] < 0.9
    assert mine["ffn_density"] < 0.9
    assert mine["settings"] == ours.settings
    # At most the FLOPs of ours, and near them: fewer tokens, all of them computed.
    assert theirs["attention_density"] < 1
    assert 0.97 * mine["flops_ratio"] < theirs["flops_ratio"] <= mine["flops_ratio"]
    assert mine["text_tokens"] == theirs["text_tokens"]

    rows = [row for record in records for row in results.rows(record)]
    assert [row["skill"] for row in rows] == list(tables.scenes.SKILLS) * 2
    basic = [row for row in rows if row["skill"] == "basic"]
    assert all(row["correct"] == 1 for row in basic), records
    assert all(row["haystack"] == "calm" and row["tokens"] == TOKENS for row in rows)

    # What was asked is not asked again: no server starts.
    monkeypatch.setattr(Fleet, "client", None)
    again = Run(asked, CHECKPOINT, tmp_path, Work(path, "weights")).measure()
    assert again == records
    result = results.document(records, asked, CHECKPOINT, command.now())
    report.write(result, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert ours.name in page and evs.name in page
