"""Who competes, and over which videos: pure data.

A contender is a kind of server and the settings its requests carry.  Settings name every key that
matters, so that a changed default of the plugin changes nothing here.  A contender that must match
another one (`like`) gets the missing number from what that one measured at the same length: top_k
and uniform the share of cubes to keep, EVS the pruning rate, AdaTP and FastV the FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

from vllm_adaspark.methods.videonsa.gates import BRANCHES

from .beds import NEEDLE_BED, PLACES_BED, Bed
from .videos import Cell

LENGTHS = (1024, 2048, 4096, 8192, 16384)  # video tokens
MIDDLE = (4096, 8192)  # where contenders meet that do not run at every length
VIDEOS = 12  # a cell, each asks one question per skill: 72
MORE_VIDEOS = 40  # of the stock dense model, so that each skill's accuracy at each length is known

ATTENTION_SHARES = (0.99, 0.9, 0.7, 0.5, 0.3, 0.2)
FFN_SHARES = (1.0, 0.8, 0.6, 0.5, 0.3)

BASE: dict[str, Any] = {
    "p_attn": 1.0,
    "p_ffn": 1.0,
    "selection": "top_p",
    "importance": "deviation",
    "compensation": "centroid",
    "order": "cube",
    "cube": [4, 4, 4],
    "min_cubes": 1,
    "dense_layers": 0,
    "text_queries": "sparse",
}
# (p_attn, p_ffn) followed at every length, with rivals at equal cost; the first one's too.
FOLLOWED = ((0.5, 0.5), (0.3, 0.5))
# (p_attn, p_ffn, min_cubes) followed at every length; the first is the plugin's default.
FLOORS = ((0.5, 0.5, 8), (0.3, 0.5, 8))


@dataclass(frozen=True)
class Contender:
    """
    Attributes:
        name: as in the rows; begins with its curve.
        kind: of server, see servers.Server.
        settings: of each request; None sends none.
        score: for "adaspark", what cubes are scored by.
        gates: for "videonsa", the branch whose gates are 1, the others' 0; None as trained.
        rate: for "evs", the share of video tokens that is dropped.
        like: the contender whose density (top_k, uniform) or FLOPs (the others) this one matches.
        lengths: video tokens it is asked at.
        more: None: it answers about the grid's videos; else about those after them, up to so many.
    """

    name: str
    kind: str = "adaspark"
    settings: dict[str, Any] | None = None
    score: str = "mean"
    gates: str | None = None
    rate: float | None = None
    like: str | None = None
    lengths: tuple[int, ...] = MIDDLE
    more: int | None = None

    @property
    def curve(self) -> str:
        """ "dense", "adaspark", "adaspark+prune", "videonsa", "topk", "uniform", "evs", "adatp" or
        "fastv"; with " bounds" where cubes are scored by them.
        """
        scored = "" if self.score == "mean" else f" {self.score}"
        return self.name.split()[0].partition("=")[0].rstrip(",") + scored

    @property
    def block(self) -> int:
        """Tokens in a KV block of its server."""
        return math.prod(self.settings["cube"]) if self.settings else 64


@dataclass(frozen=True)
class Grid:
    """
    Attributes:
        contenders: in the order of the report.
        videos: a cell.
        extra: further cells, for the stock dense contenders alone.
        series: whose tables and pictures these are.
        bed: where the videos come from.
    """

    contenders: tuple[Contender, ...]
    videos: int = VIDEOS
    extra: tuple[Cell, ...] = ()
    series: str = "needle"
    bed: Bed = NEEDLE_BED

    def __post_init__(self) -> None:
        by_name = {contender.name: contender for contender in self.contenders}
        if len(by_name) < len(self.contenders):
            raise ValueError("two contenders have the same name; rename one")
        for contender in self.contenders:
            like = by_name.get(contender.like)
            if contender.like and (like is None or not {*contender.lengths} <= {*like.lengths}):
                raise ValueError(
                    f"contender {contender.name!r} is to match {contender.like!r}, "
                    "which does not run at all of its lengths"
                )

    def cells(self, contender: Contender) -> list[Cell]:
        one = Cell(1, self.bed.size, bed=self.bed)
        usual = [replace(one, patches=tokens // one.tokens) for tokens in contender.lengths]
        return usual + (list(self.extra) if contender.kind == "stock" else [])

    def numbers(self, contender: Contender) -> slice:
        """Which of a cell's videos it answers about."""
        if contender.more is None:
            return slice(self.videos)
        return slice(self.videos, max(self.videos, contender.more))

    @property
    def longest(self) -> int:
        """Video tokens of the longest prompt."""
        return max(cell.tokens for c in self.contenders for cell in self.cells(c))


