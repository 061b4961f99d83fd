"""The engine does what it did when ``recorded.json`` was made: answers, counts and choices.

On a machine that rounds as the recording's did (CPU features, threads, versions), log-probabilities
agree to 1e-5 and choices exactly.  Elsewhere other kernels add in another order, and what is a near
tie may be chosen otherwise: there log-probabilities agree to 0.02 and counts to 2 %.

``recorded_cases.py`` has the cases, and says how to record them anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

import pytest

from engine.recorded_cases import GROUPS, RECORDED, absent, machine, run

pytestmark = pytest.mark.engine

WANTED = json.loads(RECORDED.read_text())
EXACT = machine() == WANTED["machine"]
CLOSE = 1e-5 if EXACT else 0.02  # of log-probabilities in float32
ROUNDING = 1e-6  # of a log-probability itself, where it is far below 0
COUNTS = 0 if EXACT else 0.02  # of counts, relative
CASES = [(group, case) for group in GROUPS for case in GROUPS[group].cases]


def test_every_case_is_recorded() -> None:
    assert {name: set(group.cases) for name, group in GROUPS.items()} == {
        name: set(cases) for name, cases in WANTED.items() if name != "machine"
    }
    assert sum(isinstance(WANTED[group][case], list) for group, case in CASES) >= 60


def test_chunks_that_cut_no_block_choose_what_whole_prompts_do() -> None:
    """Of 200 tokens; but not under a budget, whose p is found for each chunk."""
    chunks = {name: case for name, case in WANTED["chunks of 200"].items() if "budget" not in name}
    assert len(chunks) == 4
    for name, case in chunks.items():
        assert [r["choices"] for r in case] == [r["choices"] for r in WANTED["needle"][name]]


@pytest.fixture(scope="module")
def answers(checkpoint) -> Callable[[str], dict]:
    """What all cases of a group do now; they share an engine, so they are asked together."""
    return cache(lambda group: run(GROUPS[group], checkpoint))


def params() -> list:
    """Each case's group and name, and why it is skipped if it is."""
    made = []
    for group, case in CASES:
        why = absent(GROUPS[group], machine()["cpu"])
        if not why and not isinstance(WANTED[group][case], list):
            why = f"not recorded: {WANTED[group][case]}"
        skip = pytest.mark.skip(reason=why or "")
        made.append(pytest.param(group, case, id=f"{group}-{case}", marks=[skip] if why else []))
    return made


@pytest.mark.parametrize(("group", "case"), params())
def test_as_recorded(answers, group, case) -> None:
    for got, want in zip(answers(group)[case], WANTED[group][case], strict=True):
        same_words = logprobs_agree(got, want)
        assert (got["cached"], got["tokens"]) == (want["cached"], want["tokens"])
        if EXACT:
            assert same_words and got["choices"] == want["choices"]
        for count in ("flops_ratio", "cubes_attended", "ffn_active") if same_words else ():
            assert got[count] == pytest.approx(want[count], rel=COUNTS, abs=0), count


def logprobs_agree(got: dict, want: dict) -> bool:
    """Compares log-probabilities, up to the first word that differs; whether there was none."""
    for token, was, mine, theirs in zip(
        got["ids"], want["ids"], got["logprobs"], want["logprobs"], strict=True
    ):
        common = mine.keys() & theirs.keys()
        if EXACT:
            assert {str(token), str(was)} <= common
        for word in common:
            assert mine[word] == pytest.approx(theirs[word], rel=CLOSE / 10, abs=CLOSE), word
        if token != was:  # a near tie, which only other rounding may decide otherwise
            return False
    return True
