"""The plugin is in every vLLM process, but stock architectures never see more than its name.

Each test looks at ``sys.modules`` of a fresh process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

# What registering brings; everything else belongs to a server with our architecture.
AT_MOST = {"vllm_adaspark", "vllm_adaspark.settings", "vllm_adaspark.startup"}
OURS = """
def ours():
    return sorted(name for name in sys.modules if name.partition(".")[0] == "vllm_adaspark")
"""

PROCESS = """
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
before = set(sys.modules)
import vllm_adaspark
vllm_adaspark.register()
imported = set(sys.modules) - before
models, checks = dict(ModelRegistry.models), dict(MODELS_CONFIG_MAP)
vllm_adaspark.register()
vllm_adaspark.register()
facts = {{
    "imported": sorted(imported),
    "models": [text for text in map(str, models.values()) if "vllm_adaspark" in text],
    "same": models == ModelRegistry.models and checks == MODELS_CONFIG_MAP,
}}

sys.path[:0] = {path!r}
from engine.engines import ask, engine, five_prompts
from vllm import EngineArgs
from vllm_adaspark import ARCHITECTURE

with engine({checkpoint!r}, None) as llm:  # its worker is in this process
    (answer,) = ask(llm, [five_prompts()["short video"]])
facts |= {{"answered": len(answer.ids), "stock": ours()}}
# The same process with our architecture, so that the test is known to be able to fail.
EngineArgs(
    model={checkpoint!r}, hf_overrides={{"architectures": [ARCHITECTURE]}}, max_model_len=8192
).create_engine_config()
facts["ours"] = ours()
print(json.dumps(facts))
"""


def facts_of(code: str) -> dict:
    """What ``code`` prints last, as JSON, run in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", "import json, sys\n" + OURS + code],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def facts(checkpoint) -> dict:
    """Of one process: importing vLLM is what takes time."""
    tests = Path(__file__).resolve().parents[1]
    path = [str(tests), str(tests.parent / "examples/demo")]
    return facts_of(PROCESS.format(path=path, checkpoint=str(checkpoint)))


def test_registering_is_cheap_and_can_be_repeated(facts) -> None:
    assert set(facts["imported"]) == AT_MOST
    assert len(facts["models"]) >= 2
    assert all("vllm_adaspark.models" in model for model in facts["models"])
    assert facts["same"]


def test_stock_engine_never_imports_our_model(facts) -> None:
    assert facts["answered"]
    assert set(facts["stock"]) == AT_MOST
    assert "vllm_adaspark.models.qwen2_5_vl" in facts["ours"]
