"""The rows as Markdown tables, and the section of docs/performance.md that holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from . import decoding, long, off
from .attention import FLEX, LARGE, NO_AMX, OURS, USUAL, selection_share
from .dropping import PREFIX
from .record import DENSE
from .scaling import exponent
from .served import COMPILED, SPARSE
from .videonsa import NAME as VIDEONSA

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
    if decoding.NAME in by_name:
        about = _elsewhere(result, "decoding", result["notes"][decoding.NAME]["dtype"])
        parts += ["### Decoding: attention of one layer", about, _decoding(by_name[decoding.NAME])]
    if long.NAME in by_name:
        about = _elsewhere(result, "long", result["notes"][long.NAME]["dtype"])
        parts += ["### Long contexts", about, _long(by_name[long.NAME], result["notes"][long.NAME])]
    if long.TOGETHER in by_name:
        parts.append(_many(by_name[long.TOGETHER], result["notes"][long.TOGETHER]["tokens"]))
    ffn = [row for name in by_name if name.startswith("ffn") for row in by_name[name]]
    if ffn:
        parts += ["### FFN", _ffn(ffn)]
    if VIDEONSA in by_name:
        dtype = result["notes"][VIDEONSA]["dtype"]
        about = _elsewhere(result, "videonsa", dtype)
        parts += ["### VideoNSA's attention", about, _videonsa(by_name[VIDEONSA])]
    if "ttft" in by_name:
        parts += ["### Time to first token", _ttft(by_name, "ttft")]
    if COMPILED in by_name:
        about = _elsewhere(result, "compiled", "bfloat16")
        parts += ["### Time to first token, torch.compile on", about, _ttft(by_name, COMPILED)]
    if "EVS" in result["notes"]:
        evs = result["notes"]["EVS"]
        parts.append(
            f"EVS drops {evs['video_pruning_rate']:.1%} of the video tokens, so that its FLOPs are "
            f"ours at {evs['matched_at']} tokens; all others keep every token."
        )
    at_once = [row for row in rows if row["name"].endswith("at once")]
    between = [row for row in at_once if row["name"].startswith(PREFIX)]
    at_once = [row for row in at_once if not row["name"].startswith(PREFIX)]
    if at_once:
        parts += ["### Requests at once", _at_once(at_once)]
    if between:
        about = _elsewhere(result, "dropping", "float32")
        table = _dropping(between, result["notes"])
        parts += ["### Tokens dropped between the layers", about, table]
    pairs = {name: rows for name, rows in by_name.items() if name.startswith(off.PREFIX + ",")}
    if pairs:
        about = _elsewhere(result, "off", "float32")
        parts += ["### Nothing left out", about, _off(pairs)]
    if "tpot" in by_name:
        parts += ["### Time per output token", _tpot(by_name["tpot"])]
    parts += ["### Length", _scaling(result["scaling"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def headline(result: dict[str, Any]) -> str:
    """The few rows that the README shows."""
    lines, compiled = [], []
    order = ("attention", "ffn", "ttft, language", "ttft", "tpot")  # requests at once last
    rank = {
        row["name"]: next((n for n, part in enumerate(order) if row["name"].startswith(part)), 9)
        for row in result["rows"]
    }
    compared = [row for row in result["rows"] if row["ratio_to_dense"]]
    for row in sorted(compared, key=lambda row: rank[row["name"]]):
        name, tokens, ours = row["name"], row["tokens"], row["contender"]
        if ours == OURS and (name, tokens, row["asked"]) == (USUAL, 16384, 0.1):
            what = "attention"
        elif ours == OURS and (name, row["asked"]) == ("ffn 7B", 0.5):
            what = "FFN, 7B"
        elif name.endswith("ttft, language model") and ours == SPARSE:
            what = "prefill of the language model"
        elif name == "ttft" and ours == SPARSE and tokens == 32768:
            what = "time to first token"
        elif name == "8 at once" and ours == SPARSE:
            what = "8 requests at once, all answered"
        elif (name, ours) == ("tpot", "p=0.9"):
            what = "time per output token, p=0.9"
        else:
            continue
        (compiled if name.startswith(COMPILED) else lines).append(_headline_line(what, row))
    head = "what | video tokens | work | stock | ours | speed-up | efficiency"
    parts = [_machine(result), _table(head, lines)]
    if compiled:
        parts += [_elsewhere(result, "compiled", "torch.compile on"), _table(head, compiled)]
    return "\n\n".join(parts) + "\n"


def _headline_line(what: str, row: Row) -> tuple[str, ...]:
    decoding = row["name"] == "tpot"
    return (
        what,
        f"{row['tokens']:,}",
        "" if decoding else f"{row['density']:.0%}",
        f"{row['median_s'] / row['ratio_to_dense']:.3g} s",
        f"{row['median_s']:.3g} s",
        _speed_up(row),
        "" if decoding else _efficiency(row),
    )


def _elsewhere(result: dict[str, Any], part: str, how: str) -> str:
    """What a part was measured on, if not on what all else was; and how."""
    about = result.get("elsewhere", {}).get(part)
    return f"{_machine(result | {'about': about})[:-1]}; {how}." if about else f"Here: {how}."


def _machine(result: dict[str, Any]) -> str:
    machine = result["about"]["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    instructions = ", ".join(machine.get("features") or [machine["instructions"]])
    if "features" not in machine and any(row["name"] == NO_AMX for row in result["rows"]):
        instructions += " and AMX"  # an older run: it measured without AMX beside with it
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{machine['cpu']}, {threads}, {instructions}; {versions}."


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


def _decoding(rows: list[Row]) -> str:
    dense = {row["tokens"]: row["median_s"] for row in rows if row["contender"] == DENSE}
    return _table(
        "context | contender | blocks attended | dense, ms | ours, ms | speed-up "
        "| of it choosing, ms",
        (
            (
                f"{row['tokens']:,}",
                row["contender"],
                f"{row['density']:.0%}",
                f"{dense[row['tokens']] * 1e3:.2f}",
                f"{row['median_s'] * 1e3:.2f}",
                _speed_up(row),
                f"{row['parts']['choosing'] * 1e3:.2f}",
            )
            for row in rows
            if row["contender"] != DENSE
        ),
    )


def _long(rows: list[Row], about: dict[str, Any]) -> str:
    rows = sorted(rows, key=lambda row: row["tokens"])
    table = _table(
        "chunk ends at | blocks attended | plan, all layers, ms | choosing, ms | kernel, s "
        "| plan and choosing",
        (
            (
                f"{row['tokens']:,}",
                f"{row['density']:.0%}",
                f"{row['parts']['planning'] * 1e3:.1f}",
                f"{row['parts']['choosing'] * 1e3:.0f}",
                f"{row['parts']['kernel']:.1f}",
                f"{1 - row['parts']['kernel'] / row['median_s']:.1%}",
            )
            for row in rows
        ),
    )
    grows = ""
    if len(rows) > 1:
        fits = {
            part: exponent([(row["tokens"], row["parts"][part]) for row in rows])
            for part in ("planning", "choosing", "kernel")
        }
        told = ", ".join(f"{part} {fit:.2f}" for part, fit in fits.items())
        grows = f"  A chunk's time grows with where it ends to the: {told}."
    beside = about["sums_bytes"] / about["cache_bytes"]
    step = rows[-1]["step_bytes"] / about["cache_bytes"] / long.LAYERS
    return (
        f"{table}\n\nBeside the KV cache of {rows[-1]['tokens']:,} tokens, key sums take "
        f"{beside:.1%} of it, and what all layers of a step share for choosing and for tables "
        f"{rows[-1]['step_bytes'] / 2**20:.0f} MiB, {step:.1%} of the cache of {long.LAYERS} "
        f"layers.{grows}"
    )


def _many(rows: list[Row], tokens: int) -> str:
    return "\n\n".join(
        f"{row['tokens']} requests in one step, {row['contender']}, each behind {tokens:,} video "
        f"tokens: planning {row['parts']['planning'] * 1e3:.1f} ms, accounts "
        f"{row['parts']['accounting'] * 1e3:.1f} ms."
        for row in rows
    )


def _off(by_name: dict[str, list[Row]]) -> str:
    lines = []
    for name, rows in by_name.items():
        _, what, part = name.split(", ")
        dense = next(row for row in rows if row["contender"] == DENSE)
        for row in rows:
            if row is not dense:
                median, low, high = off.paired(row["time_s"], dense["time_s"])
                lines.append(
                    (
                        what,
                        part,
                        row["contender"],
                        f"{dense['median_s'] * 1e3:.1f}",
                        f"{median:.3f}",
                        f"{low:.3f} to {high:.3f}",
                        str(len(row["time_s"])),
                    )
                )
    return _table(
        "request | | contender | stock, ms | median ratio to stock | 95 % interval | pairs", lines
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


def _videonsa(rows: list[Row]) -> str:
    dense = {row["tokens"]: row for row in rows if row["contender"] == DENSE}
    ours = sorted((r for r in rows if r["contender"] != DENSE), key=lambda row: row["tokens"])
    parts = list(ours[0]["parts"])
    return _table(
        f"tokens | FLOPs | dense, s | ours, s | {', s | '.join(parts)}, s | time against dense",
        (
            (
                f"{row['tokens']:,}",
                f"{row['density']:.1%}",
                _seconds(dense.get(row["tokens"])),
                _seconds(row),
                *(f"{row['parts'][part]:.3f}" for part in parts),
                _known(row, "ratio_to_dense", lambda ratio: f"{ratio:.2f}x"),
            )
            for row in ours
        ),
    )


def _ttft(by_name: dict[str, list[Row]], name: str) -> str:
    of_model = by_name[f"{name}, language model"]
    language = {(row["tokens"], row["contender"]): row for row in of_model}
    parts = list(by_name[name][0]["parts"])
    lines = []
    for row in sorted(by_name[name], key=lambda row: row["tokens"]):
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


def _dropping(rows: list[Row], notes: dict[str, Any]) -> str:
    dense = {(row["name"], row["tokens"]): row for row in rows if row["contender"] == DENSE}
    table = _table(
        "requests | tokens | contender | FLOPs | language model, s | against dense "
        "| against dense, CPU time | requests/s | KV entries written",
        (
            (
                row["name"].split()[1],
                str(row["tokens"]),
                row["contender"],
                f"{row['density']:.1%}",
                f"{row['median_s']:.2f}",
                _speed_up(row),
                f"{dense[row['name'], row['tokens']]['cpu_s'] / row['cpu_s']:.2f}x",
                f"{row['requests_per_s']:.3f}",
                f"{row['alive']:.0%}",
            )
            for row in rows
        ),
    )
    about = notes[PREFIX]
    return (
        f"{table}\n\nA model of {about['layers']} narrow layers in float32 with dummy weights.  "
        f"EVS drops {about['video_pruning_rate']:.1%} of the video tokens, so that its FLOPs are "
        f"AdaTP's at {about['matched_at']} tokens.  *KV entries written* is the share of the "
        "video's, over all layers: EVS also holds no more KV blocks than that, while AdaTP and "
        "FastV hold those of the whole prompt, which their first layers need."
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
