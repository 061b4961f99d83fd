"""The same random cases in every run of the tests, and whether they would find anything.

``make fuzz`` draws others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_adaspark.methods.adaspark import method as adaspark
from vllm_adaspark.methods.adatp import state
from vllm_adaspark.methods.videonsa import compress

from . import families, pruning

SEED = 1
CASES = {"adaspark": 25, "videonsa": 25, "adatp": 50, "prune": 1000}  # three seconds each


@pytest.mark.parametrize("family", families.FAMILIES)
def test_some_cases(family: str) -> None:
    for number in range(CASES[family]):
        case = families.random_case(family, SEED, number)
        try:
            families.check(case)
        except Exception as error:
            print(families.found(case, f"{family}_{SEED}_{number}", error))
            raise AssertionError(f"seed {SEED}, case {number} of {family}") from error


def test_a_run_without_time_checks_each_family_once(monkeypatch) -> None:
    monkeypatch.setattr(families.os, "nice", lambda _: 0)
    counts, failures = families.work(SEED, 0, 1, ["adatp", "prune"], end=0.0)
    assert [counts[name]["cases"] for name in ("adatp", "prune")] == [1, 1] and not failures


def one_less(choose: Callable) -> Callable:
    """A choice that leaves out the last of what it should keep."""

    def wrong(*args: Any) -> torch.Tensor:
        chosen = choose(*args)
        last = chosen.shape[-1] - 1 - chosen.flip(-1).int().argmax(-1, keepdim=True)
        is_last = torch.arange(chosen.shape[-1]) == last
        return chosen & ~(is_last & (chosen.sum(-1, keepdim=True) > 1))

    return wrong


def least_first(choose: Callable) -> Callable:
    return lambda score, *args: choose(-score, *args)


@pytest.mark.parametrize(
    ("family", "where", "name", "mistake"),
    [
        ("adaspark", adaspark, "choose_cubes", one_less),
        ("adaspark", adaspark, "active_tokens", one_less),
        ("videonsa", compress, "most_important", least_first),
        ("adatp", state, "choose", least_first),
        ("prune", pruning, "survivors", lambda survivors: lambda *args: survivors(*args).flip(0)),
    ],
)
def test_a_mistake_is_found_and_printed_as_a_test(
    family: str, where: Any, name: str, mistake: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, mistake(getattr(where, name)))
    for number in range(60):
        case = families.random_case(family, 0, number)
        try:
            families.check(case)
        except AssertionError as error:
            text = families.found(case, "it", error, tries=12)
            break
    else:
        raise AssertionError("60 cases, and nothing found")
    scope: dict[str, Any] = {}
    exec(text, scope)
    with pytest.raises(AssertionError):
        scope["test_it"]()
    monkeypatch.undo()
    scope["test_it"]()
