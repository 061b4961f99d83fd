"""What AdaSpark knows of a request: its settings as a plan takes them, and a budget's share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ...paged.plan import MAX_TEXT_TILES
from ...requests import Request
from .choose import BUDGET
from .settings import COMPENSATIONS, IMPORTANCES, SELECTIONS, AdaSparkConfig


@dataclass(frozen=True)
class AdaSparkRequest(Request):
    """One request with video.

    Attributes:
        config: its settings.
        share: with a budget, the share of cubes and FFN tokens to keep (see budget.py).
        least_budget: with a budget, the smallest one that this prompt can keep.
        layers: of the model; where ``dense_layers`` are as many, nothing is left out.
    """

    config: AdaSparkConfig
    share: float | None = None
    least_budget: float | None = None
    layers: int | None = None

    @cached_property
    def settings(self) -> RowSettings:
        """What the plan needs of the settings, as plain numbers."""
        config = self.config
        rule = SELECTIONS.index(config.selection)
        attention = config.p_attn if config.selection == "top_p" else config.keep
        ffn = config.p_ffn
        if self.share is not None:
            attention, ffn, rule = self.share, self.share, BUDGET
        all_dense = self.layers is not None and config.dense_layers >= self.layers
        if not config.enabled or all_dense:
            attention = ffn = 1.0
        return RowSettings(
            attention_share=attention,
            ffn_share=ffn,
            importance=IMPORTANCES.index(config.importance),
            compensation=COMPENSATIONS.index(config.compensation),
            rule=rule,
            sparse_text=config.text_queries == "sparse",
            min_cubes=config.min_cubes,
            dense_layers=config.dense_layers,
        )

    @property
    def leaves_out(self) -> bool:
        """Whether its settings let anything be left out."""
        return min(self.settings.attention_share, self.settings.ffn_share) < 1

    @cached_property
    def is_long_text(self) -> bool:
        """Whether too many text tokens of the prompt could choose, so that all attend densely."""
        return int(choosing_text(self.is_video, self.config).sum()) > MAX_TEXT_TILES


def joins_before(is_cube: np.ndarray, config: AdaSparkConfig) -> np.ndarray:
    """``[blocks]`` bool: the cubes that choose together with the cube before them.

    They stand behind a cube that has enough others before it to choose, and do not begin a tile
    (``Settings.tile_tokens``).

    Args:
        is_cube: ``[blocks]`` bool, of a prompt.
        config: the request's settings.
    """
    before = np.cumsum(is_cube) - is_cube
    chooses = is_cube & (before >= max(config.dense_below, 1))
    inside = np.arange(len(is_cube)) % config.tile_cubes > 0
    return inside & is_cube & np.append(False, chooses)[:-1]


def choosing_text(is_video: np.ndarray, config: AdaSparkConfig) -> np.ndarray:
    """``[blocks]``: how many text tokens of each block of a prompt have enough cubes before them.

    Args:
        is_video: ``[tokens]`` bool, of the prompt.
        config: the request's settings; ``text_queries`` is not heeded.
    """
    tokens, size = len(is_video), config.cube_volume
    whole = tokens // size
    is_cube = np.zeros(-(-tokens // size), bool)  # [blocks]
    is_cube[:whole] = is_video[: whole * size].reshape(whole, size).all(axis=1)
    before = np.cumsum(is_cube) - is_cube
    text = np.bincount(np.flatnonzero(~is_video) // size, minlength=len(is_cube))
    return text * (before >= max(config.dense_below, 1))


class RowSettings(NamedTuple):
    """The settings of one request, or arrays ``[rows]`` of those of a step's requests.

    Shares are above 0 and at most 1; at 1 nothing is left out.
    """

    attention_share: Any
    ffn_share: Any
    importance: Any  # index into settings.IMPORTANCES
    compensation: Any  # index into settings.COMPENSATIONS
    rule: Any  # index into settings.SELECTIONS, or choose.BUDGET
    sparse_text: Any  # bool
    min_cubes: Any
    dense_layers: Any

    @classmethod
    def of_rows(cls, requests: Sequence[AdaSparkRequest | None]) -> RowSettings:
        """Arrays ``[rows]``; a row without video leaves nothing out."""
        rows = [_NOTHING_LEFT_OUT if r is None else r.settings for r in requests]
        return cls(*(np.array(column) for column in zip(*rows, strict=True)))


_NOTHING_LEFT_OUT = RowSettings(1.0, 1.0, 0, 0, 0, False, 1, 0)
