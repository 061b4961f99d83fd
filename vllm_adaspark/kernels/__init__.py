"""Triton kernels for the GPU path, where vLLM has none.

AdaSpark's are ``score``, ``nucleus``, ``tables`` and ``ffn``; VideoNSA's are ``videonsa_compress``
and ``videonsa_select``.  Each function has a twin in plain PyTorch that does the same and stays the
path on a CPU.  :func:`use_triton` is the one switch between them.  The modules below import Triton
and so are imported where they are called, behind the switch; this one imports neither Triton nor
vLLM.

No kernel or wrapper waits for the GPU: sizes that depend on the data stay on the device.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

# Entries of a row to choose from: a program holds one in registers; longer rows are the twin's.
MAX_CHOICES = 16384


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether work on ``tensor`` goes to the Triton kernels.

    True on CUDA devices where Triton is installed, unless ``VLLM_ADASPARK_TRITON=0`` takes the
    twins there too, and for CPU tensors under Triton's interpreter (``TRITON_INTERPRET=1``, set
    before Triton is imported), as the tests run it.
    """
    return _triton_on(tensor.device.type)


def scores_heads_of(head_size: int) -> bool:
    """Whether the score kernels take heads of this size: a power of two that fits in a program."""
    return 16 <= head_size <= 256 and head_size.bit_count() == 1


def score_products(device_type: str, head_size: int, vectors: int = 1) -> int:
    """How many products of a query with a vector of its size the score of a cube takes.

    One for each of the ``vectors`` that are kept of a block, in PyTorch, which keeps all scores.
    The Triton kernels keep none and compute each twice: see ``kernels/score.py``.  FLOPs are
    charged accordingly.
    """
    twice = _triton_on(device_type) and scores_heads_of(head_size * vectors)
    return 2 * vectors if twice else vectors


def _triton_on(device_type: str) -> bool:
    if device_type == "cuda":
        return os.environ.get("VLLM_ADASPARK_TRITON") != "0" and _installed()
    return device_type == "cpu" and interpreted() and _installed()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