def ours(p_attn: float = 1.0, p_ffn: float = 1.0, **more: Any) -> dict[str, Any]:
    """Settings of a request that differ from ``BASE``."""
    return BASE | {"p_attn": p_attn, "p_ffn": p_ffn} | more


def top_p(p_attn: float, p_ffn: float, lengths: tuple[int, ...] = MIDDLE) -> Contender:
    return Contender(label(p_attn, p_ffn), settings=ours(p_attn, p_ffn), lengths=lengths)


def label(p_attn: float, p_ffn: float) -> str:
    return f"adaspark p={p_attn:g}/{p_ffn:g}"


def rivals(p_attn: float, p_ffn: float, lengths: tuple[int, ...] = MIDDLE) -> list[Contender]:
    """top_k and uniform at the density of a top_p contender, EVS at its FLOPs."""
    like = label(p_attn, p_ffn)
    short = like.removeprefix("adaspark ")
    chosen = [
        Contender(f"{curve} like {short}", settings=ours(1, p_ffn, selection=rule), like=like)
        for curve, rule in (("topk", "top_k"), ("uniform", "uniform"))
    ]
    chosen.append(Contender(f"evs like {short}", kind="evs", like=like))
    return [replace(contender, lengths=lengths) for contender in chosen]


def floored(p_attn: float, p_ffn: float, least: int) -> list[Contender]:
    """One that keeps at least so many cubes a query, and top_k at its density."""
    short = f"{label(p_attn, p_ffn).removeprefix('adaspark ')} min {least}"
    mine = Contender(f"adaspark {short}", settings=ours(p_attn, p_ffn, min_cubes=least))
    by_rank = ours(1, p_ffn, selection="top_k")
    rival = Contender(f"topk like {short}", settings=by_rank, like=mine.name)
    return [replace(contender, lengths=LENGTHS) for contender in (mine, rival)]


def by_bounds(contender: Contender) -> Contender:
    """The same on a server that scores cubes by the bounds of their keys."""
    return replace(contender, name=f"{contender.name} bounds", score="bounds")


DENSE = Contender("dense", kind="stock", lengths=LENGTHS)
MORE_DENSE = Contender("dense, more videos", kind="stock", lengths=LENGTHS, more=MORE_VIDEOS)
CUBE_ORDER = Contender("adaspark p=1/1", settings=ours(), lengths=LENGTHS)
STOCK_ORDER = Contender("adaspark p=1/1 raster", settings=ours(order="raster"))
MAIN = top_p(*FOLLOWED[0], lengths=LENGTHS)
ATTENTION_ONLY = [top_p(p, 1.0) for p in (0.9, 0.7, 0.5, 0.3, 0.2)]
FFN_ONLY = [top_p(1.0, p) for p in (0.8, 0.5, 0.3)]
BOTH = [top_p(0.9, 0.8), top_p(0.7, 0.6), top_p(0.3, 0.3), top_p(0.2, 0.3)]
ATTENTION_RIVALS = [r for p in (0.3, 0.2) for r in rivals(p, 1.0) if r.kind != "evs"]
# What makes a token run the FFN, and what the others get; norm and mean are the paper's.
OTHER_FFN_RULES = [
    (importance, given)
    for importance in ("deviation", "norm")
    for given in ("centroid", "mean", "bypass")
    if (importance, given) != (BASE["importance"], BASE["compensation"])
]
FFN_RULES = [
    Contender(
        f"{label(*pair)} {importance} {given}",
        settings=ours(*pair, importance=importance, compensation=given),
    )
    for pair, rules in (
        ((1.0, 0.5), OTHER_FFN_RULES),
        ((0.5, 0.5), [("norm", "mean"), ("deviation", "bypass")]),
    )
    for importance, given in rules
]
PAPER = Contender(
    f"{label(0.9, 0.8)} norm mean",
    settings=ours(0.9, 0.8, importance="norm", compensation="mean"),
)
CUBES = [
    Contender(f"{MAIN.name} cube {t}×{h}×{w}", settings=MAIN.settings | {"cube": [t, h, w]})
    for t, h, w in ((1, 8, 8), (16, 2, 2), (8, 4, 4))
]
RASTER = Contender(f"{MAIN.name} raster", settings=MAIN.settings | {"order": "raster"})
EVS = [Contender(f"evs q={q:g}", kind="evs", rate=q) for q in (0.5, 0.75, 0.9)]
# EVS's rule before AdaSpark's.
PRUNED = [
    Contender(f"{MAIN.name} prune={q:g}", settings=MAIN.settings | {"prune": q})
    for q in (0.5, 0.75)
]

