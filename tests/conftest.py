"""Shared by all tests: paths to the parts of the tree that are not in the package, offline mode."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in ("benchmarks", "examples/demo", "tests"):
    sys.path.insert(0, str(ROOT / folder))

# Nothing here may look for a model hub or report usage.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
# The tests' tensors are small: two threads only wait for each other, minutes on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
