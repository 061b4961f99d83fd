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

STOCK_ENGINE = """
import sys
sys.path[:0] = {path!r}
from engine.engines import ask, engine, five_prompts
from vllm import EngineArgs, ModelRegistry
from vllm_adaspark import ARCHITECTURE

with engine({checkpoint!r}, None) as llm:  # its worker is in this process
    (answer,) = ask(llm, [five_prompts()["short video"]])
facts = {{
    "answered": len(answer.ids),
    "registered": ARCHITECTURE in ModelRegistry.get_supported_archs(),
    "stock": ours(),
}}
# The same process with our architecture, so that the test is known to be able to fail.
EngineArgs(
    model={checkpoint!r}, hf_overrides={{"architectures": [ARCHITECTURE]}}, max_model_len=8192
).create_engine_config()
facts["ours"] = ours()
print(json.dumps(facts))
"""

REGISTER = """
import sys
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
before = set(sys.modules)
import vllm_adaspark
vllm_adaspark.register()
after = set(sys.modules)
models, checks = dict(ModelRegistry.models), dict(MODELS_CONFIG_MAP)
vllm_adaspark.register()
vllm_adaspark.register()
print(json.dumps({
    "imported": sorted(after - before),
    "models": {name: str(model) for name, model in models.items() if "AdaSpark" in name},
    "same": models == ModelRegistry.models and checks == MODELS_CONFIG_MAP,
}))
"""


def facts_of(code: str) -> dict:
    """What ``code`` prints last, as JSON, run in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", "import json, sys\n" + OURS + code],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_stock_engine_never_imports_our_model(checkpoint) -> None:
    tests = Path(__file__).resolve().parents[1]
    path = [str(tests), str(tests.parent / "examples/demo")]
    facts = facts_of(STOCK_ENGINE.format(path=path, checkpoint=str(checkpoint)))
    assert facts["answered"] and facts["registered"]
    assert set(facts["stock"]) == AT_MOST
    assert "vllm_adaspark.models.qwen2_5_vl" in facts["ours"]


def test_registering_is_cheap_and_can_be_repeated() -> None:
    facts = facts_of(REGISTER)
    assert set(facts["imported"]) == AT_MOST
    assert len(facts["models"]) == 2
    assert all("vllm_adaspark.models" in model for model in facts["models"].values())
    assert facts["same"]
