"""Print what a request cost, from the report file that the plugin writes (`report_file`).

    python examples/demo/report.py .demo/report.jsonl

One JSON object per line and finished request; the last one is shown.
"""

import json
import sys
import time
from pathlib import Path

BAR_WIDTH = 30


def read_last(path: str | Path, *, timeout: float = 0) -> dict:
    """The report of the last finished request; waits up to `timeout` seconds for the first one.

    Raises:
        FileNotFoundError: no report in time.
    """
    deadline = time.monotonic() + timeout
    while True:
        text = Path(path).read_text() if Path(path).exists() else ""
        whole_lines = text.rpartition("\n")[0].splitlines()  # the writer may be amid the last one
        if whole_lines:
            return json.loads(whole_lines[-1])
        if time.monotonic() >= deadline:
            raise FileNotFoundError(f"{path}: no report of a finished request")
        time.sleep(0.1)


def render(report: dict) -> str:
    """The report as text: a bar per layer, then FLOPs executed against dense."""
    lines = [
        f"{report['tokens']:,} tokens computed, {report['video_tokens']:,} of them video tokens",
        "",
        f"layer  {'cubes attended':<{BAR_WIDTH + 9}}  FFN density (video tokens)",
    ]
    for layer in report["layers"]:
        attended = _share(layer["cubes_attended"], layer["cubes_seen"])
        active = _share(layer["ffn_active"], layer["ffn_tokens"])
        lines.append(f"{layer['layer']:5}  {_bar(attended)} {attended:7.1%}   {active:6.1%}")
    lines += ["", f"{'FLOPs':<12}{'dense':>12}{'executed':>12}{'share':>9}"]
    dense, executed = report["flops"]["dense"], report["flops"]["executed"]
    for name, key in (("QKV, O", "qkvo"), ("attention", "attention"), ("FFN", "ffn")):
        lines.append(_flops_line(name, dense[key], executed[key]))
    lines.append(f"{'selection':<12}{'':>12}{_si(executed['selection']):>12}")
    lines.append(_flops_line("total", dense["total"], executed["total"]))
    return "\n".join(lines)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0  # nothing to leave out: all of it was computed


def _bar(share: float) -> str:
    full, empty = "█░"
    if "utf" not in (sys.stdout.encoding or "").lower():
        full, empty = "#."
    filled = round(share * BAR_WIDTH)
    return full * filled + empty * (BAR_WIDTH - filled)


def _flops_line(name: str, dense: float, executed: float) -> str:
    return f"{name:<12}{_si(dense):>12}{_si(executed):>12}{_share(executed, dense):>9.1%}"


def _si(value: float) -> str:
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        print(render(read_last(sys.argv[1])))
    except FileNotFoundError as missing:
        sys.exit(str(missing))
