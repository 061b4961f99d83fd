"""AdaSpark's own settings: how cubes are chosen and which tokens run the FFN.

``{"paper": true}``, or ``"paper"`` for the whole object, is short for the paper's own rules where
ours differ.  A checkpoint may also set ``score``, ``dense_below``, ``cube_queries`` and
``tile_cubes``, which training fixes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...settings import Settings, SettingsError, setting, shown

SELECTIONS = ("top_p", "top_k", "uniform")
IMPORTANCES = ("deviation", "norm")
COMPENSATIONS = ("centroid", "mean", "bypass")
TEXT_QUERIES = ("sparse", "dense")
SCORES = ("mean", "bounds")

PAPER = "paper"
REPLACED_BY_FLOPS = ("p_attn", "p_ffn", "keep")


@dataclass(frozen=True)
class AdaSparkConfig(Settings):
    """AdaSpark's settings (arXiv 2604.08077, sections on AdaS-Attn and AdaS-FFN).

    A budget (``flops``) goes with neither the settings that it replaces (``p_attn``, ``p_ffn``,
    ``keep``) nor a ``selection`` other than top_p.  One source cannot name both; of two sources,
    the later decides which of them counts.

    Raises:
        SettingsError: a value has the wrong type or is out of range.

    Example:
        >>> AdaSparkConfig(p_attn=0.8).override({"p_ffn": 0.5}).p_ffn
        0.5
    """

    words: ClassVar[dict[str, dict[str, Any]]] = Settings.words | {
        PAPER: {
            "selection": "top_p",
            "score": "mean",
            "min_cubes": 1,
            "importance": "norm",
            "compensation": "mean",
        }
    }

    p_attn: float = setting(
        0.5, "probability mass of preceding cubes a query keeps (top_p)", share=True
    )
    p_ffn: float = setting(
        0.5, "share of a cube's token importance that runs the FFN (1: dense)", share=True
    )
    flops: float | None = setting(
        None,
        "budget: spend at most this share of the dense FLOPs; chooses p (null: none)",
        budget=True,
    )
    prune: float = setting(
        0.0, "share of a video's tokens dropped before the language model (0: none)", part=True
    )
    selection: str = setting(
        "top_p", "how cubes are chosen: by mass, by rank or evenly", choices=SELECTIONS
    )
    keep: float = setting(
        0.25, "share of the preceding cubes kept by top_k and uniform", share=True
    )
    min_cubes: int = setting(8, "cubes a query keeps at the least", low=1, high=16)
    dense_layers: int = setting(0, "the first layers that stay dense", low=0, high=15)
    text_queries: str = setting(
        "sparse", "whether text after a video selects cubes too", choices=TEXT_QUERIES
    )
    importance: str = setting(
        "deviation",
        "what makes a token run the FFN: its distance from the cube's mean, or its norm",
        choices=IMPORTANCES,
    )
    compensation: str = setting(
        "centroid",
        "what a token that skips the FFN gets: the FFN of the skipped tokens' mean, the mean of "
        "the active tokens' FFN, or nothing",
        choices=COMPENSATIONS,
    )
    score: str = setting(
        "mean",
        "what a query scores a cube by: the mean of its keys, or a bound on its largest product "
        "with any of them",
        request=False,
        choices=SCORES,
    )
    dense_below: int = setting(
        8,
        "a query with fewer preceding cubes attends to all",
        request=False,
        low=0,
        high=1_000_000,
    )
    cube_queries: int = setting(
        8,
        "tokens of a video cube that are scored to choose its cubes, spread over it",
        request=False,
        low=1,
        high=128,
    )
    tile_cubes: int = setting(
        1,
        "neighbouring cubes whose tokens choose together",
        request=False,
        low=1,
        high=2,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cube_queries.bit_count() != 1:
            raise SettingsError(
                f"cube_queries={self.cube_queries}: expected a power of two, e.g. 8"
            )
        if self.flops is not None and self.selection != "top_p":
            raise SettingsError(
                f"flops={self.flops!r} chooses p, so selection={self.selection!r} cannot be kept: "
                "leave selection out or set it to 'top_p', or set keep instead of flops"
            )

    @property
    def dropped_share(self) -> float:
        """``prune``, unless the request runs dense."""
        return self.prune if self.enabled else 0.0

    @property
    def tile_tokens(self) -> int:
        """See ``Settings.tile_tokens``."""
        return self.cube_volume * self.tile_cubes

    @property
    def sparse_attention(self) -> bool:
        """Whether some query may leave cubes out."""
        if self.flops is not None:
            share = self.flops
        else:
            share = self.p_attn if self.selection == "top_p" else self.keep
        return self.enabled and share < 1.0

    @property
    def sparse_ffn(self) -> bool:
        """Whether some token may skip the FFN."""
        share = self.p_ffn if self.flops is None else self.flops
        return self.enabled and share < 1.0

    @property
    def key_summary(self) -> str:
        """What the score is made of."""
        return {"mean": "sums", "bounds": "bounds"}[self.score]

    def forecast(self, shape: Any, layers: int, is_video: Any, dropped: int = 0) -> Any:
        """By a budget, or else an estimate: see budget.py."""
        from .budget import forecast

        return forecast(self, shape, layers, is_video, dropped)

    @classmethod
    def spelt_out(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """``settings`` with short words spelt out, and what they rule out of a lower source's."""
        plain = super().spelt_out(settings)
        replaced = [key for key in REPLACED_BY_FLOPS if key in plain]
        if replaced and plain.get("flops") is not None:
            raise SettingsError(
                f"flops={shown(plain['flops'])} and {replaced[0]}={shown(plain[replaced[0]])}: "
                f"a budget chooses {replaced[0]} itself; leave one of them out"
            )
        if plain.get("flops") is not None:
            plain.setdefault("selection", "top_p")
        elif replaced or plain.get("selection", "top_p") != "top_p":
            plain["flops"] = None
        return plain

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy of the settings that count; ``override`` takes it back.

        A budget leaves out what it replaces.
        """
        unused = REPLACED_BY_FLOPS if self.flops is not None else ()
        return {key: value for key, value in super().to_dict().items() if key not in unused}
