"""One frozen, validated object that holds every AdaSpark setting.

Three sources lie over the defaults, in rising priority:

1. the checkpoint:  ``"adaspark_config": {...}`` in its ``config.json``: how it was trained
2. the operator:    ``--additional-config '{"adaspark": {...}}'``: the keys that it names
3. the request:     ``mm_processor_kwargs={"adaspark": {...}}``

A checkpoint may come from anywhere, and a request from anyone, so each may set only part of the
keys.  A request sets what concerns itself.  A checkpoint sets what decides the numbers that the
model computes, ``dense_below`` and ``cube_queries`` included, which training fixes; what decides
where data goes and how much memory is used (``trace``, ``trace_mb``, ``report_file``,
``encoder_patches``) is the operator's.

``{"off": true}``, or ``"off"`` for the whole object, is short for ``{"enabled": false, "order":
"raster"}``: dense, and token for token what the stock model computes.  ``{"paper": true}``, or
``"paper"``, is short for the paper's own rules where ours differ.

Unknown keys, wrong types and values out of range are errors that name the key, the value and what
is allowed: at start for the first two, HTTP 400 for the last.  This module imports nothing but the
standard library, so a client can use it to check settings before it sends them.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

ORDERS = ("cube", "raster")
SELECTIONS = ("top_p", "top_k", "uniform")
IMPORTANCES = ("deviation", "norm")
COMPENSATIONS = ("centroid", "mean", "bypass")
TEXT_QUERIES = ("sparse", "dense")

SERVER_KEY = "adaspark"  # in --additional-config
CHECKPOINT_KEY = "adaspark_config"  # in the checkpoint's config.json

CUBE_VOLUMES = (32, 64, 128)  # tested ones; a cube is a KV block

OFF = "off"
PAPER = "paper"
# What each word is short for.  Settings named beside "paper" are laid over it.
SHORT_FOR = {
    OFF: {"enabled": False, "order": "raster"},
    PAPER: {"selection": "top_p", "min_cubes": 1, "importance": "norm", "compensation": "mean"},
}
REPLACED_BY_FLOPS = ("p_attn", "p_ffn", "keep")

# Shares are whole thousandths, so that "how many are 0.1 of 30" has one answer (selection._count).
SHARE_STEPS = 1000


class AdaSparkConfigError(ValueError):
    """A setting that cannot be used.  The message names the key, the value and what is allowed."""


def _setting(
    default: Any, doc: str, *, request: bool = True, checkpoint: bool = True, **rule: Any
) -> Any:
    """A dataclass field with its rule; ``request`` and ``checkpoint`` say who may set it."""
    who = {"request": request, "checkpoint": checkpoint}
    return field(default=default, metadata={"doc": doc, **who, **rule})


@dataclass(frozen=True)
class AdaSparkConfig:
    """AdaSpark's settings (arXiv 2604.08077, sections on AdaS-Attn and AdaS-FFN).

    Raises:
        AdaSparkConfigError: a value has the wrong type or is out of range.

    Example:
        >>> AdaSparkConfig(p_attn=0.8).override({"p_ffn": 0.5}).p_ffn
        0.5
    """

    enabled: bool = _setting(True, "false: this request (or the whole server) runs dense")
    p_attn: float = _setting(
        0.5, "probability mass of preceding cubes a query keeps (top_p)", share=True
    )
    p_ffn: float = _setting(
        0.5, "share of a cube's token importance that runs the FFN (1: dense)", share=True
    )
    flops: float | None = _setting(
        None,
        "budget: spend at most this share of the dense FLOPs; chooses p (null: none)",
        budget=True,
    )
    selection: str = _setting(
        "top_p", "how cubes are chosen: by mass, by rank or evenly", choices=SELECTIONS
    )
    keep: float = _setting(
        0.25, "share of the preceding cubes kept by top_k and uniform", share=True
    )
    min_cubes: int = _setting(8, "cubes a query keeps at the least", low=1, high=16)
    dense_layers: int = _setting(0, "the first layers that stay dense", low=0, high=15)
    text_queries: str = _setting(
        "sparse", "whether text after a video selects cubes too", choices=TEXT_QUERIES
    )
    importance: str = _setting(
        "deviation",
        "what makes a token run the FFN: its distance from the cube's mean, or its norm",
        choices=IMPORTANCES,
    )
    compensation: str = _setting(
        "centroid",
        "what a token that skips the FFN gets: the FFN of the skipped tokens' mean, the mean of "
        "the active tokens' FFN, or nothing",
        choices=COMPENSATIONS,
    )
    cube: tuple[int, int, int] = _setting(
        (4, 4, 4), "frames, rows, columns of merged tokens in a cube (t, h, w)"
    )
    order: str = _setting("cube", "order of a video's tokens in the prompt", choices=ORDERS)
    trace: bool = _setting(False, "record what was chosen, for the viewer", checkpoint=False)
    dense_below: int = _setting(
        8,
        "a query with fewer preceding cubes attends to all",
        request=False,
        low=0,
        high=1_000_000,
    )
    cube_queries: int = _setting(
        8,
        "tokens of a video cube that are asked which cubes it keeps, spread over it",
        request=False,
        low=1,
        high=128,
    )
    encoder_patches: int = _setting(
        32768,
        "patches the vision tower encodes at a time",
        request=False,
        checkpoint=False,
        low=1,
        high=1 << 24,
    )
    trace_mb: int = _setting(
        64,
        "megabytes a worker keeps of traces (0: none)",
        request=False,
        checkpoint=False,
        low=0,
        high=65536,
    )
    report_file: str | None = _setting(
        None,
        "append one JSON line per finished request to this file",
        request=False,
        checkpoint=False,
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            object.__setattr__(self, spec.name, _checked(spec, value))

        if self.cube_queries.bit_count() != 1:
            raise AdaSparkConfigError(
                f"cube_queries={self.cube_queries}: expected a power of two, e.g. 8"
            )
        if self.flops is not None and self.selection != "top_p":
            raise AdaSparkConfigError(
                f"flops={self.flops!r} chooses p, so selection={self.selection!r} cannot be kept: "
                "leave selection out or set it to 'top_p', or set keep instead of flops"
            )

    @property
    def cube_volume(self) -> int:
        """Merged tokens in a cube, which is also the KV block size."""
        t, h, w = self.cube
        return t * h * w

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

    def override(
        self,
        settings: Mapping[str, Any] | str | None,
        *,
        source: str = "adaspark",
        request: bool = False,
        checkpoint: bool = False,
    ) -> AdaSparkConfig:
        """This config with ``settings`` laid over it.

        Args:
            settings: keys of this class, a word of SHORT_FOR, or ``None``, which changes nothing.
                A budget (``flops``) goes with neither the settings that it replaces (``p_attn``,
                ``p_ffn``, ``keep``) nor a ``selection`` other than top_p.  One source cannot name
                both; of two sources, the later decides which of them counts.
            source: where the settings came from, for the error message.
            request: whether they came from a request, which may not set server-wide keys.
            checkpoint: whether they came from a checkpoint, which may not set the operator's.

        Raises:
            AdaSparkConfigError: unknown key, wrong type, value out of range, or a key that this
                source may not set.
        """
        if settings is None:
            return self
        if isinstance(settings, str) and settings in SHORT_FOR:
            settings = {settings: True}
        if not isinstance(settings, Mapping):
            words = " or ".join(repr(word) for word in SHORT_FOR)
            raise AdaSparkConfigError(
                f"{source} must be an object of settings or {words}, got {settings!r} "
                f"({type(settings).__name__})"
            )
        known = {spec.name: spec.metadata for spec in fields(self)}
        settable = [
            name
            for name, rule in known.items()
            if (rule["request"] or not request) and (rule["checkpoint"] or not checkpoint)
        ]
        settable += SHORT_FOR
        for key in settings:
            if key not in known and key not in SHORT_FOR:
                close = difflib.get_close_matches(str(key), settable, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise AdaSparkConfigError(
                    f"{source}: unknown key {key!r}{hint}; allowed: {', '.join(settable)}"
                )
            if key not in settable and request:
                raise AdaSparkConfigError(
                    f"{source}: {key!r} is a server setting and cannot be set per request; "
                    f"allowed: {', '.join(settable)}"
                )
            if key not in settable:
                raise AdaSparkConfigError(
                    f"{source}: {key!r} is a server setting and cannot be set by a checkpoint; "
                    "remove it there, and if this server shall have it, name it in "
                    f"--additional-config {SERVER_KEY}; allowed: {', '.join(settable)}"
                )
        try:
            changed = dataclasses.replace(self, **_plain(settings))
        except AdaSparkConfigError as error:
            raise AdaSparkConfigError(f"{source}: {error}") from None
        if request and changed.cube_volume != self.cube_volume:
            raise AdaSparkConfigError(
                f"{source}: cube={list(changed.cube)} holds {changed.cube_volume} tokens, but this "
                f"server's KV blocks hold {self.cube_volume}; a request may change a cube's shape, "
                "not its volume"
            )
        return changed

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy of the settings that count; ``override`` takes it back.

        A budget leaves out what it replaces.
        """
        unused = REPLACED_BY_FLOPS if self.flops is not None else ()
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        return {key: value for key, value in plain.items() if key not in unused}