# Budgets at which methods that drop tokens meet AdaSpark and EVS, and the layer after which FastV's
# one event keeps to it: of this model's six layers, two that see every token cost a third.
DROPPED = {0.4: 2, 0.25: 1}
PROGRESSIVE = [1, 2, 3, 4]  # AdaTP's events; the paper's, up to N - 12, are for deeper models
ADATP: dict[str, Any] = {
    "cube": [4, 4, 4],
    "order": "raster",
    "layers": PROGRESSIVE,
    "tau_s": 0.95,
    "tau_t": 0.5,
    "alpha_boost": 1.5,
    "gamma_cap": 1.0,
    "dedup": "first",
    "refill": False,
    "keep_budget": True,
    "queries": "all",
}
FASTV = ADATP | {"tau_s": -1.0, "alpha_boost": 1.0, "dedup": "off", "queries": "last"}

PLACES_LENGTHS = (2048, 4096, 8192)
PLACES_VIDEOS = 20  # a cell, four of each haystack; each asks one question per skill


@dataclass(frozen=True)
class Budget:
    """How methods keep to a share of the FLOPs on "places".

    Attributes:
        flops: the share.
        prune: of the video's tokens, dropped by EVS's rule before AdaSpark.
        alone: lengths at which AdaSpark can keep to it without, where projections leave room.
        p_ffn: of top_k and uniform, so that with AdaSpark's share of cubes they spend its FLOPs.
        events: layers after which AdaTP drops, FastV after the first of them; none where nothing
            that drops between layers can spend so little, because the first of five layers, which
            sees all tokens, costs more.
    """

    flops: float
    prune: float
    alone: tuple[int, ...]
    p_ffn: float
    events: tuple[int, ...]


BUDGETS = (
    Budget(0.4, 0.4, PLACES_LENGTHS, 0.47, (1, 2, 3, 4)),
    Budget(0.25, 0.5, PLACES_LENGTHS[1:], 0.23, (1,)),
    Budget(0.15, 0.65, (), 0.2, ()),
)

EXTRA_CELLS = (Cell(128, (112, 168)), Cell(256, parts=2))


def default() -> Grid:
    main, second = FOLLOWED
    followed = [MAIN, *rivals(*main, LENGTHS), top_p(*second, LENGTHS), *rivals(*second)]
    followed += [contender for floor in FLOORS for contender in floored(*floor)]
    followed += [by_bounds(c) for c in followed if c.name in (MAIN.name, f"{MAIN.name} min 8")]
    middle = [
        *ATTENTION_ONLY,
        *FFN_ONLY,
        *BOTH,
        *ATTENTION_RIVALS,
        *FFN_RULES,
        PAPER,
        *CUBES,
        RASTER,
        *EVS,
    ]
    first = [DENSE, MORE_DENSE, CUBE_ORDER, STOCK_ORDER]
    return Grid(tuple([*first, *followed, *middle]), extra=EXTRA_CELLS)


def full() -> Grid:
    """The default grid, every pair of shares, and AdaSpark with tokens dropped: hours."""
    grid = default()
    known = {contender.name for contender in grid.contenders}
    pairs = [top_p(a, f) for a in ATTENTION_SHARES for f in FFN_SHARES]
    more = [contender for contender in pairs if contender.name not in known]
    return replace(grid, contenders=(*grid.contenders, *PRUNED, *more))


def quick() -> Grid:
    """The main setting and its rivals at two lengths, few videos."""
    few = [DENSE, CUBE_ORDER, MAIN, *rivals(*FOLLOWED[0])]
    return Grid(tuple(replace(contender, lengths=MIDDLE) for contender in few), videos=4)


def videonsa() -> Grid:
    """A fine-tuned VideoNSA against the dense model it came from, and with one branch alone.

    It is a checkpoint of its own, so its contenders are in no other grid.
    """
    alone = [
        Contender(f"videonsa {branch}", kind="videonsa", gates=branch, lengths=(2048,))
        for branch in BRANCHES
    ]
    trained = Contender("videonsa", kind="videonsa", lengths=LENGTHS)
    return Grid((DENSE, trained, *alone), series="videonsa")


