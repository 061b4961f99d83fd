"""AdaTP's own settings: after which layers video tokens are dropped, how many, and by what rule.

``"fastv"``, or ``{"fastv": true}`` beside other settings, is short for the simplest rival: one
event after layer 2, which keeps the half of the tokens that the last text token attends to most,
wherever they are (FastV, arXiv 2403.06764).  A budget named beside it takes the place of the half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...settings import Settings, SettingsError, rounded_share, setting, shown

DEDUPS = ("first", "all", "off")
QUERIES = ("all", "last")
FASTV = "fastv"
MOST_LAYERS = 1024
MOST_EVENTS = 64  # there is no model with more layers to drop tokens between


def _number(low: float, high: float) -> Callable[[str, Any], float]:
    def check(problem: str, value: Any) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            raise SettingsError(f"{problem}: expected a number from {low:g} to {high:g}")
        return float(value)

    return check


def _layers(problem: str, value: Any) -> tuple[int, ...] | None:
    """Layers counted from 1, rising; None lets the model's depth decide."""
    if value is None:
        return None
    layers = list(value) if isinstance(value, list | tuple) else [value]
    whole = all(type(n) is int and 1 <= n <= MOST_LAYERS for n in layers)
    if not 1 <= len(layers) <= MOST_EVENTS or not whole or sorted(set(layers)) != layers:
        raise SettingsError(
            f"{problem}: expected a list of layers, counted from 1 and rising, "
            "e.g. [2, 6, 11, 16], or null"
        )
    return tuple(layers)


def _keep(problem: str, value: Any) -> tuple[float, ...] | None:
    """Shares kept at each event; one number stands for all events."""
    if value is None:
        return None
    shares = list(value) if isinstance(value, list | tuple) else [value]
    numbers = all(isinstance(n, int | float) and not isinstance(n, bool) for n in shares)
    if not 1 <= len(shares) <= MOST_EVENTS or not numbers or not all(0 < n <= 1 for n in shares):
        raise SettingsError(
            f"{problem}: expected a number above 0 and at most 1, a list of one such number for "
            "each of the layers, or null"
        )
    return tuple(rounded_share(n) for n in shares)


@dataclass(frozen=True)
class AdaTPSettings(Settings):
    """AdaTP's settings (arXiv 2505.20100); docs/adatp.md says which of them are the authors'.

    A budget (``flops``) and ``keep`` replace each other.  One source cannot name both; of two
    sources, the later decides which of them counts.

    Raises:
        SettingsError: a value has the wrong type or is out of range.
    """

    summaries_per_block: ClassVar[int] = 0

    words: ClassVar[dict[str, dict[str, Any]]] = Settings.words | {
        FASTV: {
            "layers": [2],
            "keep": [0.5],
            "tau_s": -1.0,
            "alpha_boost": 1.0,
            "dedup": "off",
            "queries": "last",
        }
    }

    order: str = setting("raster", "order of a video's tokens in the prompt", choices=("raster",))
    flops: float | None = setting(
        0.273,
        "budget: spend at most this share of the dense FLOPs of the prompt; chooses keep",
        budget=True,
    )
    keep: tuple[float, ...] | None = setting(
        None,
        "share of the video tokens that goes on at each event: a list, or one number for all",
        check=_keep,
    )
    layers: tuple[int, ...] | None = setting(
        None,
        "layers, counted from 1, after which tokens are dropped (null: four of 2 to N - 12)",
        check=_layers,
    )
    tau_s: float = setting(
        0.95,
        "adjacent frames less similar than this start a new segment",
        check=_number(-1, 2),
    )
    tau_t: float = setting(
        0.5,
        "segments are relevant from this relevance on, between the least and the most relevant one",
        check=_number(0, 1),
    )
    alpha_boost: float = setting(
        1.5, "how many times the usual share a relevant segment keeps", check=_number(1, 100)
    )
    gamma_cap: float = setting(1.0, "the largest share that the boost may lead to", share=True)
    dedup: str = setting(
        "first",
        "events at which a segment keeps one token of each place in the frame",
        choices=DEDUPS,
    )
    refill: bool = setting(
        False, "fill up what deduplication leaves of a segment's share, by score"
    )
    keep_budget: bool = setting(
        True, "take what relevant segments keep more from the others, so that the sum stays"
    )
    queries: str = setting(
        "all", "text tokens after the video whose attention is the score", choices=QUERIES
    )
    encoder: str | None = setting(
        None,
        "path of a SigLIP checkpoint that embeds frames and the question (null: frames are "
        "compared by the mean of their tokens, and no segment is relevant)",
        request=False,
        checkpoint=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is None and self.flops is None:
            raise SettingsError("keep=None and flops=None: set one of them")
        lists = self.layers is not None and self.keep is not None and len(self.keep) > 1
        if lists and len(self.keep) != len(self.layers):
            raise SettingsError(
                f"keep={list(self.keep)} has {len(self.keep)} shares for {len(self.layers)} "
                f"layers={list(self.layers)}: give one share for each layer, or one for all"
            )

    @property
    def one_step(self) -> bool:
        """Its text decides which tokens stay, and later layers write these into the front slots."""
        return self.enabled

    def forecast(self, shape: Any, layers: int, is_video: Any, dropped: int = 0) -> Any:
        """Each layer's own length: see flops.py."""
        from .flops import forecast

        if not self.enabled:
            return super().forecast(shape, layers, is_video, dropped)
        return forecast(self, shape, layers, is_video)

    @classmethod
    def spelt_out(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """``settings`` with short words spelt out, and what they rule out of a lower source's."""
        plain = super().spelt_out(settings)
        if settings.get("flops") is not None and "keep" not in settings:
            plain.pop("keep", None)  # a word's
        budget, keep = plain.get("flops"), plain.get("keep")
        if budget is not None and keep is not None:
            raise SettingsError(
                f"flops={shown(budget)} and keep={shown(keep)}: a budget chooses keep itself; "
                "leave one of them out"
            )
        if keep is not None:
            plain["flops"] = None
        elif budget is not None:
            plain["keep"] = None
        return plain
