"""The result in Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import scenes

from .grid import (
    CUBE_ORDER,
    DENSE,
    FLOORS,
    FOLLOWED,
    LENGTHS,
    MORE_DENSE,
    floored,
    label,
    rivals,
)
from .intervals import Interval, Row, accuracy, difference
from .videos import MOTIONS

Result = dict[str, Any]
STOCK_FRAME = "112×112"
LONG = 8192  # video tokens from which savings are judged


class Rows:
    """The rows of a result, to be narrowed."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows = list(rows)

    @classmethod
    def of(cls, result: Result) -> Rows:
        """Of videos of the usual shape that all contenders of a length answered about."""
        return cls(result["rows"]).where(
            lambda row: row["contender"] != MORE_DENSE.name,
            frame=result.get("frame", STOCK_FRAME),
            parts=1,
        )

    def __iter__(self):
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, keep: Callable[[Row], bool] | None = None, **equal: Any) -> Rows:
        """Rows with these values (of a collection: one of them), and for which ``keep`` holds."""

        def fits(row: Row) -> bool:
            for name, value in equal.items():
                wanted = value if isinstance(value, (tuple, list, set)) else (value,)
                if row[name] not in wanted:
                    return False
            return keep is None or keep(row)

        return Rows(row for row in self._rows if fits(row))

    def mean(self, name: str) -> float | None:
        """Of a share, over the rows that have it."""
        values = [row[name] for row in self._rows if row[name] is not None]
        return float(np.mean(values)) if values else None

    def values(self, name: str) -> list:
        """Which there are, in order of appearance."""
        return list(dict.fromkeys(row[name] for row in self._rows))


def meeting(result: Result) -> list[int]:
    """The lengths at which every contender ran, in video tokens."""
    rows = Rows.of(result)
    ran = [set(rows.where(contender=n).values("tokens")) for n in rows.values("contender")]
    return sorted(set.intersection(*ran))


def lengths(result: Result) -> str:
    """Contenders that run at every length: right answers and, in brackets, FLOPs."""
    rows = Rows.of(result)
    there = [n for n in LENGTHS if n in rows.values("tokens")]
    lines = []
    for name in rows.values("contender"):
        mine = rows.where(contender=name)
        if set(there) <= set(mine.values("tokens")):
            at = [mine.where(tokens=n) for n in there]
            cells = [f"{right(r)} ({percent(r.mean('flops_ratio'), 0)})" for r in at]
            lines.append([name, *cells])
    return markdown(["contender", *(f"{n:,}" for n in there)], lines)


def dense(result: Result) -> str:
    """The stock model skill by skill: calm, busy and both."""
    lines = []
    for frames, tokens, rows in _stock_cells(result):
        for name, motions in (*((motion, motion) for motion in MOTIONS), ("both", MOTIONS)):
            if len(mine := rows.where(haystack=motions)):
                lines.append([frames, tokens, name, *_by_skill(mine)])
    return markdown(["frames", "video tokens", "haystack", *scenes.SKILLS, "all"], lines)


def card(result: Result) -> str:
    """The stock model skill by skill, calm and busy together: for the model's own page."""
    lines = [[frames, tokens, *_by_skill(rows)] for frames, tokens, rows in _stock_cells(result)]
    return markdown(["frames", "video tokens", *scenes.SKILLS, "all"], lines)


def _stock_cells(result: Result) -> Iterator[tuple[str, str, Rows]]:
    """What the videos of each cell are, their tokens, and all that stock dense answered there."""
    everything = Rows(result["rows"]).where(contender=(DENSE.name, MORE_DENSE.name))
    for frame, parts, tokens in sorted(
        {(row["frame"], row["parts"], row["tokens"]) for row in everything},
        key=lambda cell: (cell[1], cell[0] != STOCK_FRAME, cell[2]),
    ):
        frames = frame if parts == 1 else f"{frame}, {parts} videos"
        yield frames, f"{tokens:,}", everything.where(frame=frame, parts=parts, tokens=tokens)


