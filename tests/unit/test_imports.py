"""The pure modules must import on a machine that has no vLLM."""

import subprocess
import sys

import pytest

PURE = (
    "requests",
    "step",
    "methods.base",
    "methods.adaspark.settings",
    "methods.adaspark.planner",
    "methods.adaspark.choose",
    "methods.adaspark.ffn",
    "methods.adaspark.budget",
    "methods.adaspark.paper",
    "methods.adaspark.reference",
    "methods.videonsa.faithful",
    "methods.videonsa.faithful_reference",
    "methods.adatp.encoder",
    "methods.adatp.method",
    "methods.adatp.reference",
    "paged.depths",
    "training",
    "kernels",
    "kernels.videonsa_twins",
    "accounts.account",
    "accounts.reports",
    "accounts.ledger",
    "accounts.cost",
    "models.layout",
    "models.qwen2_5_vl_layout",
    "video.order",
    "video.prune",
    "video.decode",
    "video.sampling",
    "traces.trace",
    "traces.reader",
    "traces.picture",
    "analysis.measure",
    "analysis.plots",
    "tune.intervals",
    "tune.plan",
    "tune.report",
    "cli",
    "cli.offline",
    "cli.tune",
)

BLOCK_VLLM = """
import importlib.abc, sys

class NoVllm(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vllm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoVllm())
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", BLOCK_VLLM + code], capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def outcome() -> dict[str, str]:
    """Module to its ImportError, all in one process: starting torch is what takes time."""
    code = f"""
import importlib, json
outcome = {{}}
for name in {PURE!r}:
    try:
        importlib.import_module("vllm_adaspark." + name)
    except ImportError as error:
        outcome[name] = repr(error)
    else:
        outcome[name] = "imported"
print(json.dumps(outcome))
"""
    import json

    done = run(code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_block_works():
    done = run("import vllm.config")
    assert done.returncode != 0
    assert "No module named 'vllm" in done.stderr


@pytest.mark.parametrize("name", PURE)
def test_imports_without_vllm(name, outcome):
    assert outcome[name] == "imported"


def test_importing_the_package_imports_no_vllm_and_no_torch():
    code = "import vllm_adaspark; print([m for m in ('torch', 'vllm') if m in sys.modules])"
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
