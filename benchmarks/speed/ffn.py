"""One FFN layer: dense, and on the active tokens alone, choosing and filling in included."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from harness import one_request

from vllm_adaspark.attention.planner import build_plan
from vllm_adaspark.config import AdaSparkConfig
from vllm_adaspark.requests import Request
from vllm_adaspark.token_ffn import active_tokens, sparse_ffn

from .record import DENSE, Cell, Record, in_turn, progress

SHAPES = {"3B": (2048, 11008), "7B": (3584, 18944)}  # hidden, intermediate
OURS = "adaspark"
ALL = 0.999  # p of "all tokens": at 1 there is no choice to be made, and the path is dense


@dataclass(frozen=True)
class Plan:
    """What to measure of one model's FFN: at which shares of active tokens, how often."""

    model: str  # of SHAPES
    shares: tuple[float, ...]
    tokens: int = 8192
    rounds: int = 5


def measure(record: Record, plans: list[Plan]) -> None:
    """All samples of all plans."""
    for plan in plans:
        name = f"ffn {plan.model}"
        cells = [Cell(name, DENSE, plan.tokens)]
        cells += [Cell(name, OURS, plan.tokens, share) for share in plan.shares]
        if all(record.count(cell) >= plan.rounds for cell in cells):
            continue
        progress(f"{name}, {plan.tokens} tokens: set up")
        hidden, intermediate = SHAPES[plan.model]
        ffn = make_ffn(hidden, intermediate)
        residual = torch.randn(plan.tokens, hidden, dtype=torch.bfloat16)
        x = torch.nn.functional.rms_norm(residual, (hidden,))
        contenders = {
            cell: _dense(ffn, x) if cell.contender == DENSE else _ours(ffn, x, residual, cell.share)
            for cell in cells
        }
        in_turn(record, contenders, dict.fromkeys(cells, plan.rounds))


def make_ffn(hidden: int, intermediate: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Qwen2's FFN in bf16 with vLLM's own matrix products and activation."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    gate_up = torch.nn.Linear(hidden, 2 * intermediate, bias=False, dtype=torch.bfloat16)
    down = torch.nn.Linear(intermediate, hidden, bias=False, dtype=torch.bfloat16)
    for layer in (gate_up, down):
        layer.requires_grad_(False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    with set_current_vllm_config(VllmConfig()):
        activation = SiluAndMul()

    def ffn(x: torch.Tensor) -> torch.Tensor:
        inner = activation(gate_up.cpu_linear(x, gate_up.weight, None))
        return down.cpu_linear(inner, down.weight, None)

    ffn(torch.zeros(64, hidden, dtype=torch.bfloat16))  # warm up
    return ffn


def _dense(ffn: Callable, x: torch.Tensor) -> Callable[[], dict]:
    def sample() -> dict:
        began = time.perf_counter()
        ffn(x)
        return {"time_s": time.perf_counter() - began}

    return sample


def _ours(ffn: Callable, x: torch.Tensor, residual: torch.Tensor, share: float):
    config = AdaSparkConfig(p_ffn=min(share, ALL))
    rows = one_request(len(x), config.cube_volume)
    request = Request(config, np.ones(len(x), bool))
    plan = build_plan(
        rows, [request], config.cube_volume, dense_below=8, cube_queries=16, device=x.device
    ).ffn

    ran = []  # rows that the FFN got

    def counted(rows: torch.Tensor) -> torch.Tensor:
        ran.append(len(rows))
        return ffn(rows)

    def sample() -> dict:
        began = time.perf_counter()
        active = active_tokens(x, residual, plan, 0)
        chosen = time.perf_counter()
        sparse_ffn(x, counted, active, plan)
        ended = time.perf_counter()
        work = ran.pop() / len(x)
        return {"time_s": ended - began, "work": work, "parts": {"selection": chosen - began}}

    return sample