def _by_skill(rows: Rows) -> list[str]:
    return [*(counts(rows.where(skill=skill)) for skill in scenes.SKILLS), right(rows)]


def headline(result: Result) -> str:
    """Stock dense and the floored settings, right answers and FLOPs at each length."""
    rows = Rows.of(result)
    there = [n for n in LENGTHS if n in rows.values("tokens")]
    named = [("stock dense", DENSE.name)]
    for number, floor in enumerate(FLOORS):
        name = "the defaults" if number == 0 else f"`p_attn` {floor[0]:g}"
        named.append((name, floored(*floor)[0].name))
    lines = []
    for title, name in named:
        at = [rows.where(contender=name, tokens=n) for n in there]
        shown = [f"{right(r)} ({percent(r.mean('flops_ratio'), 0)})" for r in at]
        lines.append([title, *shown])
    return markdown(["", *(f"{n:,} tokens" for n in there)], lines)


def skills(result: Result) -> str:
    """Contenders of the followed settings, skill by skill, where all contenders meet."""
    rows = Rows.of(result).where(tokens=meeting(result))
    names = [name for name in followed() if name in rows.values("contender")]
    lines = []
    for name in names:
        mine = rows.where(contender=name)
        shown = [right(mine.where(skill=skill)) for skill in scenes.SKILLS]
        lines.append([name, *shown, right(mine)])
    return markdown(["contender", *scenes.SKILLS, "all"], lines)


def skill_names(result: Result) -> Sequence[str]:
    """Those of the result's bed; results of old are the needle model's."""
    return result.get("skills", scenes.SKILLS)


def ablation(result: Result) -> str:
    """Every contender where all of them meet, with its distance from stock dense."""
    at = meeting(result)
    rows = Rows.of(result).where(tokens=at)
    reference = rows.where(contender=DENSE.name)
    lines = []
    for name in rows.values("contender"):
        mine = rows.where(contender=name)
        lines.append(
            [
                name,
                *(percent(mine.where(tokens=n).mean("flops_ratio"), 0) for n in at),
                percent(mine.mean("density"), 0),
                percent(mine.mean("ffn_density"), 0),
                *(right(mine.where(haystack=m)) for m in MOTIONS),
                right(mine),
                points(difference(mine, reference)),
            ]
        )
    head = ["contender", *(f"FLOPs at {n:,}" for n in at), "attended", "FFN", *MOTIONS, "all"]
    return markdown([*head, "minus dense, points"], lines)


def matched(result: Result) -> str:
    """Ours against the rivals at its density (top_k, uniform) or FLOPs (EVS)."""
    rows = Rows.of(result)
    haystacks = rows.values("haystack")
    lines = []
    for name, rival in _pairs(result):
        mine, theirs = rows.where(contender=name), rows.where(contender=rival)
        at = set(mine.values("tokens")) & set(theirs.values("tokens"))
        mine, theirs = mine.where(tokens=at), theirs.where(tokens=at)
        if len(mine):
            differences = [
                points(difference(mine.where(haystack=m), theirs.where(haystack=m)))
                for m in (*haystacks, haystacks)
            ]
            flops = [percent(r.mean("flops_ratio"), 0) for r in (mine, theirs)]
            tokens = ", ".join(f"{n:,}" for n in sorted(at))
            lines.append([name, rival, tokens, *flops, *differences])
    head = ["ours", "rival", "video tokens", "FLOPs, ours", "FLOPs, rival"]
    first, *others = haystacks
    whole = "both" if len(haystacks) == 2 else "all"
    return markdown([*head, f"ours minus rival: {first}", *others, whole], lines)


