"""Settings of a method: one frozen, validated object, and who may set what of it.

Three sources lie over the defaults, in rising priority:

1. the checkpoint:  ``"adaspark_config": {...}`` in its ``config.json``: how it was trained
2. the operator:    ``--additional-config '{"adaspark": {...}}'``: the keys that it names
3. the request:     ``mm_processor_kwargs={"adaspark": {...}}``

A checkpoint may come from anywhere, and a request from anyone, so each may set only part of the
keys.  A request sets what concerns itself.  A checkpoint sets what decides the numbers that the
model computes; what decides where data goes and how much memory is used (``trace``, ``trace_mb``,
``report_file``, ``encoder_patches``) is the operator's.

``{"off": true}``, or ``"off"`` for the whole object, is short for ``{"enabled": false, "order":
"raster"}``: dense, and token for token what the stock model computes.  A method may have other such
words, and keys of its own: it subclasses :class:`Settings`.

Unknown keys, wrong types and values out of range are errors that name the key, the value and what
is allowed: at start for the first two, HTTP 400 for the last.  This module imports nothing but the
standard library, so a client can use it to check settings before it sends them.
"""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

ORDERS = ("cube", "raster")
CUBE_VOLUMES = (32, 64, 128)  # tested ones; a cube is a KV block

SERVER_KEY = "adaspark"  # in --additional-config, and of a request's mm_processor_kwargs
CHECKPOINT_KEY = "adaspark_config"  # in the checkpoint's config.json
METHOD_KEY = "method"  # in --additional-config: another method than AdaSpark

OFF = "off"

# Shares are whole thousandths, so that "how many are 0.1 of 30" has one answer (choose._count).
SHARE_STEPS = 1000
LARGEST = sys.float_info.max  # JSON has larger integers, and an infinity


_short = reprlib.Repr()
_short.maxlevel, _short.maxdict, _short.maxlist, _short.maxtuple = 3, 8, 16, 16
_short.maxstring = _short.maxother = _short.maxlong = 80
LONGEST_KEY = 40  # characters of an unknown key that a similar one is looked for


class SettingsError(ValueError):
    """A setting that cannot be used.  The message names the key, the value and what is allowed."""


def shown(value: Any) -> str:
    """A client's value for an error message: its ``repr``, cut where it is long or deep."""
    return _short.repr(value)


def setting(
    default: Any, doc: str, *, request: bool = True, checkpoint: bool = True, **rule: Any
) -> Any:
    """A field of a method's settings.

    Args:
        default: its value if nobody sets it.
        doc: what it means, shown by the command line.
        request: whether a request may set it.
        checkpoint: whether a checkpoint may.
        rule: what is allowed: ``choices``, ``low`` and ``high`` of a number (whole if the default
            is), ``share`` for a number above 0 and at most 1, ``budget`` for such a number or None,
            ``part`` for a number from 0 to below 1, ``check`` for a function of ("name=value" for
            its error, the value) to the value in its canonical type; otherwise what the default is:
            true or false, a number, or a path or None.
    """
    who = {"request": request, "checkpoint": checkpoint}
    return field(default=default, metadata={"doc": doc, **who, **rule})


