"""The result file: rows, and all that is needed to say where they come from."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import ROOT
from .grid import Grid
from .videos import Cell
from .work import Record, code_hash, file_hash

DISTRIBUTIONS = ("vllm-adaspark", "vllm", "torch", "transformers", "openai", "numpy")


def document(
    records: list[Record],
    grid: Grid,
    checkpoint: Path,
    started: datetime.datetime,
    dtype: str = "auto",
    offline: bool = False,
) -> dict[str, Any]:
    """The whole result, JSON-ready.

    Args:
        records: as the work file has them.
        started: when this run began; of a run that was resumed, when it was last.
        dtype: what the servers computed in.
        offline: whether engines were asked in place of servers.
    """
    weights = checkpoint / "model.safetensors"
    return {
        "benchmark": "needle",
        "series": grid.series,
        "frame": Cell(0, grid.bed.size).frame,
        "skills": list(grid.bed.skills),
        "date": started.isoformat(timespec="seconds"),
        "seconds_this_run": round((datetime.datetime.now(datetime.UTC) - started).total_seconds()),
        "command": shlex.join(["python", "-m", "benchmarks.needle", *sys.argv[1:]]),
        "commit": _commit(),
        "code": sorted({record["code"] for record in records} | {code_hash()}),
        "checkpoint": {
            "path": _relative(checkpoint),
            "sha256": file_hash(weights),
            "config": json.loads((checkpoint / "config.json").read_text()),
        },
        "machine": machine(),
        "versions": {name: _version(name) for name in DISTRIBUTIONS} | {"python": sys.version},
        "dtype": dtype,
        "offline": offline,
        "videos_per_cell": grid.videos,
        "contenders": [
            {"name": c.name, "curve": c.curve, "kind": c.kind, "like": c.like}
            for c in grid.contenders
        ],
        "rows": [row for record in records for row in rows(record)],
    }


def videonsa(checkpoint: Path) -> dict[str, Any]:
    """Which VideoNSA was asked, JSON-ready."""
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    return {
        "path": _relative(checkpoint),
        "sha256": file_hash(checkpoint / "model.safetensors"),
        "block_counts": text["block_counts"],
        "window_size": text["window_size"],
    }


def rows(record: Record) -> list[dict[str, Any]]:
    """One row per question of a record."""
    settings = record["settings"]
    if settings is None:
        settings = {"server": record["server"]}
    return [
        {
            "contender": record["contender"],
            "settings": settings,
            "skill": answer["skill"],
            "haystack": record["haystack"],
            "tokens": record["tokens"],
            "depth": answer["depth"],
            "flops_ratio": _rounded(record["flops_ratio"]),
            "density": _rounded(record["attention_density"]),
            "ffn_density": _rounded(record["ffn_density"]),
            "attention_flops": _rounded(record.get("attention_flops")),
            "correct": int(answer["answer"] == answer["expected"]),
            "total": 1,
            "video": record["seed"],
            "frame": record["frame"],
            "parts": record["parts"],
        }
        for answer in record["answers"]
    ]


def write(result: dict[str, Any], path: Path) -> None:
    """JSON with one line per row, so that two results can be compared line by line."""
    head = json.dumps(
        {k: v for k, v in result.items() if k != "rows"}, indent=1, ensure_ascii=False
    )
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in result["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB."""
    names = [
        line.partition(":")[2].strip()
        for line in _text("/proc/cpuinfo").splitlines()
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.system(),
    }


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout, with a plus if files differ; None outside of one."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None


def _relative(path: Path) -> str:
    """Without the place of the checkout."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 4)