def _pairs(result: Result) -> list[tuple[str, str]]:
    """(ours, rival): each rival with the contender it matches, and with that one by bounds.

    One that matches AdaSpark after EVS's rule also stands with AdaSpark alone by bounds.
    """
    pairs = []
    for rival in result["contenders"]:
        if like := rival["like"]:
            alone = f"adaspark {like.partition(' ')[2]} bounds"
            ours = dict.fromkeys((like, f"{like} bounds", alone))
            pairs += [(name, rival["name"]) for name in ours]
    return pairs


def long(result: Result) -> str:
    """What is spent and lost at LONG tokens and more, cheapest last."""
    rows = Rows.of(result).where(lambda row: row["tokens"] >= LONG)
    at = [n for n in LENGTHS if n in rows.values("tokens")]
    stock, ordered = (rows.where(contender=c.name) for c in (DENSE, CUBE_ORDER))
    lines = []
    for name in rows.values("contender"):
        mine = rows.where(contender=name)
        if set(mine.values("tokens")) == set(at):
            flops = mine.mean("flops_ratio")
            lines.append(
                (
                    flops,
                    [
                        name,
                        percent(flops, 0),
                        right(mine),
                        points(difference(mine, stock)),
                        points(difference(mine, ordered)),
                    ],
                )
            )
    lines.sort(key=lambda line: -line[0])
    head = ["contender", "FLOPs", "right", "minus stock dense", "minus dense in cube order"]
    return markdown(head, [line for _, line in lines])


def provenance(result: Result) -> str:
    """Where the figures come from."""
    versions, machine, weights = result["versions"], result["machine"], result["checkpoint"]
    layers = weights["config"].get("text_config", weights["config"])["num_hidden_layers"]
    per_cell = result["videos_per_cell"] * len(skill_names(result))
    dtype = result.get("dtype", "auto")
    computed_in = "" if dtype == "auto" else f"; computed in {dtype}"
    computed_in += "; engines in place of servers" if result.get("offline") else ""
    questions = f"{sum(row['total'] for row in result['rows']):,}"
    return "\n".join(
        [
            f"* {result['date'][:10]}, `{result['command']}`, commit {result['commit']}",
            f"* {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
            f"{computed_in}",
            f"* vLLM {versions['vllm']}, torch {versions['torch']}, "
            f"vllm-adaspark {versions['vllm-adaspark']}",
            f"* checkpoint `{weights['path']}`, {layers} layers, sha256 {weights['sha256'][:16]}…",
            f"* {questions} answers; {per_cell} questions for each contender and length, about "
            f"{result['videos_per_cell']} held-out videos",
        ]
    )


def videonsa(result: Result) -> str:
    """VideoNSA and its branches alone: right answers and, in brackets, attention's FLOPs."""
    rows = Rows.of(result)
    there = [n for n in LENGTHS if n in rows.values("tokens")]
    lines = []
    for name in rows.values("contender"):
        cells = []
        for tokens in there:
            mine = rows.where(contender=name, tokens=tokens)
            share = 1.0 if name == DENSE.name else mine.mean("attention_flops")
            cells.append(f"{right(mine)} ({percent(share, 0)})" if len(mine) else "–")
        lines.append([name, *cells])
    return markdown(["contender", *(f"{n:,}" for n in there)], lines)


def by_length(result: Result) -> str:
    """Every contender at each length, calm and busy, and its distance from stock dense."""
    rows = Rows.of(result)
    at = sorted(rows.values("tokens"))
    cells = [(tokens, motion) for tokens in at for motion in MOTIONS]
    reference = rows.where(contender=DENSE.name)
    lines = []
    for name in rows.values("contender"):
        mine = rows.where(contender=name)
        there = [mine.where(tokens=tokens, haystack=motion) for tokens, motion in cells]
        flops = (percent(mine.where(tokens=n).mean("flops_ratio"), 0) for n in at)
        lines.append(
            [name, *flops, *map(right, there), spanned(mine), points(difference(mine, reference))]
        )
    head = ["contender", *(f"FLOPs at {n:,}" for n in at)]
    head += [f"{n:,}, {motion}" for n, motion in cells]
    return markdown([*head, "all", "minus dense, points"], lines)