def on_places(full: bool = False) -> Grid:
    """All methods at three budgets on videos whose tokens stand for places.

    VideoNSA needs weights trained for it, and there are none for these videos.

    Args:
        full: twice the videos, and EVS's rule alone and before AdaSpark at rates of its own.
    """
    everywhere = [DENSE, CUBE_ORDER, *((*EVS, *PRUNED) if full else ())]
    contenders = [replace(contender, lengths=PLACES_LENGTHS) for contender in everywhere]
    for budget in BUDGETS:
        contenders += at_budget(budget)
    videos = PLACES_VIDEOS * (2 if full else 1)
    return Grid(tuple(contenders), videos=videos, series="places", bed=PLACES_BED)


def at_budget(budget: Budget) -> list[Contender]:
    """AdaSpark under a budget, after EVS's rule and alone, and all others at what it spends."""
    mine, adatp, _, fastv, by_evs = dropping(budget.flops, 1)
    short = mine.name.removeprefix("adaspark ")
    settings = mine.settings | {"prune": budget.prune}
    pruned = Contender(f"adaspark+prune={budget.prune:g} {short}", settings=settings)
    adatp = replace(adatp, settings=adatp.settings | {"layers": list(budget.events)})
    others = [adatp, fastv, by_evs] if budget.events else [by_evs]
    others = [replace(contender, like=pruned.name) for contender in others]
    alone = [mine] + [
        Contender(
            f"{curve} like {short}", settings=ours(1, budget.p_ffn, selection=rule), like=mine.name
        )
        for curve, rule in (("topk", "top_k"), ("uniform", "uniform"))
    ]
    made = [replace(contender, lengths=PLACES_LENGTHS) for contender in (pruned, *others)]
    made += [replace(c, lengths=budget.alone) for c in alone if budget.alone]
    return made + [by_bounds(c) for c in made if c.curve.startswith("adaspark")]


def adatp() -> Grid:
    """AdaTP and FastV against AdaSpark and EVS at the same FLOPs, and AdaSpark after EVS's rule."""
    contenders = [replace(DENSE, lengths=MIDDLE)]
    for flops, layer in DROPPED.items():
        ours, *others = dropping(flops, layer)
        contenders += [ours, by_bounds(ours), *others]
    return Grid((*contenders, *PRUNED), series="adatp")


def dropping(flops: float, layer: int) -> list[Contender]:
    """AdaSpark under a budget, and those that drop tokens at the FLOPs it spends.

    Deduplication may leave less than AdaTP's budget allows; ``refill`` spends the rest.
    """
    rules = {key: value for key, value in BASE.items() if key not in ("p_attn", "p_ffn")}
    short = f"flops={flops:g}"
    ours = Contender(f"adaspark {short}", settings=rules | {"flops": flops})
    kinds = {
        f"adatp like {short}": ADATP,
        f"adatp like {short} refill": ADATP | {"refill": True},
        f"fastv like {short}": FASTV | {"layers": [layer]},
    }
    drop = [
        Contender(name, kind="adatp", settings=settings, like=ours.name)
        for name, settings in kinds.items()
    ]
    return [ours, *drop, Contender(f"evs like {short}", kind="evs", like=ours.name)]


def narrowed(grid: Grid, patterns: Iterable[str], lengths: Iterable[int]) -> Grid:
    """The contenders that match one of ``patterns``, those they depend on, and stock dense.

    Args:
        patterns: of names, with * and ?; none keeps all contenders.
        lengths: video tokens to keep; none keeps all.

    Raises:
        ValueError: a pattern matches nothing, or no contender runs at these lengths.
    """
    patterns, lengths = list(patterns), set(lengths)
    names = [contender.name for contender in grid.contenders]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"--only {pattern!r} matches no contender; there are: {names}")
    wanted = {n for n in names if not patterns or any(fnmatch(n, p) for p in patterns)}
    wanted |= {c.like for c in grid.contenders if c.name in wanted and c.like} | {DENSE.name}
    kept = [
        replace(c, lengths=tuple(n for n in c.lengths if not lengths or n in lengths))
        for c in grid.contenders
        if c.name in wanted
    ]
    kept = [contender for contender in kept if contender.lengths]
    if not kept:
        raise ValueError(
            f"--lengths {sorted(lengths)}: no contender runs there; {LENGTHS} are known"
        )
    return replace(grid, contenders=tuple(kept), extra=() if lengths or patterns else grid.extra)
