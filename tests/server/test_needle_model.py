"""The shipped needle model reaches its accuracy through real servers, dense and sparse.

docs/quality.md has the full measurement.  The bounds here lie some answers below it, so that they
catch a broken checkpoint or a broken selection and not a rounding difference.
"""

from dataclasses import replace

import pytest
from needle import NEEDLE, grid  # benchmarks
from needle.run import Run
from needle.work import Work

VIDEOS = 10  # six questions each
LENGTHS = (1024, 4096)


@pytest.mark.server
def test_the_shipped_weights_reach_their_accuracy_through_the_server(tmp_path):
    dense = replace(grid.DENSE, lengths=LENGTHS)
    ours = replace(grid.MAIN, lengths=LENGTHS[1:])
    asked = grid.Grid((dense, ours), videos=VIDEOS)
    records = Run(asked, NEEDLE / "checkpoint", tmp_path, Work(tmp_path / "w.jsonl", "")).measure()

    def right(name: str, tokens: int) -> tuple[int, int]:
        answers = [
            answer
            for record in records
            if record["contender"] == name and record["tokens"] == tokens
            for answer in record["answers"]
        ]
        return sum(a["answer"] == a["expected"] for a in answers), len(answers)

    for tokens in LENGTHS:
        count, of = right("dense", tokens)
        assert of == 6 * VIDEOS
        assert count >= 0.85 * of, (tokens, count)
    assert right(ours.name, LENGTHS[1])[0] >= 0.8 * 6 * VIDEOS
    spent = [r["flops_ratio"] for r in records if r["contender"] == ours.name]
    assert max(spent) < 0.6