def skills_of_all(result: Result) -> str:
    """Every contender skill by skill, at the lengths where all of them ran."""
    rows = Rows.of(result).where(tokens=meeting(result))
    reference = rows.where(contender=DENSE.name)
    names = skill_names(result)
    lines = []
    for name in rows.values("contender"):
        mine = rows.where(contender=name)
        by_skill = [right(mine.where(skill=skill)) for skill in names]
        lines.append([name, *by_skill, right(mine), points(difference(mine, reference))])
    return markdown(["contender", *names, "all", "minus dense, points"], lines)


def haystacks_of_all(result: Result) -> str:
    """Every contender haystack by haystack, at the lengths where all of them ran."""
    rows = Rows.of(result).where(tokens=meeting(result))
    reference = rows.where(contender=DENSE.name)
    haystacks = rows.values("haystack")
    lines = []
    for name in rows.values("contender"):
        mine = rows.where(contender=name)
        shares = [right(mine.where(haystack=haystack)) for haystack in haystacks]
        flops = percent(mine.mean("flops_ratio"), 0)
        lines.append([name, flops, *shares, spanned(mine), points(difference(mine, reference))])
    return markdown(["contender", "FLOPs", *haystacks, "all", "minus dense, points"], lines)


def videonsa_provenance(result: Result) -> str:
    """Where these figures come from."""
    model = result["videonsa"]
    words = [f"VideoNSA `{model['path']}`", f"sha256 {model['sha256'][:16]}…"]
    words += [f"{key} {model[key]}" for key in ("block_counts", "window_size")]
    return f"{provenance(result)}\n* {', '.join(words)}"


VIDEONSA_TABLES: dict[str, Callable[[Result], str]] = {
    "provenance": videonsa_provenance,
    "lengths": videonsa,
    "skills": skills_of_all,
}

TABLES: dict[str, Callable[[Result], str]] = {
    "provenance": provenance,
    "dense": dense,
    "lengths": lengths,
    "long": long,
    "matched": matched,
    "skills": skills,
    "ablation": ablation,
}

ADATP_TABLES: dict[str, Callable[[Result], str]] = {
    "provenance": provenance,
    "contenders": by_length,
    "matched": matched,
    "skills": skills_of_all,
}

PLACES_TABLES: dict[str, Callable[[Result], str]] = {
    "provenance": provenance,
    "haystacks": haystacks_of_all,
    "skills": skills_of_all,
    "lengths": lengths,
    "matched": matched,
}

SERIES = {
    "needle": TABLES,
    "videonsa": VIDEONSA_TABLES,
    "adatp": ADATP_TABLES,
    "places": PLACES_TABLES,
}


def series(result: Result) -> str:
    """Whose tables a result fills."""
    return result.get("series", "needle")


def followed() -> list[str]:
    """Names of the contenders that pictures and the skill table show."""
    names = [DENSE.name, CUBE_ORDER.name]
    names += [contender.name for floor in FLOORS for contender in floored(*floor)]
    for pair in FOLLOWED:
        names += [label(*pair), *(rival.name for rival in rivals(*pair))]
    return names


def counts(rows: Rows) -> str:
    """Right answers of questions."""
    if not len(rows):
        return "–"
    return f"{sum(r['correct'] for r in rows)}/{sum(r['total'] for r in rows)}"


def right(rows: Rows) -> str:
    """Share of right answers."""
    return percent(accuracy(rows).value) if len(rows) else "–"


def spanned(rows: Rows) -> str:
    """Share of right answers and its interval."""
    if not len(rows):
        return "–"
    value, low, high = (100 * x for x in vars(accuracy(rows)).values())
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def points(interval: Interval | None) -> str:
    """A difference in percentage points."""
    if interval is None:
        return "–"
    value, low, high = (100 * x for x in (interval.value, interval.low, interval.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))