def operator_settings(additional: Mapping[str, Any] | None) -> Any:
    """The operator's settings in ``--additional-config``, unchecked; None if there are none.

    Raises:
        AdaSparkConfigError: some stand beside our key or under a misspelt one, where they would do
            nothing.
    """
    additional = additional or {}
    ours = {
        spec.name for spec in fields(AdaSparkConfig) if "_" in spec.name or spec.name == "flops"
    }
    for key in additional:
        near = difflib.get_close_matches(str(key).lower(), [SERVER_KEY], cutoff=0.8)
        if key in ours or (near and key != SERVER_KEY):
            raise AdaSparkConfigError(
                f"--additional-config: {key!r} means nothing there; AdaSpark's settings go under "
                f'its own key: \'{{"{SERVER_KEY}": {{"p_attn": 0.5}}}}\''
            )
    return additional.get(SERVER_KEY)


def check_cube_volume(config: AdaSparkConfig, origin: str = "") -> None:
    """Refuse a cube of a size that no server takes; ``origin`` says where it came from.

    Raises:
        AdaSparkConfigError: names the cube and the volumes there are.
    """
    if config.cube_volume not in CUBE_VOLUMES:
        raise AdaSparkConfigError(
            f"cube={list(config.cube)}{origin} holds {config.cube_volume} tokens; allowed volumes: "
            f"{', '.join(map(str, CUBE_VOLUMES))}, e.g. [4, 4, 2], [4, 4, 4] or [8, 4, 4]"
        )