@dataclass(frozen=True)
class Settings:
    """What every method has.  A method's own settings are a frozen dataclass derived from it.

    Raises:
        SettingsError: a value has the wrong type or is out of range.
    """

    # What a word is short for; other settings named beside it are laid over that, save for "off".
    words: ClassVar[dict[str, dict[str, Any]]] = {OFF: {"enabled": False, "order": "raster"}}

    # Keys of other methods that users may expect here, and why there is no such thing.
    refused: ClassVar[dict[str, str]] = {}

    # Summaries that are kept of each KV block: of its keys, and of its values.  A method whose
    # attention leaves out no blocks keeps none, and has no room for block tables either.
    summaries_per_block: ClassVar[int] = 1

    # Which models it runs on, by their model_type; empty for all that there are.
    model_types: ClassVar[tuple[str, ...]] = ()

    # Where in a checkpoint's config.json its settings stand.
    checkpoint_part: ClassVar[str] = CHECKPOINT_KEY

    enabled: bool = setting(True, "false: this request (or the whole server) runs dense")
    cube: tuple[int, int, int] = setting(
        (4, 4, 4), "frames, rows, columns of merged tokens in a cube (t, h, w)"
    )
    order: str = setting("cube", "order of a video's tokens in the prompt", choices=ORDERS)
    trace: bool = setting(False, "record what was chosen, for the viewer", checkpoint=False)
    encoder_patches: int = setting(
        32768,
        "patches the vision tower encodes at a time",
        request=False,
        checkpoint=False,
        low=1,
        high=1 << 24,
    )
    trace_mb: int = setting(
        64,
        "megabytes a worker keeps of traces (0: none)",
        request=False,
        checkpoint=False,
        low=0,
        high=65536,
    )
    report_file: str | None = setting(
        None,
        "append one JSON line per finished request to this file",
        request=False,
        checkpoint=False,
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            object.__setattr__(self, spec.name, _checked(spec, value))

    @property
    def one_step(self) -> bool:
        """Whether a prompt with video must run in one step, in KV blocks that nobody shares."""
        return False

    @property
    def key_summary(self) -> str:
        """What is kept of the keys of each KV block: their ``"sums"``, or their ``"bounds"``."""
        return "sums"

    @property
    def dropped_share(self) -> float:
        """Share of a video's tokens that the language model never sees; 0 but for some methods."""
        return 0.0

    def forecast(self, shape: Any, layers: int, is_video: Any, dropped: int = 0) -> Any:
        """What a prompt will spend under these settings; by default nobody knows, unless it is off.

        Args:
            shape: sizes of a layer, a ``ModelShape`` (accounts/flops.py).
            layers: of the language model.
            is_video: ``[tokens]`` bool, of the prompt.
            dropped: tokens of its videos that the language model never sees.

        Returns:
            A ``Forecast`` (accounts/flops.py).

        Raises:
            ValueError: the model has not the layers that the settings name.
        """
        from .accounts.flops import Forecast

        dense = layers * float(shape.layer_flops(len(is_video) + dropped))
        return Forecast(dense, None if self.enabled else dense)

    @property
    def cube_volume(self) -> int:
        """Merged tokens in a cube, which is also the KV block size."""
        t, h, w = self.cube
        return t * h * w

    @property
    def tile_tokens(self) -> int:
        """The most video tokens that choose as one, from a multiple of so many on."""
        return self.cube_volume

    def override(
        self,
        settings: Mapping[str, Any] | str | None,
        *,
        source: str = "adaspark",
        request: bool = False,
        checkpoint: bool = False,
    ) -> Self:
        """This config with ``settings`` laid over it.

        Args:
            settings: keys of this class, one of its ``words``, or ``None``, which changes nothing.
            source: where the settings came from, for the error message.
            request: whether they came from a request, which may not set server-wide keys.
            checkpoint: whether they came from a checkpoint, which may not set the operator's.

        Raises:
            SettingsError: unknown key, wrong type, value out of range, or a key that this
                source may not set.
        """
        if settings is None:
            return self
        if isinstance(settings, str) and settings in self.words:
            settings = {settings: True}
        if not isinstance(settings, Mapping):
            words = " or ".join(repr(word) for word in self.words)
            raise SettingsError(
                f"{source} must be an object of settings or {words}, got {shown(settings)} "
                f"({type(settings).__name__})"
            )
        known = {spec.name: spec.metadata for spec in fields(self)}
        settable = [
            name
            for name, rule in known.items()
            if (rule["request"] or not request) and (rule["checkpoint"] or not checkpoint)
        ]
        settable += self.words
        for key in settings:
            if key in self.refused:
                raise SettingsError(f"{source}: {key}={shown(settings[key])}: {self.refused[key]}")
            if key not in known and key not in self.words:
                close = difflib.get_close_matches(str(key)[:LONGEST_KEY], settable, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise SettingsError(
                    f"{source}: unknown key {shown(key)}{hint}; allowed: {', '.join(settable)}"
                )
            if key not in settable and request:
                raise SettingsError(
                    f"{source}: {key!r} is a server setting and cannot be set per request; "
                    f"allowed: {', '.join(settable)}"
                )
            if key not in settable:
                raise SettingsError(
                    f"{source}: {key!r} is a server setting and cannot be set by a checkpoint; "
                    "remove it there, and if this server shall have it, name it in "
                    f"--additional-config {SERVER_KEY}; allowed: {', '.join(settable)}"
                )
        try:
            changed = dataclasses.replace(self, **self.spelt_out(settings))
        except SettingsError as error:
            raise SettingsError(f"{source}: {error}") from None
        for name in [name for name in known if request and name not in settable]:
            said, here = getattr(changed, name), getattr(self, name)
            if said != here:  # a word set it
                word = next(word for word in self.words if settings.get(word))
                raise SettingsError(
                    f"{source}: {word!r} means {name}={shown(said)}, but on this server {name} is "
                    f"{shown(here)}, and a request cannot set it; name the word's other settings"
                )
        if request and changed.cube_volume != self.cube_volume:
            raise SettingsError(
                f"{source}: cube={list(changed.cube)} holds {changed.cube_volume} tokens, but this "
                f"server's KV blocks hold {self.cube_volume}; a request may change a cube's shape, "
                "not its volume"
            )
        return changed

    @classmethod
    def settled(
        cls,
        checkpoint: Mapping[str, Any] | str | None,
        operator: Mapping[str, Any] | str | None,
        *,
        source: str = f"--additional-config {SERVER_KEY}",
    ) -> Self:
        """A server's settings: the defaults, over them the checkpoint's, over both the operator's.

        An operator who says "off" gets the stock model whatever the checkpoint says: its settings
        are not even read, so the KV block size does not come from them either.

        Args:
            checkpoint: ``adaspark_config`` of the checkpoint's config.json, None if it has none.
            operator: what the operator named; None for nothing.
            source: where the operator's came from, for the error message.

        Raises:
            SettingsError: one of them cannot be used; the message names which.
        """
        own = cls().override(operator, source=source)
        if operator == OFF or (isinstance(operator, Mapping) and operator.get(OFF)):
            return own
        trained = cls().override(
            checkpoint, source=f"config.json {cls.checkpoint_part}", checkpoint=True
        )
        return trained.override(operator, source=source)

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> Mapping[str, Any] | str | None:
        """What a checkpoint's ``config`` (its config.json) says of these settings, or None."""
        return config.get(CHECKPOINT_KEY)

    @classmethod
    def spelt_out(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """``settings`` with short words spelt out."""
        plain = {key: value for key, value in settings.items() if key not in cls.words}
        for word, meaning in cls.words.items():
            said = settings.get(word, False)
            if not isinstance(said, bool):
                raise SettingsError(f"{word}={shown(said)}: expected true or false")
            if said:
                plain = plain | meaning if word == OFF else meaning | plain
        return plain

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy; ``override`` takes it back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}


def operator_settings(additional: Mapping[str, Any] | None, method: type[Settings]) -> Any:
    """The operator's settings in ``--additional-config``, unchecked; None if there are none.

    Args:
        additional: what ``--additional-config`` says.
        method: the class of the method's settings.

    Raises:
        SettingsError: some stand beside our key or under a misspelt one, where they would do
            nothing.
    """
    additional = additional or {}
    own_keys = [SERVER_KEY, METHOD_KEY]
    ours = {spec.name for spec in fields(method)} | method.words.keys()
    for key in additional:
        near = difflib.get_close_matches(str(key).lower(), own_keys, n=1, cutoff=0.8)
        if key in ours or (near and key not in own_keys):
            raise SettingsError(
                f"--additional-config: {shown(key)} means nothing there; AdaSpark's settings go "
                f'under its own key: \'{{"{SERVER_KEY}": {{"p_attn": 0.5}}}}\', and another '
                f"method is named by {METHOD_KEY!r}"
            )
    return additional.get(SERVER_KEY)


def check_cube_volume(config: Settings, origin: str = "") -> None:
    """Refuse a cube of a size that no server takes; ``origin`` says where it came from.

    Raises:
        SettingsError: names the cube and the volumes there are.
    """
    if config.cube_volume not in CUBE_VOLUMES:
        raise SettingsError(
            f"cube={list(config.cube)}{origin} holds {config.cube_volume} tokens; allowed volumes: "
            f"{', '.join(map(str, CUBE_VOLUMES))}, e.g. [4, 4, 2], [4, 4, 4] or [8, 4, 4]"
        )


def _checked(spec: dataclasses.Field, value: Any) -> Any:
    """``value`` in its canonical type, or an SettingsError that says what is allowed."""
    rule = spec.metadata
    problem = f"{spec.name}={shown(value)}"
    if "check" in rule:
        return rule["check"](problem, value)
    if spec.name == "cube":
        parts = list(value) if isinstance(value, (list, tuple)) else []
        if len(parts) != 3 or not all(_is_int(n) and 1 <= n <= 64 for n in parts):
            raise SettingsError(
                f"{problem}: expected three integers [t, h, w], each 1 to 64, e.g. [4, 4, 4]"
            )
        return tuple(parts)
    if "budget" in rule and value is None:
        return None
    if "share" in rule or "budget" in rule or "part" in rule:
        return _checked_share(problem, value, rule)
    if "choices" in rule:
        if not isinstance(value, str) or value not in rule["choices"]:
            allowed = ", ".join(repr(c) for c in rule["choices"])
            raise SettingsError(f"{problem}: expected one of {allowed}")
        return value
    if isinstance(spec.default, bool):
        if not isinstance(value, bool):
            raise SettingsError(f"{problem}: expected true or false")
        return value
    if isinstance(spec.default, int | float):
        return _checked_number(problem, value, rule, whole=isinstance(spec.default, int))
    if value is not None and (not isinstance(value, str) or not value):
        raise SettingsError(f"{problem}: expected a path or null")
    return value


def _checked_number(problem: str, value: Any, rule: Mapping[str, Any], whole: bool) -> int | float:
    low, high = rule.get("low", -LARGEST), rule.get("high", LARGEST)
    if (_is_int(value) if whole else _is_number(value)) and low <= value <= high:
        return value if whole else float(value)
    bounds = [
        f" {word} {rule[key]}" for word, key in (("from", "low"), ("to", "high")) if key in rule
    ]
    raise SettingsError(
        f"{problem}: expected a{'n integer' if whole else ' number'}{''.join(bounds)}"
    )


def _checked_share(problem: str, value: Any, rule: Mapping[str, Any]) -> float:
    """A share in whole thousandths; never rounded down to nothing, nor quietly up to all."""
    part = "part" in rule
    if not _is_number(value) or not (0 <= value < 1 if part else 0 < value <= 1):
        allowed = "from 0 to below 1" if part else "above 0 and at most 1"
        or_null = ", or null" if "budget" in rule else ""
        raise SettingsError(f"{problem}: expected a number {allowed}{or_null}")
    return rounded_share(value)


def rounded_share(value: float) -> float:
    """A share from 0 to 1 in whole thousandths; only 0 becomes 0, and only 1 becomes 1."""
    if value in (0, 1):
        return float(value)
    return min(max(round(value * SHARE_STEPS), 1), SHARE_STEPS - 1) / SHARE_STEPS


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
