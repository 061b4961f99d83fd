"""Shared by all tests: paths to the parts of the tree that are not in the package, offline mode."""

import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FIRST = ("server", "engine", "deploy", "kernels", "fuzz", "unit")
for folder in ("benchmarks", "examples/demo", "tests"):
    sys.path.insert(0, str(ROOT / folder))

from server import go_around_proxies  # noqa: E402, examples/demo

# Nothing here may look for a model hub or report usage.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
go_around_proxies()
# The tests' tensors are small: two threads only wait for each other, minutes on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Two servers at a time must not be bound to the same core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """With pytest-xdist, the tests of a module, and all on the shared server, stay in one process.

    They share engines and servers, which take longer to start than to answer.  Modules are handed
    out in the order of the collection.
    """
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False

    on_shared_server = {
        f"tests/server/{path.name}"
        for path in (ROOT / "tests" / "server").glob("test_*.py")
        if re.search(r"\b(served|viewed): Served\b", path.read_text())
    }

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            return "the shared server" if module in on_shared_server else module

    return ByModule(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that no process waits for the other at the end."""

    def turn(item: pytest.Item) -> int:
        tier = item.path.relative_to(ROOT / "tests").parts[0]
        return LONGEST_FIRST.index(tier) if tier in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=turn)
