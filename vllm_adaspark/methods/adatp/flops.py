"""What a prompt costs whose video tokens are dropped on the way, and the schedule of a budget.

Layers up to the first event's see all tokens, those after an event only the survivors and the text.
From the sizes of a layer (accounts/flops.py) follows the cost; a budget is solved for the one
share that every event keeps (a geometric schedule, which is this project's proposal: the paper's
ratios are not known).  Pure NumPy; no vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...accounts.flops import Forecast, ModelShape
from .settings import AdaTPSettings

EVENTS = 4  # if a server or request names no layers
FIRST, LAST = 2, 12  # events lie between layer 2 and the twelfth layer from the end (the paper)
LEAST_SHARE = 0.02  # of the video tokens, after the last event, that a budget leaves at the least
BISECTIONS = 40


def event_layers(settings: AdaTPSettings, num_layers: int) -> tuple[int, ...]:
    """The layers after which tokens are dropped, counted from 0.

    Raises:
        ValueError: the model has no such layer, or there is one share too many or too few.
    """
    layers = settings.layers
    if layers is None:
        last = max(FIRST, num_layers - LAST)
        layers = tuple(sorted(set(np.linspace(FIRST, last, EVENTS).astype(int).tolist())))
    if layers[-1] >= num_layers:
        raise ValueError(
            f"layers={list(layers)}: this model has {num_layers} layers, and tokens can be dropped "
            f"after any but the last of them: name layers from 1 to {num_layers - 1}"
        )
    if settings.keep is not None and len(settings.keep) not in (1, len(layers)):
        raise ValueError(
            f"keep={list(settings.keep)} has {len(settings.keep)} shares for the {len(layers)} "
            f"layers {list(layers)}: give one share for each layer, or one for all"
        )
    return tuple(layer - 1 for layer in layers)


@dataclass(frozen=True)
class PromptCost:
    """A prompt whose video tokens are dropped after some layers.

    Attributes:
        shape: sizes of a layer.
        num_layers: of the language model.
        events: layers after which tokens are dropped, counted from 0.
        text, video: tokens of the prompt.
        queries: text tokens whose attention is the score.
    """

    shape: ModelShape
    num_layers: int
    events: tuple[int, ...]
    text: int
    video: int
    queries: int

    @classmethod
    def of(
        cls,
        settings: AdaTPSettings,
        shape: ModelShape,
        num_layers: int,
        tokens: int,
        video: int,
        behind: int,
    ) -> PromptCost:
        """Of a prompt of ``tokens``, ``video`` of them of videos and ``behind`` after the last.

        Raises:
            ValueError: see :func:`event_layers`.
        """
        return cls(
            shape,
            num_layers,
            event_layers(settings, num_layers),
            text=tokens - video,
            video=video,
            queries=min(behind, 1) if settings.queries == "last" else behind,
        )

    @property
    def dense(self) -> float:
        """FLOPs if nothing is dropped."""
        return self.num_layers * float(self.shape.layer_flops(self.text + self.video))

    def spent(self, shares: np.ndarray, *, causal: bool = True) -> float:
        """FLOPs if ``shares [events]`` of the video tokens are left after each event."""
        edges = np.diff([0, *(layer + 1 for layer in self.events), self.num_layers])
        tokens = self.text + self.video * np.array([1.0, *shares])  # [depths]
        layers = edges * self.shape.layer_flops(tokens, causal=causal)
        scores = self.queries * tokens[:-1] * self.shape.attention_flops_per_pair / 2
        return float(layers.sum() + scores.sum())

    @property
    def least(self) -> float:
        """The smallest budget that can be kept, in (0, 1]."""
        return min(1.0, self.spent(geometric(LEAST_SHARE, len(self.events))) / self.dense)

    def shares_for(self, flops: float) -> np.ndarray:
        """``[events]`` cumulative shares that a budget of ``flops * dense`` leaves.

        A budget that cannot be kept leaves ``flops`` itself of the video tokens at the end: less
        would save little and cost the answer much.
        """
        number = len(self.events)
        if flops >= 1:
            return np.ones(number)
        if flops < self.least:
            return geometric(max(flops, LEAST_SHARE), number)
        low, high = LEAST_SHARE, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if self.spent(geometric(middle, number)) <= flops * self.dense:
                low = middle
            else:
                high = middle
        return geometric(low, number)

    def shares(self, settings: AdaTPSettings) -> np.ndarray:
        """``[events]`` cumulative shares of the video tokens that the settings leave."""
        if settings.flops is not None:
            return self.shares_for(settings.flops)
        keep = settings.keep * len(self.events) if len(settings.keep) == 1 else settings.keep
        return np.cumprod(keep)


def geometric(last: float, events: int) -> np.ndarray:
    """``[events]`` cumulative shares that fall evenly to ``last``."""
    return last ** (np.arange(1, events + 1) / events)


def forecast(
    config: AdaTPSettings, shape: ModelShape, layers: int, is_video: np.ndarray
) -> Forecast:
    """See ``Settings.forecast``; what is spent is the most, since alike frames leave fewer tokens.

    Raises:
        ValueError: see :func:`event_layers`.
    """
    behind = len(is_video) - 1 - int(np.flatnonzero(is_video)[-1])
    cost = PromptCost.of(config, shape, layers, len(is_video), int(is_video.sum()), behind)
    told = Forecast(cost.dense, cost.spent(cost.shares(config)), cost.least)
    note = ", or less: where frames are alike, fewer tokens go on"
    return replace(told, note=note + (told.of_budget(config.flops) if config.flops else ""))
