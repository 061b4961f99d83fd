"""The families of cases, by name: how one is drawn, and how it is checked against the twins."""

from __future__ import annotations

import os
import time
import traceback
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch

from . import dropping, layers, pruning
from .cases import Case, as_test, shrink

FAMILIES: dict[str, tuple[Callable, Callable]] = {
    "adaspark": (layers.random_adaspark, layers.check_adaspark),
    "videonsa": (layers.random_videonsa, layers.check_videonsa),
    "adatp": (dropping.random_adatp, dropping.check_adatp),
    "prune": (pruning.random_prune, pruning.check_prune),
}


def random_case(family: str, seed: int, number: int) -> Case:
    """The ``number``-th case of a family under a seed."""
    at = list(FAMILIES).index(family)
    return FAMILIES[family][0](np.random.default_rng([seed, at, number]))


def check(case: Case) -> Counter:
    """Run a case; count its steps, sets and ties.

    Raises:
        Exception: it differs from its twin, or ends early.
    """
    return FAMILIES[case.family][1](case)


def found(case: Case, name: str, error: Exception, tries: int = 200) -> str:
    """A failing case, made smaller by so many tries, as a test to paste."""
    last = [error]

    def fails(smaller: Case) -> bool:
        try:
            check(smaller)
        except Exception as again:
            if type(again) is type(error):
                last[0] = again
                return True
        return False

    return as_test(shrink(case, fails, tries), name, last[0])


def work(
    seed: int, first: int, stride: int, names: list[str], end: float
) -> tuple[dict[str, Counter], list[str]]:
    """One process's cases, of each family in turn, at least one of each; and what failed."""
    torch.set_num_threads(1)
    os.nice(10)
    counts: dict[str, Counter] = {name: Counter() for name in names}
    failures: list[str] = []
    number, told = first, time.time()
    while number == first or (time.time() < end and len(failures) < 5):
        for name in names:
            case = random_case(name, seed, number)
            counts[name]["cases"] += 1
            try:
                counts[name] += check(case)
            except Exception as error:
                counts[name]["failed"] += 1
                traceback.print_exc(limit=-2)
                failures.append(found(case, f"{name}_{seed}_{number}", error))
                print(failures[-1], flush=True)
        number += stride
        if time.time() > told + 60:
            told = time.time()
            steps = sum(of_family["steps"] for of_family in counts.values())
            print(f"process {first}: {steps:,} steps, {len(failures)} failures", flush=True)
    return counts, failures
