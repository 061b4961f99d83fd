"""What a model's layers share from step to step: the plan of the current step.

One per model and worker, made by the model and handed to its layers, so there is no global state.
``begin_step`` runs at the top of the model's forward, outside torch.compile and CUDA graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .methods.base import Method
from .paged.heads import HeadRanks
from .paged.plan import StepPlan
from .paged.state import StepRows
from .requests import Request, RequestTable
from .traces.step import StepTrace

if TYPE_CHECKING:
    from .models.token_mapping import TokenMapping


class Runtime:
    """Holds ``plan``, the current step's plan, or None when the step is dense throughout.

    Attributes:
        method: decides what a step leaves out.
        rows: the current step's requests, also when it has no plan; None in profiling runs.
        requests: what the worker knows of its requests; None until it says.
        request_ids: the requests of the step that is about to run, in row order; None in dummy
            runs.  A worker sets it before every step.
        head_ranks: the tensor-parallel ranks that hold the model's heads; None for a single rank.
            Set by the model.
        new_trace: makes the step's trace; set by the worker for steps with a traced request.
        lora: which adapter each token runs; None on a server without LoRA.  Set by the worker.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.plan: StepPlan | None = None
        self.rows: StepRows | None = None
        self.head_ranks: HeadRanks | None = None
        self.requests: RequestTable | None = None
        self.request_ids: Callable[[], Sequence[str]] | None = None
        self.new_trace: Callable[[], StepTrace] | None = None
        self.lora: TokenMapping | None = None
        self._requests: Sequence[Request | None] = ()  # of the step's rows; none without video

    def begin_step(self, rows: StepRows | None, device: torch.device) -> None:
        """Make the step's plan, on the host, from what the engine knows of its requests.

        Args:
            rows: the step's requests, block table left out; None in profiling runs, which have
                no KV cache.
            device: where the layers run.
        """
        self.plan, self.rows, self._requests = None, rows, ()
        if self.lora is not None:
            self.lora.reset()  # if the last step was not run to its end
        if rows is None or self.requests is None or self.request_ids is None:
            return
        ids = self.request_ids()
        requests = self.requests.rows(ids)
        if all(request is None for request in requests):
            return
        self._requests = requests
        padding = len(rows.seq_lens) - len(ids)  # rows that a CUDA graph has and the step has not
        table = self.requests.block_table(ids, padding)
        self.plan_step(replace(rows, block_table=table), [*requests, *[None] * padding], device)

    def video_tokens(self) -> np.ndarray:
        """``[rows]`` of the step, whatever the method's plan has of them."""
        rows = self.rows
        video = np.zeros(len(rows.seq_lens), int)
        for row, request in enumerate(self._requests):
            if request is not None:
                video[row] = request.video_among(rows.computed[row], rows.seq_lens[row])
        return video

    def place(self, positions: torch.Tensor) -> None:
        """Overwrite the positions of the step's tokens, where their requests have others.

        In place, because a CUDA graph reads them where vLLM's runner put them; the runner makes
        them anew in every step.

        Args:
            positions: ``[tokens]`` int64 of the step's tokens, in the order of the prompt.
        """
        rows = self.rows
        for row, request in enumerate(self._requests):
            if request is None or request.positions is None:
                continue
            first = rows.computed[row]
            moved = request.positions[first : first + rows.query_lens[row]]
            start = rows.query_start[row]
            # No copy of nothing: after the prompt there is none to make.
            if len(moved):
                positions[start : start + len(moved)] = torch.from_numpy(moved)

    # -- between layers: nothing happens unless the plan drops tokens (paged/depths.py) ------------

    def positions(self, positions: torch.Tensor) -> torch.Tensor:
        """RoPE positions ``[..., tokens]`` of the tokens that a layer gets."""
        return self.plan.depths.positions if self._drops else positions

    def after_layer(
        self, layer: int, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What goes on to the next layer; both ``[tokens, hidden]``."""
        if self.plan is None or not self.plan.drops_after(layer):
            return hidden, residual
        index = self.plan.depths.drop(self.method.survivors(self.plan, layer))
        if self.lora is not None:
            self.lora.narrow(index)
        return hidden[index], residual[index]

    def restore(self, hidden: Any, tokens: int) -> Any:
        """The last layer's ``[tokens, hidden]`` with a row for every token of the step again."""
        if not self._drops:
            return hidden
        if self.lora is not None:
            self.lora.reset()
        return self.plan.depths.restore(hidden, tokens)

    # -- LoRA --------------------------------------------------------------------------------------

    @property
    def runs_lora(self) -> bool:
        """Whether a token of the step runs an adapter."""
        return self.lora is not None and not self.lora.idle

    def mapped(self, tokens: torch.Tensor | slice) -> AbstractContextManager:
        """A context for calling linear layers on inputs that stand for ``tokens [n]``."""
        return nullcontext() if self.lora is None else self.lora.gathered(tokens)

    @property
    def _drops(self) -> bool:
        plan = self.plan
        return plan is not None and plan.depths is not None and plan.depths.dropping

    def plan_step(
        self, rows: StepRows, requests: Sequence[Request | None], device: torch.device
    ) -> None:
        """Make the plan of a step whose ``rows`` have a block table."""
        began = time.perf_counter()
        self.rows = rows
        self.plan = self.method.plan(rows, requests, device)
        if self.plan is not None:
            self.plan.planning_seconds = time.perf_counter() - began
            if self.new_trace is not None:
                self.plan.trace = self.new_trace()
