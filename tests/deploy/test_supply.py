"""What the package depends on: bounded, and listed by a script."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version

import pytest
from deploy_tools import DEPLOY, ROOT, run
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIREMENTS = [
    Requirement(text)
    for group in (
        PROJECT["build-system"]["requires"],
        PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"].values(),
    )
    for text in group
]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_a_dependency_is_bounded_from_below_and_above(requirement: Requirement) -> None:
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators in ({"=="}, {">=", "<"})
    try:
        installed = version(requirement.name).partition("+")[0]
    except PackageNotFoundError:
        return
    assert requirement.specifier.contains(installed), "the tests run with a version that is allowed"


def test_the_script_says_how_it_is_used() -> None:
    done = run(DEPLOY / "supply.sh", "nonsense")
    assert done.returncode == 2 and "sbom" in done.stderr and "audit" in done.stderr
