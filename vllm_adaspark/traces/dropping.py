"""Video tokens that left between the layers: until which layer each lasted, and why so many.

A method that drops tokens on the way (paged/depths.py) leaves, for each prompt, which of its video
tokens went on after each event.  From that follow what a trace shows of any method: which cubes a
token attended to in a layer, because it attended to every token that was still there.  NumPy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

NUMBER_BYTES = 8


@dataclass(frozen=True)
class Dropping:
    """What a prompt lost between its layers.

    Attributes:
        lasted: ``[video tokens]`` uint16, how many layers saw each, over all videos in order.
        facts: JSON-ready, as :meth:`~vllm_adaspark.paged.plan.StepPlan.dropping` has it.
    """

    lasted: np.ndarray
    facts: dict[str, Any]

    def alive(self, layers: range) -> np.ndarray:
        """``[layers, video tokens]`` bool: which tokens a layer saw."""
        return self.lasted > np.array(layers)[:, None]


def most_bytes(tokens: int, frames: int, events: int) -> int:
    """Bytes that the above takes at the most, with a segment for each frame."""
    return 2 * tokens + NUMBER_BYTES * frames * (events + 5)


def attended(
    alive: np.ndarray, starts: np.ndarray, size: int, source: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How often cubes were candidates of the source's tokens, and how often these attended them.

    A token attends to all tokens before it that its layer sees.  Of a cube that has lost some it
    attends to the share that is left, and one that is gone itself attends to nothing.

    Args:
        alive: ``[layers, tokens]`` bool, of the whole request.
        starts: ``[cubes]`` first token of each.
        size: tokens in a cube.
        source: ``[tokens]`` bool.

    Returns:
        ``[cubes]`` and ``[layers, cubes]`` (source token, cube) pairs.
    """
    from_it_on = (alive & source)[:, ::-1].cumsum(1)[:, ::-1]
    seen = source[::-1].cumsum()[::-1][starts]
    return seen, from_it_on[:, starts] * _left(alive, starts, size)


def pairs_before(
    alive: np.ndarray, starts: np.ndarray, size: int, source: np.ndarray
) -> tuple[float, np.ndarray]:
    """The same, summed over the cubes that end before each source token: a number, ``[layers]``."""
    tokens = alive.shape[1]
    ends = starts + size
    cubes = np.zeros(tokens + 1)
    cubes[ends] = 1
    left = np.zeros((len(alive), tokens + 1))
    left[:, ends] = _left(alive, starts, size)
    seen = float(cubes.cumsum()[:tokens][source].sum())
    return seen, (left.cumsum(1)[:, :tokens] * (alive & source)).sum(1)


def _left(alive: np.ndarray, starts: np.ndarray, size: int) -> np.ndarray:
    """``[layers, cubes]`` share of each cube's tokens that a layer sees."""
    return alive[:, starts[:, None] + np.arange(size)].mean(-1)
