"""What a model's layers share from step to step: the plan of this step and the state of KV blocks.

One per model and worker, made by the model and handed to its layers, so there is no global state.
``begin_step`` runs at the top of the model's forward, outside torch.compile and CUDA graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from .attention.heads import HeadRanks
from .attention.plan import StepPlan
from .attention.planner import build_plan
from .attention.state import BlockTags, StepRows
from .config import AdaSparkConfig
from .tracing.step import StepTrace


class Runtime:
    """Holds ``plan``, the current step's plan, or None when the step is dense throughout.

    ``rows`` are the current step's requests, also when it has no plan; None in profiling runs.
    """

    def __init__(self, config: AdaSparkConfig) -> None:
        self.config = config
        self.plan: StepPlan | None = None
        self.rows: StepRows | None = None
        self.head_ranks: HeadRanks | None = None  # set by the model where there are several
        # Set by the worker for steps with a traced request: makes the step's trace.
        self.new_trace: Callable[[], StepTrace] | None = None
        self._videos_seen = False
        self._block_tags: BlockTags | None = None

    def expect_video(self) -> None:
        """A request with a video has arrived; until then steps cost nothing and never wait."""
        self._videos_seen = True

    def begin_step(
        self,
        rows: StepRows | None,
        words: torch.Tensor,
        block_table: torch.Tensor | None = None,
        num_blocks: int = 0,
        block_size: int = 0,
    ) -> None:
        """Make the step's plan.  On a GPU this waits once for the tags, per step, not per layer.

        Args:
            rows: the step's requests; None in profiling runs, which have no KV cache.
            words: ``[tokens or more]`` int64 tag words on any device; padding is ignored.
            block_table: ``[rows, blocks]`` on any device.
            num_blocks: physical KV blocks in the cache.
            block_size: tokens in a KV block.
        """
        self.plan, self.rows = None, rows
        if rows is None or not self._videos_seen:
            return
        if self._block_tags is None or len(self._block_tags.is_cube) != num_blocks:
            self._block_tags = BlockTags(num_blocks, block_size)
        num_tokens = int(rows.query_start[-1])
        self.rows = replace(rows, block_table=block_table.cpu().numpy())
        host_words = words[:num_tokens].cpu().numpy().astype(np.int64, copy=False)
        began = time.perf_counter()  # after the wait for the tags
        self.plan = build_plan(
            self.rows,
            host_words,
            self._block_tags,
            dense_below=self.config.dense_below,
            cube_queries=self.config.cube_queries,
            device=words.device,
        )
        if self.plan is not None:
            self.plan.planning_seconds = time.perf_counter() - began
        if self.new_trace is not None and self.plan is not None:
            self.plan.trace = self.new_trace()
