"""Samples as they are taken, one JSON line each, and the rows that are made of them.

A run that was interrupted goes on where it stopped: a line is written as soon as its sample is
taken, and a cell that has its samples is not measured again.
"""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

DENSE = "dense"  # the contender that others are compared with: stock vLLM


@dataclass(frozen=True)
class Cell:
    """One thing that is measured several times."""

    name: str  # what: attention, ffn 3B, ttft, ...
    contender: str
    tokens: int
    share: float = 1.0  # of the work that was asked for; what was done is in the samples

    @property
    def group(self) -> tuple[str, int]:
        """Cells of a group are compared with the group's dense cell."""
        return self.name, self.tokens


class Record:
    """All samples of a run.

    Args:
        path: the work file, one JSON line per sample; made if need be.
        about: what samples must agree on to be compared: machine, versions, options.

    Raises:
        ValueError: the file's samples were taken under something else.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self._path, self.about = path, dict(about)
        self.samples: dict[Cell, list[dict[str, Any]]] = {}
        self.notes: dict[str, Any] = {}  # what there is to say beside the samples
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # The last line may have been cut by whatever interrupted the run.
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        if not entries:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("", encoding="utf-8")
            self._write({"about": self.about})
            return
        if entries[0]["about"] != json.loads(json.dumps(self.about)):
            raise ValueError(
                f"{path} holds samples of another run: {entries[0]['about']}, now it is "
                f"{self.about}; start afresh with --fresh"
            )
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        for entry in entries[1:]:
            if "note" in entry:
                self.notes[entry["note"]] = entry["value"]
            else:
                self.samples.setdefault(Cell(**entry["cell"]), []).append(entry["sample"])

    def add(self, cell: Cell, time_s: float, **more: Any) -> None:
        """Note a sample.

        Args:
            cell: what was measured.
            time_s: how long it took.
            more: ``work``, the share of dense's work that was done; ``parts``, seconds by part of
                the whole; anything else that a row shall carry.
        """
        sample = {"time_s": time_s, **more}
        self.samples.setdefault(cell, []).append(sample)
        self._write({"cell": asdict(cell), "sample": sample})

    def note(self, name: str, value: Any) -> None:
        """Note something that is no sample."""
        if self.notes.get(name) != value:
            self.notes[name] = value
            self._write({"note": name, "value": value})

    def count(self, cell: Cell) -> int:
        return len(self.samples.get(cell, ()))

    def _write(self, entry: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def in_turn(
    record: Record,
    contenders: Mapping[Cell, Callable[[], Mapping[str, Any]]],
    rounds: Mapping[Cell, int],
) -> None:
    """Measure all contenders in turn, every other round backwards, so that drift hits all alike.

    Args:
        record: gets the samples; those it has are not taken again.
        contenders: how to take a sample of each cell: keywords of :meth:`Record.add`.
        rounds: samples of each cell.
    """
    for turn in range(max(rounds.values())):
        for cell in list(contenders)[:: -1 if turn % 2 else 1]:
            if record.count(cell) <= turn < rounds[cell]:
                sample = contenders[cell]()
                record.add(cell, **sample)
                progress(
                    f"{cell.name}, {cell.tokens} tokens, {cell.contender} {cell.share:.0%}, "
                    f"{turn + 1} of {rounds[cell]}: {sample['time_s']:.3f} s"
                )


def rows(record: Record) -> list[dict[str, Any]]:
    """One row per cell: medians, compared with the dense cell of the same name and length.

    ``efficiency`` is dense time x work / time: 1 when exactly the left-out work's time is saved.
    Both ratios are None where dense was not measured.
    """
    dense = {
        cell.group: _median(samples)
        for cell, samples in record.samples.items()
        if cell.contender == DENSE
    }
    made = []
    for cell, samples in record.samples.items():
        time_s = [sample["time_s"] for sample in samples]
        work = statistics.median(sample.get("work", 1.0) for sample in samples)
        base = dense.get(cell.group)
        median = _median(samples)
        made.append(
            {
                "name": cell.name,
                "contender": cell.contender,
                "tokens": cell.tokens,
                "density": work,
                "asked": cell.share,
                "time_s": time_s,
                "median_s": median,
                "efficiency": base * work / median if base else None,
                "ratio_to_dense": median / base if base else None,
                **_extras(samples),
            }
        )
    return made


def _median(samples: list[dict[str, Any]]) -> float:
    return statistics.median(sample["time_s"] for sample in samples)


def _extras(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the other numbers, and of each part."""
    extras: dict[str, Any] = {}
    for key in {key: None for sample in samples for key in sample}:
        values = [sample[key] for sample in samples if key in sample]
        if key in ("time_s", "work"):
            continue
        if isinstance(values[0], dict):
            extras[key] = {part: statistics.median(v[part] for v in values) for part in values[0]}
        else:
            extras[key] = statistics.median(values)
    return extras


def machine() -> dict[str, Any]:
    """What samples are taken on and with."""
    cpuinfo = ""
    with contextlib.suppress(OSError):
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = re.findall(r"(?m)^model name\s*: (.*)$", cpuinfo)
    versions = {}
    for name in ("vllm", "torch", "transformers", "vllm-adaspark"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "cpu": names[0] if names else "unknown",
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "features": features(cpuinfo),
        "versions": versions,
    }


# What decides which of vLLM's CPU kernels run, by the flag that Linux shows.
FEATURES = {"amx_tile": "AMX", "avx512_bf16": "AVX-512 BF16", "avx512f": "AVX-512", "avx2": "AVX2"}


def features(cpuinfo: str) -> list[str]:
    """Those of ``FEATURES`` that the processor has, by what /proc/cpuinfo says; best first."""
    found = re.search(r"(?m)^flags\s*:(.*)$", cpuinfo)
    flags = set(found[1].split()) if found else set()
    return [name for flag, name in FEATURES.items() if flag in flags]


_STARTED = time.monotonic()


def progress(line: str) -> None:
    """A line with the minutes since the start."""
    minutes, seconds = divmod(int(time.monotonic() - _STARTED), 60)
    print(f"[{minutes:2d}:{seconds:02d}] {line}", flush=True)
