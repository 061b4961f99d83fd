"""Which settings are tried: a model's default grid, or a file of one's own.

A *contender* is a method and settings.  Contenders whose settings a request may name share an
engine; what only a server may set, and another method, takes an engine of its own.  A default grid
needs two for AdaSpark, which scores cubes in two ways, and one for AdaTP.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..methods import DEFAULT, built_in, settings_class
from ..methods.adaspark.settings import SCORES, AdaSparkConfig
from ..methods.adatp.settings import FASTV
from ..methods.videonsa.settings import VideoNSASettings
from ..settings import OFF, Settings, SettingsError, check_cube_volume
from . import lines

REFERENCE = "dense"
TRAINED = "as trained"

SHARES = ((0.7, 0.6), (0.5, 0.5), (0.3, 0.5), (0.3, 0.3), (0.2, 0.3))  # p_attn, p_ffn together
ALONE = ((0.5, 1.0), (0.3, 1.0), (1.0, 0.5), (1.0, 0.3))
RANKED = ((0.35, 0.5), (0.2, 0.5))  # keep, p_ffn
PRUNED = ((0.5, 1.0, 1.0), (0.75, 1.0, 1.0), (0.5, 0.5, 0.5), (0.75, 0.5, 0.5))  # prune, p, p
OTHERWISE_SCORED = ((0.5, 0.5), (0.3, 0.5), (0.3, 0.3))  # p_attn, p_ffn; need their own engine
BUDGETS = (0.5, 0.4, 0.3, 0.2)  # of AdaTP
FASTV_BUDGETS = (0.5, 0.35)


class GridError(ValueError):
    """Settings that cannot be tried; says which and why."""


@dataclass(frozen=True)
class Contender:
    """A way to run the model.

    Attributes:
        name: its method and settings, in words.
        method: its sparsity method.
        settings: what is named over the checkpoint's settings.
    """

    name: str
    method: str
    settings: dict[str, Any] = field(hash=False)

    @property
    def of_server(self) -> dict[str, Any]:
        """Those of its settings that only a server may set, and a cube, whose size one fixes."""
        cls = settings_class(self.method)
        only = {spec.name for spec in fields(cls) if not spec.metadata["request"]} | {"cube"}
        return {key: value for key, value in self.settings.items() if key in only}

    @property
    def of_request(self) -> dict[str, Any]:
        return {k: v for k, v in self.settings.items() if k not in self.of_server}

    @property
    def engine(self) -> tuple[str, str]:
        """What its engine is started with; equal for contenders that share one."""
        return self.method, json.dumps(self.of_server, sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"name": self.name, "method": self.method, "settings": self.settings}


@dataclass(frozen=True)
class Model:
    """What the grid must know of a checkpoint.

    Attributes:
        trained_for: the only method that it can run; None for a stock checkpoint.
        config: its config.json.
        takes_prune: whether tokens of its videos can be dropped.
        layers: of its language model.
    """

    trained_for: str | None
    config: Mapping[str, Any] = field(hash=False)
    takes_prune: bool
    layers: int


def contender(method: str, **settings: Any) -> Contender:
    """One with a name that says its settings."""
    said = " ".join(
        key if value is True else f"{key}={_said(value)}" for key, value in settings.items()
    )
    return Contender(f"{method} {said or 'defaults'}", method, settings)


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def default(model: Model, methods: Collection[str] = (), quick: bool = False) -> list[Contender]:
    """The reference, and the settings worth trying on a model.

    Args:
        model: the checkpoint.
        methods: those to try; none: all that the model allows.
        quick: a few settings instead.

    Raises:
        GridError: a method that the model cannot run.
    """
    for method in methods:
        if why := why_not(model, method):
            raise GridError(f"--methods {method}: {why}")
    if model.trained_for == "videonsa":
        return _videonsa(model, quick)
    wanted = methods or ("adaspark", "adatp")
    tried = [m for m in ("adaspark", "adatp") if m in wanted and not why_not(model, m)]
    found = [Contender(REFERENCE, tried[0], {OFF: True})]
    if "adaspark" in tried:
        found += _adaspark(model, quick)
    if "adatp" in tried:
        found += [contender("adatp", flops=f) for f in (BUDGETS[1:2] if quick else BUDGETS)]
        if not quick:
            found += [contender("adatp", **{FASTV: True, "flops": f}) for f in FASTV_BUDGETS]
    return found


def why_not(model: Model, method: str) -> str | None:
    """Why a model cannot run a method; None if it can."""
    if method not in built_in():
        return f"no such method; there are {', '.join(built_in())}"
    if model.trained_for not in (None, method):
        return f"the checkpoint was trained for {model.trained_for}, whose weights no other uses"
    if method == "videonsa" and model.trained_for is None:
        return "the checkpoint has no gates for it; only one that was trained with VideoNSA has"
    if method == "adatp" and model.layers < 3:
        return f"tokens are dropped after the second layer, and this model has {model.layers}"
    return None


def _adaspark(model: Model, quick: bool) -> list[Contender]:
    """Settings of AdaSpark.  A checkpoint that brings its own is also tried with exactly those."""
    own = model.config.get("adaspark_config")
    found = [contender("adaspark")] if own else []

    def pair(p_attn: float, p_ffn: float, **more: Any) -> Contender:
        return contender("adaspark", **more, p_attn=p_attn, p_ffn=p_ffn)

    shares = [pair(*shares) for shares in (SHARES[1:3] if quick else SHARES + ALONE)]
    pruned = [
        pair(p_attn, p_ffn, prune=share)
        for share, p_attn, p_ffn in (PRUNED[2:3] if quick else PRUNED)
        if model.takes_prune
    ]
    if quick:
        return found + shares + pruned
    ranked = [contender("adaspark", selection="top_k", keep=k, p_ffn=f) for k, f in RANKED]
    first_dense = pair(0.3, 0.5, dense_layers=2)
    here = AdaSparkConfig.settled(own, None).score
    other = next(score for score in SCORES if score != here)
    scored = [pair(*shares, score=other) for shares in OTHERWISE_SCORED]
    return [*found, *shares, first_dense, *ranked, *pruned, *scored]


def _videonsa(model: Model, quick: bool) -> list[Contender]:
    """Fewer blocks and smaller windows than a VideoNSA checkpoint was trained with.

    The reference is the checkpoint as it was trained: dense attention with its weights is a model
    nobody trained, and one of the contenders.
    """
    trained = VideoNSASettings.settled(VideoNSASettings.of_checkpoint(model.config), None)
    blocks, window = trained.block_counts, trained.window_size
    found = [Contender(TRAINED, "videonsa", {})]
    fewer = sorted({max(1, blocks // n) for n in (2, 4, 8)} - {blocks}, reverse=True)
    found += [contender("videonsa", block_counts=n) for n in (fewer[:1] if quick else fewer)]
    if not quick and window > 1:
        found.append(contender("videonsa", window_size=window // 2))
    return [*found, Contender("videonsa dense", "videonsa", {OFF: True})]


def read(path: Path, model: Model) -> list[Contender]:
    """The reference, and the settings of a file: a JSON object of settings a line.

    ``method`` names another method than the checkpoint's, ``name`` another name.

    Raises:
        GridError: a line that cannot be used, by its number, or one that is there twice.
    """
    entries = lines.read(path, "--grid", GridError)
    found = default(model)[:1]
    found += [_of_entry(entry, where, model) for _, where, entry in entries]
    if len(found) == 1:
        raise GridError(f"{path}: no lines; expected one JSON object of settings a line")
    for key in ("name", "settings"):
        seen: list[Any] = []
        for each in found:
            told = each.name if key == "name" else (each.method, each.settings)
            if told in seen:
                raise GridError(f"{path}: {each.name!r} is there twice; remove one")
            seen.append(told)
    return found


def _of_entry(entry: Any, where: str, model: Model) -> Contender:
    if not isinstance(entry, dict):
        raise GridError(f'{where}: expected an object of settings, e.g. {{"p_attn": 0.3}}')
    settings = dict(entry)
    method = settings.pop("method", model.trained_for or DEFAULT)
    name = settings.pop("name", None)
    if name is not None and (not isinstance(name, str) or not name.strip()):
        raise GridError(f"{where}: name={name!r}: expected words")
    if why := why_not(model, str(method)):
        raise GridError(f"{where}: method={method!r}: {why}")
    words = settings_class(method).words
    settings = {k: v for k, v in settings.items() if v is not False or k not in words}  # not said
    made = contender(method, **settings)
    check(made, model, where)
    return Contender(" ".join(name.split()), made.method, settings) if name else made


def check(made: Contender, model: Model, where: str) -> Settings:
    """What a contender's settings come to.

    Raises:
        GridError: the method refuses them, or the model does.
    """
    cls = settings_class(made.method)
    try:
        settled = cls.settled(cls.of_checkpoint(model.config), made.settings, source=where)
        check_cube_volume(settled)
    except SettingsError as error:
        raise GridError(str(error)) from None
    if settled.dropped_share and not model.takes_prune:
        raise GridError(f"{where}: prune={settled.dropped_share}: not for this model; leave it out")
    return settled


def by_engine(contenders: Iterable[Contender]) -> dict[tuple[str, str], list[Contender]]:
    """Contenders by the engine that they share, in order of the first."""
    engines: dict[tuple[str, str], list[Contender]] = {}
    for each in contenders:
        engines.setdefault(each.engine, []).append(each)
    return engines