def settled(
    checkpoint: Mapping[str, Any] | str | None,
    operator: Mapping[str, Any] | str | None,
    *,
    source: str = f"--additional-config {SERVER_KEY}",
) -> AdaSparkConfig:
    """A server's settings: the defaults, over them the checkpoint's, over both the operator's.

    An operator who says "off" gets the stock model whatever the checkpoint says: its settings are
    not even read, so the KV block size does not come from them either.

    Args:
        checkpoint: ``adaspark_config`` of the checkpoint's config.json, None if it has none.
        operator: what the operator named; None for nothing.
        source: where the operator's came from, for the error message.

    Raises:
        AdaSparkConfigError: one of them cannot be used; the message names which.
    """
    own = AdaSparkConfig().override(operator, source=source)
    if operator == OFF or (isinstance(operator, Mapping) and operator.get(OFF)):
        return own
    trained = AdaSparkConfig().override(
        checkpoint, source=f"config.json {CHECKPOINT_KEY}", checkpoint=True
    )
    return trained.override(operator, source=source)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` with short words spelt out, and what they rule out of a lower source's."""
    plain = {key: value for key, value in settings.items() if key not in SHORT_FOR}
    for word, meaning in SHORT_FOR.items():
        said = settings.get(word, False)
        if not isinstance(said, bool):
            raise AdaSparkConfigError(f"{word}={said!r}: expected true or false")
        if said:
            plain = plain | meaning if word == OFF else meaning | plain
    replaced = [key for key in REPLACED_BY_FLOPS if key in plain]
    if replaced and plain.get("flops") is not None:
        raise AdaSparkConfigError(
            f"flops={plain['flops']!r} and {replaced[0]}={plain[replaced[0]]!r}: a budget chooses "
            f"{replaced[0]} itself; leave one of them out"
        )
    if plain.get("flops") is not None:
        plain.setdefault("selection", "top_p")
    elif replaced or plain.get("selection", "top_p") != "top_p":
        plain["flops"] = None
    return plain


def _checked(spec: dataclasses.Field, value: Any) -> Any:
    """``value`` in its canonical type, or an AdaSparkConfigError that says what is allowed."""
    rule = spec.metadata
    problem = f"{spec.name}={value!r}"
    if spec.name == "cube":
        parts = list(value) if isinstance(value, (list, tuple)) else []
        if len(parts) != 3 or not all(_is_int(n) and 1 <= n <= 64 for n in parts):
            raise AdaSparkConfigError(
                f"{problem}: expected three integers [t, h, w], each 1 to 64, e.g. [4, 4, 4]"
            )
        return tuple(parts)
    if "budget" in rule and value is None:
        return None
    if "share" in rule or "budget" in rule:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
            or_null = ", or null" if "budget" in rule else ""
            raise AdaSparkConfigError(
                f"{problem}: expected a number above 0 and at most 1{or_null}"
            )
        # Never round down to nothing, and never quietly up to dense.
        highest = SHARE_STEPS - 1 if value < 1 else SHARE_STEPS
        steps = min(max(round(value * SHARE_STEPS), 1), highest)
        return steps / SHARE_STEPS
    if "choices" in rule:
        if not isinstance(value, str) or value not in rule["choices"]:
            allowed = ", ".join(repr(c) for c in rule["choices"])
            raise AdaSparkConfigError(f"{problem}: expected one of {allowed}")
        return value
    if "low" in rule:
        if not _is_int(value) or not rule["low"] <= value <= rule["high"]:
            raise AdaSparkConfigError(
                f"{problem}: expected an integer from {rule['low']} to {rule['high']}"
            )
        return value
    if isinstance(spec.default, bool):
        if not isinstance(value, bool):
            raise AdaSparkConfigError(f"{problem}: expected true or false")
        return value
    if value is not None and (not isinstance(value, str) or not value):
        raise AdaSparkConfigError(f"{problem}: expected a path or null")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
