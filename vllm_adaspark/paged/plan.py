"""The plan of a step, as layers, accounts and traces read it, whatever the method."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch

from ..accounts.timing import Stopwatch
from .depths import Depths
from .state import SummaryWrites
from .tiles import TilePlan

# A text token costs a kernel as much as a decode token.  Past so many of them in a prompt,
# attending densely in one tile is cheaper than choosing for each.
MAX_TEXT_TILES = 1024

# Why tokens ran dense though their settings are sparse: a chunk edge cuts their cube; their KV
# block also holds text, so it is no cube; their text is longer than MAX_TEXT_TILES.  Other methods
# may have other reasons.
FALLBACKS = ("cut_cube", "mixed_block", "long_text")


@dataclass
class Told:
    """What a step cost, as its plan says it; see :meth:`StepPlan.tell`.

    Attributes:
        flops: by part, ``[layers, rows]``: the FLOPs that were executed, over all heads of the
            model.  Parts that stock vLLM has, too, are called ``qkvo``, ``attention`` and ``ffn``,
            as in ``flops.dense``; a method's own parts may have any name.
        choices: ``[rows]`` how many choices were made that could leave something out.
        attended: ``[layers, rows]`` how many of the (query token, preceding cube) pairs of
            ``StepPlan.cubes_seen`` were attended.
        sums: by name, ``[layers, rows]``: sums over the row's video tokens of what reports shall
            show the mean of, under ``means``.
    """

    flops: dict[str, np.ndarray]
    choices: np.ndarray
    attended: np.ndarray
    sums: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class StepPlan:
    """Everything the layers share in one step, and the counts they leave behind.

    Attributes:
        attention: the tiles, if the method leaves cubes out in this step; a method whose attention
            is not made of tiles has a plan of its own here, with a ``first_layer``.
        ffn: the method's own plan for the FFN, if it skips tokens in this step.  Accounts and
            traces read ``tokens [cubes, block_size]``, ``row [cubes]`` and ``extra [cubes]`` of it:
            which tokens are a cube's, whose it is, and how many FFN evaluations are made for the
            tokens that skip.
        summary_writes: which keys are summed in this step; None for none.
        depths: what each layer sees of the step, if some see fewer tokens than others.
    """

    attention: TilePlan | Any
    ffn: Any
    summary_writes: SummaryWrites | None
    video_tokens: np.ndarray  # [rows] video tokens in this step
    cubes_seen: np.ndarray  # [rows] (query token, preceding cube) pairs
    block_size: int
    fallback_tokens: dict[str, np.ndarray] = field(default_factory=dict)  # of FALLBACKS: [rows]
    planning_seconds: float = 0.0
    selection: Stopwatch = field(default_factory=Stopwatch)  # scores, choice, tables of all layers
    kept_blocks: dict[int, torch.Tensor] = field(default_factory=dict)  # layer: [kv_heads, tiles]
    ffn_active: dict[int, torch.Tensor] = field(default_factory=dict)  # layer: [cubes]
    trace: Any = None  # traces.step.StepTrace, in steps with a traced request
    depths: Depths | None = None

    def attends(self, layer: int) -> bool:
        """Whether the method, not the stock path, runs this layer's attention."""
        return self.attention is not None and layer >= self.attention.first_layer

    def drops_after(self, layer: int) -> bool:
        """Whether some tokens of this step do not go on to the next layer."""
        return self.depths is not None and self.depths.dropping and layer in self.depths.events

    def ran(self, layer: int, active: torch.Tensor) -> None:
        """Note which tokens of ``ffn.tokens`` a layer's FFN ran, for accounts and traces.

        Args:
            layer: its index in the model.
            active: ``[cubes, block_size]`` bool.
        """
        self.ffn_active[layer] = active.sum(1)
        if self.trace is not None:
            self.trace.tokens(layer, active)

    def dropping(self, row: int) -> dict[str, Any] | None:
        """How many video tokens a prompt in this step loses between its layers; for its trace.

        Returns:
            None if it loses none; else, JSON-ready, ``layers``: those after which tokens leave, and
            ``segments``: runs of frames whose tokens compete with each other, each with its
            ``video``, its ``frames`` (first, and one past the last), ``tokens`` at the start and
            ``kept`` after each of the layers, whether it is ``relevant`` to the question, and its
            ``relevance``, None where nobody knows.
        """
        return None

    def host_part(self) -> Self:
        """A copy that holds no device memory, save for what the layers counted; for the accounts.

        ``attention`` and ``ffn`` are seen to by accounts/ledger.py.
        """
        depths = None if self.depths is None else self.depths.host_part()
        return replace(self, summary_writes=None, trace=None, depths=depths)

    def tell(self, shape: Any, layers: range) -> Told | None:
        """What this step cost, once the layers have run; for the accounts.

        None lets the accounts count tiles, and the cubes of ``ffn``.  A method whose layers do
        something else derives its plan from this class and says here what each layer executed for
        each row, projections and FFN included.  It is called on the copy that accounts/ledger.py
        makes (``keep_counts``), in which ``attention`` and ``ffn`` have only what is on the host.

        Args:
            shape: the sizes of a layer (accounts/flops.py: ModelShape).
            layers: this rank's layers, the first dimension of what is told.
        """
        return None
