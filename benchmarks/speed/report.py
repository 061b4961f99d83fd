"""The rows as Markdown tables, and the section of docs/performance.md that holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .attention import FLEX, LARGE, NO_AMX, OURS, USUAL, selection_share
from .record import DENSE
from .served import SPARSE

Row = dict[str, Any]


def markdown(result: dict[str, Any]) -> str:
    """All tables of a result, as ``__main__`` writes it to JSON."""
    rows = result["rows"]
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    parts = [_machine(result)]
    for name in (USUAL, LARGE, NO_AMX):
        if name in by_name:
            parts += ["### " + name[0].upper() + name[1:], _attention(by_name[name])]
    if FLEX in result["notes"]:
        parts.append(f"{FLEX}: {result['notes'][FLEX]}.")
    ffn = [row for name in by_name if name.startswith("ffn") for row in by_name[name]]
    if ffn:
        parts += ["### FFN", _ffn(ffn)]
    if "ttft" in by_name:
        parts += ["### Time to first token", _ttft(by_name)]
    if "EVS" in result["notes"]:
        evs = result["notes"]["EVS"]
        parts.append(
            f"EVS drops {evs['video_pruning_rate']:.1%} of the video tokens, so that its FLOPs are "
            f"ours at {evs['matched_at']} tokens; all others keep every token."
        )
    at_once = [row for row in rows if row["name"].endswith("at once")]
    if at_once:
        parts += ["### Requests at once", _at_once(at_once)]
    if "tpot" in by_name:
        parts += ["### Time per output token", _tpot(by_name["tpot"])]
    parts += ["### Length", _scaling(result["scaling"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(result: dict[str, Any]) -> str:
    """The few rows that the README shows."""
    lines = []
    order = ("attention", "ffn", "ttft, language", "ttft", "tpot")  # requests at once last
    rank = {
        row["name"]: next((n for n, part in enumerate(order) if row["name"].startswith(part)), 9)
        for row in result["rows"]
    }
    for row in sorted(result["rows"], key=lambda row: rank[row["name"]]):
        name, tokens, ours = row["name"], row["tokens"], row["contender"]
        if ours == OURS and (name, tokens) == (USUAL, 16384) and row["asked"] in (0.1, 0.2):
            what = "attention"
        elif ours == OURS and (name, tokens, row["asked"]) == (LARGE, 16384, 0.2):
            what = "attention, cubes of 8×4×4"
        elif ours == OURS and (name, tokens, row["asked"]) == (NO_AMX, 16384, 0.2):
            what = "attention, kernel without AMX"
        elif ours == OURS and name.startswith("ffn") and row["asked"] == 0.5:
            what = f"FFN, {name.removeprefix('ffn ')}"
        elif name == "ttft, language model" and ours == SPARSE:
            what = "prefill of the language model"
        elif name == "ttft" and ours == SPARSE and tokens == 32768:
            what = "time to first token"
        elif name.endswith("at once") and ours == SPARSE:
            number = name.removesuffix(" at once")
            what = "one request, answered" if number == "1" else f"{number} at once, all answered"
        elif name == "tpot" and ours in ("p=0.9", SPARSE.split(",")[0]):
            what = f"time per output token, {ours}"
        else:
            continue
        dense = row["median_s"] / row["ratio_to_dense"]
        lines.append(
            (
                what,
                f"{tokens:,}",
                "" if name == "tpot" else f"{row['density']:.0%}",
                f"{dense:.3g} s",
                f"{row['median_s']:.3g} s",
                _speed_up(row),
                "" if name == "tpot" else _efficiency(row),
            )
        )
    table = _table("what | video tokens | work | stock | ours | speed-up | efficiency", lines)
    return f"{_machine(result)}\n\n{table}\n"


def _machine(result: dict[str, Any]) -> str:
    machine = result["about"]["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    instructions = machine["instructions"]
    if any(row["name"] == NO_AMX for row in result["rows"]):  # measured beside the other kernel
        instructions += " and AMX"
    return f"{machine['cpu']}, {machine['threads']} threads, {instructions}; {versions}."


def _attention(rows: list[Row]) -> str:
    dense = {row["tokens"]: row for row in rows if row["contender"] == DENSE}
    flex = {(row["tokens"], row["asked"]): row for row in rows if row["contender"] == FLEX}
    ours = sorted(
        (row for row in rows if row["contender"] == OURS), key=lambda r: (r["tokens"], r["asked"])
    )
    return _table(
        "tokens | cubes kept | pairs computed | dense, s | FlexAttention, s | ours, s "
        "| speed-up | efficiency | planning and selection",
        (
            (
                str(row["tokens"]),
                f"{row['asked']:.0%}",
                f"{row['density']:.1%}",
                _seconds(dense.get(row["tokens"])),
                _seconds(flex.get((row["tokens"], row["asked"]))),
                _seconds(row),
                _speed_up(row),
                _efficiency(row),
                f"{selection_share(row):.1%}",
            )
            for row in ours
        ),
    )


def _ffn(rows: list[Row]) -> str:
    dense = {row["name"]: row for row in rows if row["contender"] == DENSE}
    return _table(
        "FFN | tokens | run | dense, s | ours, s | speed-up | efficiency | selection",
        (
            (
                row["name"].removeprefix("ffn "),
                str(row["tokens"]),
                f"{row['density']:.1%}",
                _seconds(dense.get(row["name"])),
                _seconds(row),
                _speed_up(row),
                _efficiency(row),
                f"{row['parts']['selection'] / row['median_s']:.1%}",
            )
            for row in rows
            if row["contender"] != DENSE
        ),
    )


def _ttft(by_name: dict[str, list[Row]]) -> str:
    language = {(r["tokens"], r["contender"]): r for r in by_name["ttft, language model"]}
    parts = list(by_name["ttft"][0]["parts"])
    lines = []
    for row in sorted(by_name["ttft"], key=lambda row: row["tokens"]):
        alone = language[row["tokens"], row["contender"]]
        lines.append(
            (
                str(row["tokens"]),
                row["contender"],
                f"{row['density']:.1%}",
                f"{row['median_s']:.2f}",
                *(f"{row['parts'][part]:.2f}" for part in parts),
                _speed_up(alone),
                _efficiency(alone),
            )
        )
    head = f"tokens | contender | FLOPs | TTFT, s | {' | '.join(parts)}"
    return _table(f"{head} | language model's speed-up | efficiency", lines)


def _at_once(rows: list[Row]) -> str:
    return _table(
        "requests | tokens | contender | FLOPs | requests/s | against dense | TTFT, s",
        (
            (
                row["name"].removesuffix(" at once"),
                str(row["tokens"]),
                row["contender"],
                f"{row['density']:.1%}",
                f"{row['requests_per_s']:.3f}",
                _speed_up(row),
                f"{row['ttft_s']:.2f}",
            )
            for row in rows
        ),
    )


def _tpot(rows: list[Row]) -> str:
    return _table(
        "context | contender | TPOT, ms | against dense",
        (
            (
                str(row["tokens"]),
                row["contender"],
                f"{row['median_s'] * 1e3:.1f}",
                _speed_up(row),
            )
            for row in rows
        ),
    )


def _scaling(scaling: dict[str, Any]) -> str:
    table = _table(
        "what | contender | share asked | lengths | time grows with length to the",
        (
            (
                fit["name"],
                fit["contender"],
                f"{fit['asked']:.0%}",
                f"{fit['tokens'][0]} to {fit['tokens'][-1]}",
                f"{fit['exponent']:.2f}",
            )
            for fit in scaling["exponents"]
        ),
    )
    memory = scaling["memory"]
    text = (
        f"Memory per token of a 7B layer: KV cache {memory['kv_cache']:.0f} bytes, key sums "
        f"{memory['key_sums']:.0f} ({memory['key_sums_share']:.1%})."
    )
    return f"{table}\n\n{text}" if scaling["exponents"] else text


def _table(head: str, lines: Iterable[tuple[str, ...]]) -> str:
    columns = head.count("|") + 1
    rows = [f"| {head} |", "|" + "---|" * columns]
    return "\n".join([*rows, *(f"| {' | '.join(line)} |" for line in lines)])


def _known(row: Row | None, key: str, form: Callable[[float], str]) -> str:
    return form(row[key]) if row is not None and row[key] is not None else "not measured"


def _seconds(row: Row | None) -> str:
    return _known(row, "median_s", lambda seconds: f"{seconds:.3f}")


def _speed_up(row: Row) -> str:
    return _known(row, "ratio_to_dense", lambda ratio: f"{1 / ratio:.2f}x")


def _efficiency(row: Row) -> str:
    return _known(row, "efficiency", lambda value: f"{value:.2f}")
